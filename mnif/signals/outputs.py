"""What latents stand for: values on large grids, what a pipeline returns, and the writer that flags ask for."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import OutputWriter, Signal
from mnif.signals.output_flags import OutputFlags
from mnif.signals.registry import signal_of_model
from mnif.utils.devices import sent
from mnif.utils.errors import UserError, check_at_least, require
from mnif.utils.pixels import as_axes
from mnif.utils.process import one_thread

ELEVATION = 20.0
"""Degrees above the horizon at which cameras look at shapes and objects unless told otherwise."""

_WRITER_FLAGS = tuple(field.name for field in fields(OutputFlags))
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")  # of every signal
_POINTS_AT_ONCE = 1 << 20  # of a grid; bounds the memory of decoding


def writer_from_flags(arguments: OutputFlags, signal: Signal) -> OutputWriter:
    """Makes the writer of a signal, with those flags of ``arguments`` that were given.

    Raises:
        UserError: a flag is out of range or does not belong to the signal.
    """
    given = {flag: value for flag in _WRITER_FLAGS if (value := getattr(arguments, flag)) is not None}
    known = {field.name for field in fields(signal.output_writer)}
    for flag in given:
        if flag not in known:
            fits = ", ".join(f"--{name}" for name in _WRITER_FLAGS if name in known) or "none of these flags"
            raise UserError(f"--{flag}: not for the signal of this model, {signal.name}, which takes {fits}")
    if "frames" in given and "turntable" not in given:
        raise UserError(f"--frames {arguments.frames}: say --turntable gif or mp4 too")
    if given.get("turntable") == "mp4":
        require("imageio-ffmpeg", "video", "--turntable mp4")
    return signal.output_writer(**given)


def check_output_type(signal: Signal, output_type: str) -> None:
    """Raises ValueError if what latents of ``signal`` stand for has no such form."""
    types = (*_OUTPUT_TYPES, *signal.output_types)
    if output_type not in types:
        raise ValueError(f'output_type "{output_type}": of the signal {signal.name} choose {", ".join(types)}')


def postprocess(
    decoder: MNIFModel, latents: Tensor, output_type: str, resolution: int | None = None, views: int = 8
) -> Any:
    """Decodes latents to what they stand for.

    Args:
        decoder: the model.
        latents: [B, D].
        output_type: one that :func:`check_output_type` lets pass.
        resolution: of images, of volumes and the meshes of them, or the height of views of radiance fields; default:
            the training resolution, and for the volume of a radiance field 32.
        views: how many of each object.

    Returns:
        - ``"pil"``, ``"np"``, ``"pt"``: images, as a list of PIL images, [B, H, W, C] float32 in [0, 1] or a tensor
          [B, C, H, W] in [0, 1]; of shapes and objects an image of them at a size of its own.
        - ``"latent"``: the latents.
        - ``"volume"``: an array [B, R, R, R] float32 of shapes, above 0 inside; [B, R, R, R, 4] of radiance fields,
          colours in about [-1, 1] and what the signal turns into density.
        - ``"mesh"``: for each shape vertices [V, 3] float32 and faces [F, 3] int64, or None if it has no surface.
        - ``"views"``: for each object a list of PIL images, seen from cameras evenly spaced on a circle.
    """
    signal = signal_of_model(decoder)
    if output_type == "latent":
        return latents
    if output_type not in _OUTPUT_TYPES:
        return signal.decode_as(output_type, decoder, latents, resolution, views)
    images = signal.float_images(decoder, latents, resolution)
    if output_type == "pt":
        return images.permute(0, 3, 1, 2)
    array = images.float().cpu().numpy()
    return DiffusionPipeline.numpy_to_pil(array) if output_type == "pil" else array


def decode_images(
    decoder: MNIFModel,
    latents: Tensor,
    resolution: int | Sequence[int] | None = None,
    at_once: int = 64,
    chosen: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Yields values [n, H, W, C] of images in about [-1, 1], some at a time and fewer of large ones.

    All latents are baked together and a field is evaluated by itself, so that no number depends on ``at_once`` or
    ``chosen``, but memory and time do.

    Args:
        decoder: the model.
        latents: [B, D].
        resolution: pixels per axis, or height and width; default: the training resolution.
        at_once: the largest n.
        chosen: which of the latents to show; default: all.
    """
    grid, everything = decoder.grid(resolution), range(len(latents))
    chosen = [*(everything if chosen is None else chosen)]
    pixels = math.prod(len(first) for first, _, _ in grid.axes)
    if pixels > _POINTS_AT_ONCE:
        yield from (decode_grid(decoder, latents[row : row + 1], resolution) for row in chosen)
        return
    with one_thread():
        field = decoder.bake(decoder.coefficients(latents))
    params = field.params.view(len(latents), decoder.num_cells, -1)
    if chosen != [*everything]:
        params = params[sent(torch.tensor(chosen, dtype=torch.long), params.device)]
    for some in params.split(min(at_once, max(_POINTS_AT_ONCE // pixels, 1))):
        values = replace(field, params=some.flatten(0, 1))(grid.coordinates)
        yield grid.blend(values.view(len(some), decoder.num_cells, *values.shape[1:]))


@torch.no_grad()
def pictures_of_size(decoder: MNIFModel, latents: Tensor, longer: int) -> list[Image.Image]:
    """Decodes pictures with ``longer`` pixels along their longer side, in the aspect and the channels of the data."""
    height, width = as_axes(signal_of_model(decoder).grid_resolution, 2)
    size = [max(round(side * longer / max(height, width)), 1) for side in (height, width)]
    values = torch.cat([*decode_images(decoder, latents, size)])
    return DiffusionPipeline.numpy_to_pil((values / 2 + 0.5).clamp(0, 1).float().cpu().numpy())


def decode_volumes(decoder: MNIFModel, latents: Tensor, resolution: int | None = None) -> Iterator[np.ndarray]:
    """Yields the values of each latent on a cube, float32 [R, R, R, channels], or [R, R, R] of one channel."""
    for latent in latents.split(1):
        volume = decode_grid(decoder, latent, resolution)[0].float().cpu().numpy()
        yield volume[..., 0] if volume.shape[-1] == 1 else volume


@torch.no_grad()
def decode_grid(decoder: MNIFModel, latent: Tensor, resolution: int | Sequence[int] | None = None) -> Tensor:
    """Computes ``decoder(latent, resolution)`` of one latent, a large grid slice by slice so that memory stays small.

    Args:
        decoder: the model.
        latent: [1, D].
        resolution: pixels per axis; default: the training resolution.

    Returns:
        [1, resolution, ..., channels].
    """
    shape = as_axes(decoder.config.resolution if resolution is None else resolution, decoder.config.dimensions)
    if math.prod(shape) <= _POINTS_AT_ONCE:
        return decoder(latent, shape)
    coefficients = decoder.coefficients(latent)
    first, *others = ((torch.arange(n, device=latent.device) + 0.5) * (2 / n) - 1 for n in shape)
    slices = []
    for rows in first.split(max(_POINTS_AT_ONCE // math.prod(shape[1:]), 1)):
        points = torch.cartesian_prod(rows, *others).view(1, -1, len(shape))
        slices.append(decoder.values_at(coefficients, points).view(1, len(rows), *shape[1:], -1))
    return torch.cat(slices, dim=1)


def check_resolution(resolution: Sequence[int] | None, numbers: int, needed: str) -> None:
    """Refuses a ``--resolution`` of more than ``numbers`` numbers, where ``needed`` are, or of less than 1."""
    if resolution is not None and not 1 <= len(resolution) <= numbers:
        raise UserError(f"--resolution {' '.join(map(str, resolution))}: {needed}")
    if resolution is not None and min(resolution) < 1:
        raise UserError(f"--resolution {' '.join(map(str, resolution))}: must be at least 1")


def check_camera(elevation: float, **counts: int) -> None:
    """Refuses an ``--elevation`` that no camera has, and flags that count less than one."""
    check_at_least(1, **counts)
    if not -90 <= elevation <= 90:
        raise UserError(f"--elevation {elevation:g}: must lie between -90 and 90 degrees")
