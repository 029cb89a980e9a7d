"""What a latent stands for, as files: pictures, meshes and animations, for each signal in its own way."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mnif.animation import save_animation
from mnif.errors import UserError
from mnif.files import was_written
from mnif.meshes import mesh_from_values, mesh_preview, save_mesh
from mnif.modeling import MNIFModel
from mnif.pictures import save_picture, to_pixels
from mnif.radiance import RadianceField
from mnif.signals import Signal

Animation = Literal["gif", "mp4"]
MeshFormat = Literal["glb", "obj", "ply", "stl"]

_POINTS_AT_ONCE = 1 << 20  # of a grid; bounds the memory of decoding
_PIXELS_OF_A_SHAPE = 256
_AZIMUTH_OF_A_SHAPE = 35.0  # degrees from +z towards +x


@dataclass(frozen=True)
class Showing(ABC):
    """How the latents of one signal are shown; the fields of each kind are those flags of `mnif decode` it takes."""

    @abstractmethod
    def files(self, name: str) -> list[str]:
        """What is written for the latent called ``name``, below the output folder; the first is a picture of it."""

    @abstractmethod
    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes those of :meth:`files` that are missing.

        Args:
            decoder: the model.
            signal: the model's.
            latent: [1, D].
            output: the folder.
            name: of the latent.

        Returns:
            None, or why there is nothing to show.
        """


@dataclass(frozen=True)
class Previews(Showing):
    """Of a signal of one's own: the picture that the signal makes of a latent."""

    def files(self, name: str) -> list[str]:
        """A picture."""
        return [f"{name}.png"]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes the picture."""
        save_picture(output / f"{name}.png", signal.pictures(decoder, latent)[0])
        return None


@dataclass(frozen=True)
class Pictures(Showing):
    """Grey, RGB or RGBA pictures.

    Args:
        resolution: pixels per axis, or height and width; default: the training resolution.
    """

    resolution: list[int] | None = None

    def __post_init__(self) -> None:
        _check_resolution(self.resolution, 2, "one number, or height and width")

    def files(self, name: str) -> list[str]:
        """A picture."""
        return [f"{name}.png"]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes the picture."""
        pixels = to_pixels(grid_values(decoder, latent, whole(self.resolution)))[0]
        save_picture(output / f"{name}.png", pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return None


@dataclass(frozen=True)
class Shapes(Showing):
    """The surface where the values of a cube are 0, as a mesh in [-1, 1]³ and shaded.

    Args:
        resolution: values per axis, one number; default: the training resolution.
        mesh: format.
        turntable: format of an animation, if there is to be one.
        frames: of the animation.
        elevation: of the camera, in degrees above the horizon.
    """

    resolution: list[int] | None = None
    mesh: MeshFormat = "glb"
    turntable: Animation | None = None
    frames: int = 48
    elevation: float = 20.0

    def __post_init__(self) -> None:
        _check_resolution(self.resolution, 1, "voxels are cubes; give one number")
        _check_camera(self.elevation, frames=self.frames)

    def files(self, name: str) -> list[str]:
        """A picture, a mesh and an animation."""
        suffixes = ["png", self.mesh, *([self.turntable] if self.turntable else [])]
        return [f"{name}.{suffix}" for suffix in suffixes]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes picture, mesh and animation, unless the shape has no surface."""
        values = grid_values(decoder, latent, whole(self.resolution))[0, ..., 0].float().cpu().numpy()
        if values.max() <= 0 or values.min() > 0:
            return "empty" if values.max() <= 0 else "full"
        mesh = mesh_from_values(values)
        picture, surface, *animation = (output / file for file in self.files(name))
        if not was_written(picture):
            save_picture(picture, mesh_preview(*mesh, _PIXELS_OF_A_SHAPE, _AZIMUTH_OF_A_SHAPE, self.elevation))
        if not was_written(surface):
            save_mesh(surface, *mesh)
        if animation and not was_written(animation[0]):
            azimuths = np.arange(self.frames) * (360 / self.frames)
            turned = [mesh_preview(*mesh, _PIXELS_OF_A_SHAPE, azimuth, self.elevation) for azimuth in azimuths]
            save_animation(animation[0], np.stack(turned))
        return None


@dataclass(frozen=True)
class Objects(Showing):
    """Views of radiance fields from cameras on the turntable's circle.

    Args:
        resolution: the height of a view in pixels, one number; default: the training resolution.
        views: how many.
        turntable: format of an animation, if there is to be one.
        frames: of the animation.
        elevation: of the cameras, in degrees above the horizon.
    """

    resolution: list[int] | None = None
    views: int = 8
    turntable: Animation | None = None
    frames: int = 48
    elevation: float = 20.0

    def __post_init__(self) -> None:
        _check_resolution(self.resolution, 1, "give one number, the height of a view")
        _check_camera(self.elevation, frames=self.frames, views=self.views)

    def files(self, name: str) -> list[str]:
        """A folder of views, with an animation."""
        animation = [f"{name}/turntable.{self.turntable}"] if self.turntable else []
        return [*(f"{name}/{view:03d}.png" for view in range(self.views)), *animation]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes views and animation."""
        assert isinstance(signal, RadianceField)
        height = self.resolution[0] if self.resolution else None
        paths = [output / file for file in self.files(name)]
        views, animation = paths[: self.views], paths[self.views :]
        if not all(map(was_written, views)):
            pictures = signal.turntable(decoder, latent, self.views, self.elevation, height)[0]
            for path, picture in zip(views, pictures, strict=True):
                if not was_written(path):
                    save_picture(path, picture)
        if animation and not was_written(animation[0]):
            save_animation(animation[0], signal.turntable(decoder, latent, self.frames, self.elevation, height)[0])
        return None


_SHOWINGS: dict[str, type[Showing]] = {"image": Pictures, "voxels": Shapes, "radiance": Objects}


def showing_class(signal: str) -> type[Showing]:
    """How latents of a signal are shown, by the signal's name."""
    return _SHOWINGS.get(signal, Previews)


@torch.no_grad()
def grid_values(decoder: MNIFModel, latent: Tensor, resolution: int | Sequence[int] | None = None) -> Tensor:
    """``decoder(latent, resolution)`` of one latent, a large grid slice by slice so that memory stays small.

    Args:
        decoder: the model.
        latent: [1, D].
        resolution: pixels per axis; default: the training resolution.

    Returns:
        [1, resolution, ..., channels].
    """
    resolution = decoder.config.resolution if resolution is None else resolution
    shape = [resolution] * decoder.config.dimensions if isinstance(resolution, int) else list(resolution)
    if math.prod(shape) <= _POINTS_AT_ONCE:
        return decoder(latent, resolution)
    coefficients = decoder.coefficients(latent)
    first, *others = ((torch.arange(n, device=latent.device) + 0.5) * (2 / n) - 1 for n in shape)
    slices = []
    for rows in first.split(max(_POINTS_AT_ONCE // math.prod(shape[1:]), 1)):
        points = torch.cartesian_prod(rows, *others).view(1, -1, len(shape))
        slices.append(decoder.values_at(coefficients, points).view(1, len(rows), *shape[1:], -1))
    return torch.cat(slices, dim=1)


def whole(resolution: list[int] | None) -> int | list[int] | None:
    """One number stands for all axes."""
    return resolution[0] if resolution and len(resolution) == 1 else resolution


def _check_resolution(resolution: list[int] | None, numbers: int, needed: str) -> None:
    if resolution is None:
        return
    given = " ".join(map(str, resolution))
    if not 1 <= len(resolution) <= numbers:
        raise UserError(f"--resolution {given}: {needed}")
    if min(resolution) < 1:
        raise UserError(f"--resolution {given}: must be at least 1")


def _check_camera(elevation: float, **counts: int) -> None:
    for flag, count in counts.items():
        if count < 1:
            raise UserError(f"--{flag} {count}: must be at least 1")
    if not -90 <= elevation <= 90:
        raise UserError(f"--elevation {elevation:g}: must lie between -90 and 90 degrees")
