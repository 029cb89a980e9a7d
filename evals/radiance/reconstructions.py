"""How well a radiance field shows views it was not given, beside the mean view and the nearest view it was given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from evals.metrics.occupancy import joined, mean_figures
from evals.metrics.reconstruction import SSIM_WINDOW, psnr_per_image, ssim_per_image
from evals.stages import Stages
from mnif.data import Split, ViewData
from mnif.pictures import picture_grid, save_picture
from mnif.progress import progress_bar
from mnif.radiance import RadianceField

_OBJECTS = 64  # of a side, evenly spread; what rendering costs
_SHOWN = 12


@dataclass(frozen=True)
class ViewReconstructions:
    """Measures one model's renderings of a reference.

    Attributes:
        stages: the model.
        data: the reference.
        sides: [N] of :class:`mnif.data.Split`.
        refinement_steps: for latents of objects not trained on.
        pictures: folder for originals above renderings.
    """

    stages: Stages
    data: ViewData
    sides: np.ndarray
    refinement_steps: int
    pictures: Path

    def figures(self) -> dict[str, float]:
        """PSNR in dB and SSIM on [0, 1] of every side that has objects, means over objects with standard errors.

        ``psnr_novel_views_…`` is of the views that the model's ``held_out_views`` keep back from fitting and encoding,
        ``psnr_…`` of up to four of the others. ``…_nearest_…`` shows the picture of the same object whose camera is
        nearest instead; ``…_mean_…`` the mean training object from that camera, if all objects have the same cameras.
        """
        found: dict[str, float] = {}
        for part, side in (("train", Split.TRAIN), ("heldout", Split.HELD_OUT), ("test", Split.TEST)):
            if (self.sides == side).any():
                found |= self._side(part, side)
        return found

    def _side(self, part: str, side: Split) -> dict[str, float]:
        chosen = np.flatnonzero(self.sides == side)
        _, latents = self.stages.latents(self.data, self.sides, side, self.refinement_steps)
        picked = np.unique(np.linspace(0, len(chosen) - 1, min(_OBJECTS, len(chosen))).round().astype(int))
        signal = self.stages.signal
        assert isinstance(signal, RadianceField)
        count = self.data.images.shape[1]
        given = count - signal.held_out_views
        views = {"": np.unique(np.linspace(0, given - 1, min(4, given)).round().astype(int))}
        if signal.held_out_views:
            views["novel_views_"] = np.arange(given, count)
        means = self._mean_views()
        scores: dict[str, list[dict[str, np.ndarray]]] = {}
        shown = []
        for place in progress_bar(picked, desc=f"rendering {part}", unit="object"):
            row = chosen[place]
            for which, numbers in views.items():
                truth = self.data.images[row, numbers] / 255
                drawn = rendered(self.stages, latents[place : place + 1], self.data, row, numbers) / 255
                ways = {"": drawn}
                if which:
                    ways["nearest_"] = self.data.images[row, self._nearest(row, numbers, given)] / 255
                    shown.append((truth[0], drawn[0]))
                if means is not None:
                    ways["mean_"] = means[numbers]
                for way, pictures in ways.items():
                    scores.setdefault(which + way, []).append(_scores(pictures, truth))
        self._save_picture(part, shown)
        found: dict[str, float] = {}
        for name, parts in scores.items():
            found |= mean_figures(joined(parts), f"{name}{part}")
        return found

    def _mean_views(self) -> np.ndarray | None:
        """[V, H, W, 3] in [0, 1] over training objects, or None if their cameras differ."""
        poses = np.asarray(self.data.poses)
        train = np.flatnonzero(self.sides == Split.TRAIN)
        if not len(train) or np.abs(poses - poses[:1]).max() > 1e-4:
            return None
        total = np.zeros(self.data.images.shape[1:])
        for row in train:
            total += self.data.images[row]
        return total / len(train) / 255

    def _nearest(self, row: int, views: np.ndarray, given: int) -> np.ndarray:
        """The given view of the object whose camera stands nearest to each of ``views``."""
        cameras = self.data.poses[row, :, :3, 3]
        return np.linalg.norm(cameras[views, None] - cameras[None, :given], axis=-1).argmin(axis=1)

    def _save_picture(self, part: str, shown: list[tuple[np.ndarray, np.ndarray]]) -> None:
        if not shown:
            return
        some = [shown[row] for row in np.linspace(0, len(shown) - 1, min(_SHOWN, len(shown))).round().astype(int)]
        sheet = np.concatenate([np.stack([pair[0] for pair in some]), np.stack([pair[1] for pair in some])])
        pixels = (sheet * 255).round().astype(np.uint8)
        save_picture(self.pictures / f"novel_views_{part}.png", picture_grid(pixels, columns=len(some)))


@torch.no_grad()
def rendered(stages: Stages, latent: torch.Tensor, data: ViewData, row: int, views: np.ndarray) -> np.ndarray:
    """What a latent [1, D] shows to some of the cameras of an object: [views, H, W, 3] uint8."""
    signal, decoder = stages.signal, stages.decoder
    assert isinstance(signal, RadianceField)
    batch = {name: torch.from_numpy(np.array(array[row : row + 1])) for name, array in data.arrays().items()}
    batch = {name: tensor.to(decoder.device) for name, tensor in batch.items()}
    cameras = signal.observe_views(batch, views.tolist()).query
    colours = signal.render_views(decoder, decoder.coefficients(latent.to(decoder.device)), cameras)[0]
    return (colours.clamp(-1, 1) * 127.5 + 127.5).round().byte().cpu().numpy()


def _scores(pictures: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """One number for an object: the mean over its views."""
    scores = {"psnr": psnr_per_image(pictures, truth)}
    if min(truth.shape[1:3]) >= SSIM_WINDOW:
        scores["ssim"] = ssim_per_image(pictures, truth)
    return {name: values.mean(keepdims=True) for name, values in scores.items()}
