"""What the page shows of a model: samples, each with its neighbours, and one latent at several resolutions."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evals.metrics.neighbours import nearest_neighbour_distances
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import denoised, initial_noise, sample_latents, slerp
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.signals.outputs import decode_volumes, pictures_of_size
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model
from mnif.utils.meshes import mesh_from_values, mesh_preview
from mnif.utils.pixels import as_axes, to_mode

LARGE = 256
"""Pixels of the longer side of a sample that was clicked on."""

_SMALL = 128  # likewise, of the frames between two samples
_VIEWS = 24  # of a turntable
_VOXELS = 64  # per axis, at most, of a shape that turns on the page


class Easel(ABC):
    """Draws latents of one signal for the page; all pictures are [H, W, 3] uint8.

    Attributes:
        samples: how many the gallery shows.
        frames: from one sample to the next.
        sides: from how many :meth:`around` looks.
    """

    samples = 12
    frames = 6
    sides = 1

    def __init__(self, decoder: MNIFModel) -> None:
        self.decoder, self.signal = decoder, signal_of_model(decoder)

    @abstractmethod
    def drawn(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Draws latents [B, D] with so many pixels along the longer side, or of views along the height."""

    def around(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Draws latents [B, D] from several sides, if what they are can be looked at so: [B, sides, H, W, 3]."""
        return self.drawn(latents, pixels)[:, None]

    def large(self, latents: Tensor) -> np.ndarray:
        """Draws latents [B, D] to be looked at closely."""
        return self.drawn(latents, LARGE)

    def small(self, latents: Tensor) -> np.ndarray:
        """Draws latents [B, D] as frames of an animation."""
        return self.drawn(latents, _SMALL)

    def resolutions(self, latents: Tensor) -> dict[str, np.ndarray]:
        """Draws latents [B, D] at several resolutions, by what these are called; nothing where there is only one."""
        return {}

    def turntable(self, latent: Tensor) -> np.ndarray | None:
        """Draws one latent [1, D] from a circle of cameras, if it can only be seen so: [frames, H, W, 3]."""
        return None

    def volume(self, latent: Tensor) -> np.ndarray | None:
        """Decodes one latent [1, D] to a grid [R, R, R] that the page can turn, above 0 inside; None otherwise."""
        return None


class ImageEasel(Easel):
    """Draws pictures, which their fields know at every resolution."""

    samples = 48
    frames = 8

    def drawn(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Asks the fields at so many points."""
        images = pictures_of_size(self.decoder, latents, pixels)
        return np.stack([np.asarray(to_mode(image, 3)) for image in images])

    def resolutions(self, latents: Tensor) -> dict[str, np.ndarray]:
        """Draws 32, 64 and 256 pixels along the longer side, and as many as were trained on."""
        sizes = sorted({32, 64, LARGE, min(max(as_axes(self.signal.grid_resolution, 2)), LARGE)})
        each = [self.drawn(latents, size) for size in sizes]
        return {f"{pictures.shape[2]} × {pictures.shape[1]}": pictures for pictures in each}


class ShapeEasel(Easel):
    """Draws the shaded surfaces of shapes."""

    def drawn(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Shades the surface at the training resolution."""
        return self._shaded(latents, pixels)

    def resolutions(self, latents: Tensor) -> dict[str, np.ndarray]:
        """Shades surfaces of half as many voxels per axis as were trained on, as many, and twice as many."""
        trained = self._voxels
        return {
            f"{voxels}³ voxels": self._shaded(latents, LARGE, voxels)
            for voxels in (max(trained // 2, 1), trained, 2 * trained)
        }

    def volume(self, latent: Tensor) -> np.ndarray | None:
        """Decodes at the training resolution, or at 64 voxels per axis if that is less."""
        return next(decode_volumes(self.decoder, latent, min(self._voxels, _VOXELS)))

    @property
    def _voxels(self) -> int:
        return max(as_axes(self.signal.grid_resolution, 3))

    def _shaded(self, latents: Tensor, pixels: int, voxels: int | None = None) -> np.ndarray:
        return np.stack([_shaded(volume, pixels) for volume in decode_volumes(self.decoder, latents, voxels)])


class ViewEasel(Easel):
    """Draws views of radiance fields."""

    frames = 5
    sides = 3

    def drawn(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Renders a view from the second of eight cameras on the circle, as :meth:`Signal.images` does."""
        second = slice(1, 2)
        views = (
            self._radiance.turntable(self.decoder, latent, 8, resolution=pixels, chosen=second)
            for latent in latents.split(1)
        )
        return np.concatenate([view[:, 0] for view in views])

    def around(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Renders the view of :meth:`drawn`, and those a third of the circle on each side of it."""
        chosen, count = slice(_VIEWS // 8, None, _VIEWS // self.sides), _VIEWS
        views = (
            self._radiance.turntable(self.decoder, latent, count, resolution=pixels, chosen=chosen)
            for latent in latents.split(1)
        )
        return np.concatenate([*views])

    def small(self, latents: Tensor) -> np.ndarray:
        """Renders a view at the training resolution, or 64 pixels high if that is less."""
        return self.drawn(latents, self._height)

    def resolutions(self, latents: Tensor) -> dict[str, np.ndarray]:
        """Renders views 32, 64 and 256 pixels high."""
        each = [self.drawn(latents, height) for height in (32, 64, LARGE)]
        return {f"{views.shape[2]} × {views.shape[1]}": views for views in each}

    def turntable(self, latent: Tensor) -> np.ndarray | None:
        """Renders 24 views from a circle."""
        return self._radiance.turntable(self.decoder, latent, _VIEWS, resolution=self._height)[0]

    @property
    def _radiance(self) -> RadianceField:
        assert isinstance(self.signal, RadianceField)
        return self.signal

    @property
    def _height(self) -> int:
        return min(self._radiance.size[0], 64)


class PreviewEasel(Easel):
    """Draws whatever picture a signal of one's own makes of a latent."""

    samples = 24

    def drawn(self, latents: Tensor, pixels: int) -> np.ndarray:
        """Draws the signal's picture, whose size is its own."""
        return np.concatenate([self.signal.images(self.decoder, latent) for latent in latents.split(1)])


_EASELS: dict[str, type[Easel]] = {"image": ImageEasel, "voxels": ShapeEasel, "radiance": ViewEasel}


def easel_of(decoder: MNIFModel) -> Easel:
    """Makes the easel of a model's signal."""
    return _EASELS.get(signal_of_model(decoder).name, PreviewEasel)(decoder)


@dataclass(frozen=True)
class Exhibit:
    """One sample of the gallery.

    Attributes:
        number: of the sample, as `mnif sample` counts.
        latent: [1, D].
        picture: [H, W, 3].
        nearest: what the nearest training latent draws, if the run's table is there.
        nearest_id: of the instance it stands for.
        walk: frames [F, h, w, 3] on the way to the next sample, the last exhibit's to the first.
        turntable: frames [F, h, w, 3], of objects that are seen in views.
        volume: [R, R, R], of shapes.
    """

    number: int
    latent: Tensor
    picture: np.ndarray
    nearest: np.ndarray | None
    nearest_id: str
    walk: np.ndarray
    turntable: np.ndarray | None
    volume: np.ndarray | None

    @property
    def is_empty(self) -> bool:
        """Whether it is a shape without a surface: nothing or everything is inside."""
        return self.volume is not None and not self.volume.min() <= 0 < self.volume.max()


@torch.no_grad()
def drawn_exhibits(
    pipeline: MNIFPipeline, easel: Easel, table: LatentTable | None, seed: int, steps: int
) -> list[Exhibit]:
    """Draws the first samples of ``seed`` in ``steps`` denoising steps, not selected, with what belongs to them."""
    count = easel.samples
    latents = sample_latents(pipeline, seed, range(count), steps)
    pictures = easel.large(latents)
    nearest, ids = _nearest(latents, table) if table is not None else (None, [""] * count)
    neighbours = None if nearest is None else easel.large(nearest)
    walks = easel.small(_between(pipeline, seed, count, steps, easel.frames))
    return [
        Exhibit(
            number=number,
            latent=latents[number : number + 1],
            picture=pictures[number],
            nearest=None if neighbours is None else neighbours[number],
            nearest_id=ids[number],
            walk=walks[number * easel.frames : (number + 1) * easel.frames],
            turntable=easel.turntable(latents[number : number + 1]),
            volume=easel.volume(latents[number : number + 1]),
        )
        for number in range(count)
    ]


def _between(pipeline: MNIFPipeline, seed: int, count: int, steps: int, frames: int) -> Tensor:
    """Draws latents on the sphere's ways from the noise of each sample to that of the next and back to the first."""
    noise = initial_noise(seed, range(count), pipeline.decoder.config.latent_dim)
    fractions = np.linspace(0, 1, frames, endpoint=False)
    ways = [slerp(start, end, fractions) for start, end in zip(noise, np.roll(noise, -1, axis=0), strict=True)]
    return denoised(pipeline, torch.from_numpy(np.concatenate(ways)), steps)


def _nearest(latents: Tensor, table: LatentTable) -> tuple[Tensor, list[str]]:
    """Finds the training latents nearest to ``latents``, standardised as the prior sees them, and their ids."""
    mean, std = table.mean_and_std()
    drawn, train = ((part.cpu() - mean) / std for part in (latents, table.train))
    _, rows = nearest_neighbour_distances(drawn.numpy(), train.numpy())
    trained = table.held_out.logical_not().tolist() if table.held_out.any() else [True] * len(table.ids)
    ids = [id for id, is_trained in zip(table.ids, trained, strict=True) if is_trained]
    return table.train[rows].to(latents.device), [ids[row] for row in rows]


def _shaded(volume: np.ndarray, pixels: int) -> np.ndarray:
    """Shades the surface at 0; white if nothing or everything is above it."""
    inside = volume > 0
    if inside.all() or not inside.any():
        return mesh_preview(np.empty((0, 3)), np.empty((0, 3), dtype=np.int64), pixels)
    return mesh_preview(*mesh_from_values(volume), pixels)
