"""Pictures as a signal: grey, RGB or RGBA values on a grid of two axes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mnif.data.dataset import Dataset
from mnif.data.images import ImageData, load_images
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Observation, _mirrored
from mnif.utils.errors import UserError


class Image(GridSignal):
    """Pictures of 1 (grey), 3 (RGB) or 4 (RGBA) channels."""

    name = "image"
    noun = "picture"
    dimensions = 2
    mirror_axis: ClassVar[int] = 2

    @classmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads pictures (:func:`mnif.data.images.load_images`) at ``resolution``, 32 unless given, with
        ``channels``."""
        return load_images(source, height_and_width(options["resolution"] or [32]), options["channels"])

    @classmethod
    def from_data(cls, data: ImageData, options: Mapping[str, Any]) -> "Image":
        """Takes ``stride``."""
        height, width, channels = data.images.shape[1:]
        return cls(height if height == width else [height, width], channels, options["stride"])

    def load_like(self, source: str) -> Dataset:
        """Pictures of the model's size and channels."""
        size = [self.resolution] if isinstance(self.resolution, int) else self.resolution
        return load_images(source, height_and_width(size), self.channels)

    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """``images`` [B, H, W, C] uint8 → [-1, 1]."""
        return self.on_grid(batch["images"].float() / 127.5 - 1)

    def augmentations(self) -> dict[str, Callable[[Observation], Observation]]:
        """``random_flip`` mirrors half of the pictures left to right, ``random_colours`` reorders channels of RGB."""
        changes = {"random_flip": partial(_mirrored, axis=self.mirror_axis)}
        return changes | ({"random_colours": _recoloured} if self.channels == 3 else {})

    def pictures(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """The pictures, with grey as RGB and transparency laid on white."""
        return _as_rgb(decoder(latents))

    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """The originals, likewise."""
        return _as_rgb(self.observe(batch).values)


def height_and_width(resolution: Sequence[int]) -> int | tuple[int, int]:
    """What ``--resolution`` says of a picture.

    Raises:
        UserError: it is more than two numbers.
    """
    if len(resolution) > 2:
        raise UserError(f"--resolution {' '.join(map(str, resolution))}: one number, or height and width")
    return resolution[0] if len(resolution) == 1 else (resolution[0], resolution[1])


def _recoloured(observation: Observation) -> Observation:
    """Every picture with its channels in a random order."""
    values = observation.values
    order = torch.rand(len(values), 1, 1, values.shape[-1], device=values.device).argsort(dim=-1)
    return replace(observation, values=values.gather(-1, order.expand_as(values)))


def _as_rgb(values: Tensor) -> np.ndarray:
    """Values [B, H, W, 1, 3 or 4] in about [-1, 1] → [B, H, W, 3] uint8."""
    values = values.clamp(-1, 1)
    if values.shape[-1] == 4:
        opacity = values[..., 3:] / 2 + 0.5
        values = values[..., :3] * opacity + (1 - opacity)
    return (values.expand(*values.shape[:-1], 3) * 127.5 + 127.5).round().byte().cpu().numpy()
