"""The forms in which the pipeline hands out what latents stand for: pictures, volumes, meshes and views."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from mnif.meshes import mesh_from_values, mesh_preview
from mnif.modeling import MNIFModel
from mnif.radiance import RadianceField
from mnif.showing import grid_values
from mnif.signal_table import signal_of_model
from mnif.signals import Signal
from mnif.threads import one_thread

OutputType = Literal["pil", "np", "pt", "latent", "volume", "mesh", "views"]
_FORMS_OF_SIGNALS = {"voxels": ("volume", "mesh", "views"), "radiance": ("volume", "views")}
_POINTS_AT_ONCE = 1 << 20  # of grids; bounds the memory of decoding
_PIXELS_OF_A_SHAPE = 256
_ELEVATION = 20.0  # of the cameras, in degrees


def check_form(signal: Signal, output_type: str) -> None:
    """Raises ValueError if what latents of ``signal`` stand for has no such form."""
    kinds = [*get_args(OutputType)[:4], *_FORMS_OF_SIGNALS.get(signal.name, ())]
    if output_type not in kinds:
        raise ValueError(f'output_type "{output_type}": of the signal {signal.name} choose {", ".join(kinds)}')


def in_form(
    decoder: MNIFModel, latents: Tensor, output_type: str, resolution: int | None = None, views: int = 8
) -> Any:
    """What latents stand for.

    Args:
        decoder: the model.
        latents: [B, D].
        output_type: one that :func:`check_form` lets pass.
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


def pictures_of(
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
        yield from (grid_values(decoder, latents[row : row + 1], resolution) for row in chosen)
        return
    with one_thread():
        field = decoder.bake(decoder.coefficients(latents))
    cells = decoder.config.cells**decoder.config.dimensions
    rows = field.rows.view(len(latents), cells, -1)[chosen]
    for part in rows.split(min(at_once, max(_POINTS_AT_ONCE // pixels, 1))):
        values = replace(field, rows=part.flatten(0, 1))(grid.coordinates)
        yield grid.blend(values.view(len(part), cells, *values.shape[1:]))


def _pictures(
    decoder: MNIFModel, signal: Signal, latents: Tensor, resolution: int | None, output_type: str
) -> Tensor | np.ndarray | list[Image.Image]:
    if signal.name == "image":
        images = (torch.cat([*pictures_of(decoder, latents, resolution)]) / 2 + 0.5).clamp(0, 1)
    else:
        images = torch.from_numpy(signal.pictures(decoder, latents)).float() / 255
    if output_type == "pt":
        return images.permute(0, 3, 1, 2)
    array = images.float().cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array


def _volumes(decoder: MNIFModel, latents: Tensor, resolution: int | None) -> Iterator[np.ndarray]:
    for latent in latents.split(1):
        volume = grid_values(decoder, latent, resolution)[0].float().cpu().numpy()
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
