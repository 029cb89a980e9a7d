"""Images as a signal: grey, RGB or RGBA values on a grid of two axes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mnif.data.batches import InstanceGenerator
from mnif.data.dataset import Dataset
from mnif.data.images import IMAGE_SUFFIXES, ImageData, is_hub_folder, load_images
from mnif.data.source import DataSource
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Augmentation, Change, GridSignal, Observation, OutputWriter, Signal, mirror, mirror_half
from mnif.signals.outputs import check_resolution, decode_grid, decode_images
from mnif.utils.errors import UserError
from mnif.utils.pixels import as_axes, save_image, to_uint8

_CELL_PIXELS = 8  # docs/experiments.md has the trials


@dataclass(frozen=True)
class ImageWriter(OutputWriter):
    """Writes a PNG for each latent: grey, RGB or RGBA.

    Args:
        resolution: pixels per axis, or height and width; default: the training resolution.
    """

    array_name = "images"
    resolution: list[int] | None = None

    def __post_init__(self) -> None:
        check_resolution(self.resolution, 2, "one number, or height and width")

    def files(self, name: str) -> list[str]:
        """Names one PNG."""
        return [f"{name}.png"]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes the image."""
        _save(output / f"{name}.png", to_uint8(decode_grid(decoder, latent, self.resolution))[0])
        return None

    def write_each(
        self,
        decoder: MNIFModel,
        signal: Signal,
        latents: Tensor,
        output: Path,
        names: Mapping[int, str],
        batch_size: int,
    ) -> Iterator[str | None]:
        """Writes the images, decoding ``batch_size`` at a time."""
        parts = decode_images(decoder, latents, self.resolution, batch_size, list(names))
        images = (image for part in parts for image in to_uint8(part))
        for name, image in zip(names.values(), images, strict=True):
            _save(output / f"{name}.png", image)
            yield None

    def to_array(self, decoder: MNIFModel, signal: Signal, latents: Tensor, count: int, batch_size: int) -> np.ndarray:
        """Stacks the images: [count, H, W, C] uint8."""
        parts = decode_images(decoder, latents, self.resolution, batch_size, range(count))
        return np.concatenate([to_uint8(part) for part in parts])

    def images(self, decoder: MNIFModel, signal: Signal, latents: Tensor) -> np.ndarray:
        """Decodes the images, with grey as RGB and transparency laid on white."""
        if self.resolution is None:
            return signal.images(decoder, latents)
        return np.concatenate([_as_rgb(part) for part in decode_images(decoder, latents, self.resolution)])


class Image(GridSignal):
    """Images of 1 (grey), 3 (RGB) or 4 (RGBA) channels."""

    name = "image"
    noun = "picture"
    dimensions = 2
    mirror_axis: ClassVar[int] = 2
    output_writer = ImageWriter
    pipeline_tag = "unconditional-image-generation"
    values_note = (
        "Values lie in about [-1, 1]; a pixel is `round(clip(value, -1, 1) * 127.5 + 127.5)`. Coordinate 0 runs "
        "down the rows, coordinate 1 along the columns; the centre of pixel r of n lies at (r + 1/2) / n."
    )

    @classmethod
    def recognizes(cls, source: DataSource) -> bool:
        """Recognizes folders of image files or tar shards, a shard, sets of Hugging Face, and arrays: ``images``, or
        of an image's shape."""
        shape, kind = source.array_shape, source.array_kind  # floats and bits without channels are no pictures
        return (
            source.name.startswith("hf:")
            or is_hub_folder(source.path)
            or "images" in source.array_names
            or (shape is not None and ((len(shape) == 3 and kind == "u") or shape[3:] in ((1,), (3,), (4,))))
            or any(suffix in source.file_suffixes for suffix in (*IMAGE_SUFFIXES, ".tar"))
            or source.suffix == ".tar"
        )

    @classmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads images (:func:`mnif.data.images.load_images`) at ``resolution``, default 32, with ``channels``."""
        return load_images(source, height_and_width(options["resolution"] or [32]), options["channels"])

    @classmethod
    def from_data(cls, data: ImageData, options: Mapping[str, Any]) -> "Image":
        """Takes ``stride``."""
        height, width, channels = data.images.shape[1:]
        return cls(height if height == width else [height, width], channels, options["stride"])

    def default_cells(self) -> int:
        """Cells of about 8 pixels, at least 4 and at most 16 along each axis: 4 up to 32×32, 8 at 64×64."""
        height, width = as_axes(self.resolution, 2)
        return min(max(4, round(math.sqrt(height * width) / _CELL_PIXELS)), 16)

    def load_like(self, source: str) -> Dataset:
        """Reads images at the model's size and channels."""
        height, width = as_axes(self.resolution, 2)
        return load_images(source, (height, width), self.channels)

    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """Maps ``images`` [B, H, W, C] uint8 to [-1, 1]."""
        return self.on_grid(batch["images"].float() / 127.5 - 1)

    def augmentations(self) -> dict[str, Augmentation]:
        """``random_flip`` mirrors half of the images left to right, ``random_colours`` reorders channels of RGB."""
        changes: dict[str, Augmentation] = {"random_flip": partial(mirror_half, axis=self.mirror_axis)}
        return changes | ({"random_colours": _reorder_channels} if self.channels == 3 else {})

    def changes(self) -> dict[str, list[Change]]:
        """Mirrored; and the five other orders of the channels of RGB."""
        changes: dict[str, list[Change]] = {"random_flip": [partial(mirror, axis=self.mirror_axis)]}
        if self.channels == 3:
            _, *others = permutations(range(3))
            changes["random_colours"] = [partial(_in_order, order=order) for order in others]
        return changes

    def images(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """Decodes the images, with grey as RGB and transparency laid on white."""
        return _as_rgb(decoder(latents))

    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Shows the originals in the same way as :meth:`images`."""
        return _as_rgb(self.observe(batch).values)

    def float_images(self, decoder: MNIFModel, latents: Tensor, resolution: int | None) -> Tensor:
        """Decodes the images with the channels that they have, unrounded."""
        return (torch.cat([*decode_images(decoder, latents, resolution)]) / 2 + 0.5).clamp(0, 1)


def height_and_width(resolution: Sequence[int]) -> int | tuple[int, int]:
    """Reads height and width from ``--resolution``, the two or one number for both.

    Raises:
        UserError: it is more than two numbers.
    """
    if len(resolution) > 2:
        raise UserError(f"--resolution {' '.join(map(str, resolution))}: one number, or height and width")
    return resolution[0] if len(resolution) == 1 else (resolution[0], resolution[1])


def _in_order(observation: Observation, order: Sequence[int]) -> Observation:
    """Puts the channels of all images into one order."""
    return replace(observation, values=observation.values[..., list(order)])


def _reorder_channels(observation: Observation, generator: InstanceGenerator) -> Observation:
    """Puts the channels of every image into a random order."""
    values = observation.values
    order = generator.uniform(1, 1, values.shape[-1]).argsort(dim=-1)
    return replace(observation, values=values.gather(-1, order.expand_as(values)))


def _as_rgb(values: Tensor) -> np.ndarray:
    """Values [B, H, W, 1, 3 or 4] in about [-1, 1] → [B, H, W, 3] uint8."""
    values = values.clamp(-1, 1)
    if values.shape[-1] == 4:
        opacity = values[..., 3:] / 2 + 0.5
        values = values[..., :3] * opacity + (1 - opacity)
    return to_uint8(values.expand(*values.shape[:-1], 3))


def _save(path: Path, image: np.ndarray) -> None:
    """Writes [H, W, C] as a PNG, grey without its axis of channels."""
    save_image(path, image[..., 0] if image.shape[-1] == 1 else image)
