"""What a latent stands for, as files and as what the pipeline hands out, for each signal in its own way."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.files import was_written
from mnif.utils.meshes import mesh_from_values, mesh_preview, save_mesh
from mnif.utils.pixels import save_animation, save_image, to_uint8
from mnif.utils.process import one_thread

Animation = Literal["gif", "mp4"]


MeshFormat = Literal["glb", "obj", "ply", "stl"]


_POINTS_AT_ONCE = 1 << 20  # of a grid; bounds the memory of decoding


_PIXELS_OF_A_SHAPE = 256


_AZIMUTH_OF_A_SHAPE = 35.0  # degrees from +z towards +x


@dataclass(frozen=True)
class OutputWriter(ABC):
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
class PreviewWriter(OutputWriter):
    """Of a signal of one's own: the picture that the signal makes of a latent."""

    def files(self, name: str) -> list[str]:
        """A picture."""
        return [f"{name}.png"]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes the picture."""
        save_image(output / f"{name}.png", signal.pictures(decoder, latent)[0])
        return None


@dataclass(frozen=True)
class ImageWriter(OutputWriter):
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
        pixels = to_uint8(decode_grid(decoder, latent, scalar_or_list(self.resolution)))[0]
        save_image(output / f"{name}.png", pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return None


@dataclass(frozen=True)
class MeshWriter(OutputWriter):
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
        values = decode_grid(decoder, latent, scalar_or_list(self.resolution))[0, ..., 0].float().cpu().numpy()
        if values.max() <= 0 or values.min() > 0:
            return "empty" if values.max() <= 0 else "full"
        mesh = mesh_from_values(values)
        picture, surface, *animation = (output / file for file in self.files(name))
        if not was_written(picture):
            save_image(picture, mesh_preview(*mesh, _PIXELS_OF_A_SHAPE, _AZIMUTH_OF_A_SHAPE, self.elevation))
        if not was_written(surface):
            save_mesh(surface, *mesh)
        if animation and not was_written(animation[0]):
            azimuths = np.arange(self.frames) * (360 / self.frames)
            turned = [mesh_preview(*mesh, _PIXELS_OF_A_SHAPE, azimuth, self.elevation) for azimuth in azimuths]
            save_animation(animation[0], np.stack(turned))
        return None


@dataclass(frozen=True)
class ViewWriter(OutputWriter):
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
                    save_image(path, picture)
        if animation and not was_written(animation[0]):
            save_animation(animation[0], signal.turntable(decoder, latent, self.frames, self.elevation, height)[0])
        return None


_WRITERS: dict[str, type[OutputWriter]] = {"image": ImageWriter, "voxels": MeshWriter, "radiance": ViewWriter}


def writer_class(signal: str) -> type[OutputWriter]:
    """How latents of a signal are shown, by the signal's name."""
    return _WRITERS.get(signal, PreviewWriter)


@torch.no_grad()
def decode_grid(decoder: MNIFModel, latent: Tensor, resolution: int | Sequence[int] | None = None) -> Tensor:
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


def scalar_or_list(resolution: list[int] | None) -> int | list[int] | None:
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


OutputType = Literal["pil", "np", "pt", "latent", "volume", "mesh", "views"]


_OUTPUT_TYPES_OF_SIGNALS = {"voxels": ("volume", "mesh", "views"), "radiance": ("volume", "views")}


_ELEVATION = 20.0  # of the cameras, in degrees


def check_output_type(signal: Signal, output_type: str) -> None:
    """Raises ValueError if what latents of ``signal`` stand for has no such form."""
    kinds = [*get_args(OutputType)[:4], *_OUTPUT_TYPES_OF_SIGNALS.get(signal.name, ())]
    if output_type not in kinds:
        raise ValueError(f'output_type "{output_type}": of the signal {signal.name} choose {", ".join(kinds)}')


def postprocess(
    decoder: MNIFModel, latents: Tensor, output_type: str, resolution: int | None = None, views: int = 8
) -> Any:
    """What latents stand for.

    Args:
        decoder: the model.
        latents: [B, D].
        output_type: one that :func:`check_output_type` lets pass.
        resolution: of pictures, of volumes and the meshes of them, or the height of views of radiance fields; default:
            the training resolution, and for the volume of a radiance field 32.
        views: how many of each object.

    Returns:
        - ``"pil"``, ``"np"``, ``"pt"``: pictures, as a list of PIL images, [B, H, W, C] float32 in [0, 1] or a tensor
          [B, C, H, W] in [0, 1]; of shapes and objects a picture of them at a size of its own.
        - ``"latent"``: the latents.
        - ``"volume"``: an array [B, R, R, R] float32 of shapes, above 0 inside; [B, R, R, R, 4] of radiance fields,
          colours in about [-1, 1] and what the signal turns into density.
        - ``"mesh"``: for each shape vertices [V, 3] float32 and faces [F, 3] int64, or None if it has no surface.
        - ``"views"``: for each object a list of PIL images, seen from cameras evenly spaced on a circle.
    """
    signal = signal_of_model(decoder)
    if output_type == "latent":
        return latents
    if output_type in ("pil", "np", "pt"):
        return _pictures(decoder, signal, latents, resolution, output_type)
    if output_type == "views" and isinstance(signal, RadianceField):
        objects = [signal.turntable(decoder, latent, views, _ELEVATION, resolution)[0] for latent in latents.split(1)]
        return [[Image.fromarray(view) for view in pictures] for pictures in objects]
    volumes = _volumes(decoder, latents, resolution)
    if output_type == "volume":
        return np.stack([*volumes])
    meshes = [_mesh(volume) for volume in volumes]
    return meshes if output_type == "mesh" else [_views_of_shape(mesh, views) for mesh in meshes]


def decode_images(
    decoder: MNIFModel,
    latents: Tensor,
    resolution: int | list[int] | None = None,
    at_once: int = 64,
    chosen: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Values [n, H, W, C] of pictures in about [-1, 1], some at a time and fewer of large ones.

    All latents are baked together and a field is evaluated by itself, so that no number depends on ``at_once`` or
    ``chosen``, but memory and time do.

    Args:
        decoder: the model.
        latents: [B, D].
        resolution: pixels per axis, or height and width; default: the training resolution.
        at_once: the largest n.
        chosen: which of the latents to show; default: all.
    """
    grid, chosen = decoder.grid(resolution), list(range(len(latents)) if chosen is None else chosen)
    pixels = math.prod(len(first) for first, _, _ in grid.axes)
    if pixels > _POINTS_AT_ONCE:
        yield from (decode_grid(decoder, latents[row : row + 1], resolution) for row in chosen)
        return
    with one_thread():
        field = decoder.bake(decoder.coefficients(latents))
    cells = decoder.config.cells**decoder.config.dimensions
    rows = field.params.view(len(latents), cells, -1)[chosen]
    for part in rows.split(min(at_once, max(_POINTS_AT_ONCE // pixels, 1))):
        values = replace(field, params=part.flatten(0, 1))(grid.coordinates)
        yield grid.blend(values.view(len(part), cells, *values.shape[1:]))


def _pictures(
    decoder: MNIFModel, signal: Signal, latents: Tensor, resolution: int | None, output_type: str
) -> Tensor | np.ndarray | list[Image.Image]:
    if signal.name == "image":
        images = (torch.cat([*decode_images(decoder, latents, resolution)]) / 2 + 0.5).clamp(0, 1)
    else:
        images = torch.from_numpy(signal.pictures(decoder, latents)).float() / 255
    if output_type == "pt":
        return images.permute(0, 3, 1, 2)
    array = images.float().cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array


def _volumes(decoder: MNIFModel, latents: Tensor, resolution: int | None) -> Iterator[np.ndarray]:
    for latent in latents.split(1):
        volume = decode_grid(decoder, latent, resolution)[0].float().cpu().numpy()
        yield volume[..., 0] if volume.shape[-1] == 1 else volume


def _mesh(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    inside = volume > 0
    return mesh_from_values(volume) if inside.any() and not inside.all() else None


def _views_of_shape(mesh: tuple[np.ndarray, np.ndarray] | None, views: int) -> list[Image.Image]:
    """Shaded pictures of a mesh; white ones where there is none."""
    vertices, faces = mesh if mesh is not None else (np.empty((0, 3)), np.empty((0, 3), dtype=np.int64))
    azimuths = np.arange(views) * (360 / views)
    return [
        Image.fromarray(mesh_preview(vertices, faces, _PIXELS_OF_A_SHAPE, azimuth, _ELEVATION)) for azimuth in azimuths
    ]


_FLAGS_OF_SIGNALS = ("resolution", "mesh", "turntable", "frames", "elevation", "views")


def writer_from_flags(arguments: Any, signal: Signal) -> OutputWriter:
    """How this signal is shown, with those flags of ``arguments`` that were given.

    Raises:
        UserError: a flag is out of range or does not belong to the signal.
    """
    given = {flag: value for flag in _FLAGS_OF_SIGNALS if (value := getattr(arguments, flag)) is not None}
    kind: Any = writer_class(signal.name)
    known = {field.name for field in fields(kind)}
    for flag in given:
        if flag not in known:
            fits = ", ".join(f"--{name}" for name in _FLAGS_OF_SIGNALS if name in known) or "none of these flags"
            raise UserError(f"--{flag}: not for the signal of this model, {signal.name}, which takes {fits}")
    if "frames" in given and "turntable" not in given:
        raise UserError(f"--frames {arguments.frames}: say --turntable gif or mp4 too")
    return kind(**given)
