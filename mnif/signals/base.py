"""What a signal is: how an instance is observed, how fields are asked for it, and how well they fit.

Everything that learns latents (``fitting``, ``inner_loop``, ``refinement``) knows signals by this interface alone, so
a new one is a class of its own: see docs/new_signal.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mnif.data.dataset import Dataset
from mnif.models.encoders import PatchEncoder
from mnif.models.io import OwnMemory
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError


@dataclass(frozen=True)
class Observation:
    """What is known of a batch of instances.

    Attributes:
        values: [B, ..., C] in [-1, 1], what was seen.
        query: where it was seen, in a form only the signal knows (a grid, cameras, rays).
        mask: [B, ...], 1 where it was seen and 0 where it was not; None: all of it.
    """

    values: Tensor
    query: Any
    mask: Tensor | None = None

    def errors(self, predictions: Tensor) -> Tensor:
        """Mean squared error of each instance over what was seen of it, [B]; other instances do not enter."""
        squares = (predictions - self.values).square().mean(dim=-1).flatten(1)
        if self.mask is None:
            return squares.mean(dim=1)
        seen = self.mask.flatten(1)
        return (squares * seen).sum(dim=1) / seen.sum(dim=1).clamp_min(1)


class Signal(ABC):
    """A modality. An instance of this class also holds the settings of one model (resolution, cameras, ...).

    Attributes:
        name: as on the command line.
        unit: what one instance is called.
        encoder_class: what :meth:`encoder` makes.
        dimensions: coordinates per point.
        channels: values a field gives per point.
        mirror_axis: of the arrays of a data set and of observed values; None if an instance cannot be mirrored.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    encoder_class: ClassVar[type[OwnMemory]]
    dimensions: int
    channels: int
    mirror_axis: ClassVar[int | None] = None

    @classmethod
    @abstractmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads a data set to learn from; ``options`` are the flags of ``mnif fit`` by name."""

    @classmethod
    @abstractmethod
    def from_data(cls, data: Any, options: Mapping[str, Any]) -> "Signal":
        """The signal that fits ``data``."""

    @abstractmethod
    def load_like(self, source: str) -> Dataset:
        """Reads further data in the form this model was trained on."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The numbers that make this object again: ``type(self)(**settings)``. Stored in the decoder's config."""

    @property
    @abstractmethod
    def grid_resolution(self) -> int | list[int]:
        """Points per axis of the grid that :class:`mnif.models.mnif_model.MNIFModel` decodes to unless told
        otherwise."""

    @abstractmethod
    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """All that is known of a batch of rows (:meth:`mnif.data.dataset.Instances.arrays`, as tensors)."""

    @abstractmethod
    def subsample(self, observation: Observation, generator: torch.Generator | None = None) -> Observation:
        """What one step of learning looks at, drawn at random: the same part of every instance of the batch."""

    @abstractmethod
    def predict(self, decoder: MNIFModel, coefficients: Tensor, observation: Observation) -> Tensor:
        """What the fields of ``coefficients`` [B, cells, layers, M] show there, as ``observation.values``."""

    @abstractmethod
    def encoder(self, latent_dim: int, width: int) -> nn.Module:
        """A network of its own with ``width`` hidden units: observation → latents (:meth:`encode`)."""

    @abstractmethod
    def encode(self, encoder: nn.Module, observation: Observation) -> Tensor:
        """Latents [B, D] from :meth:`encoder`'s network."""

    @abstractmethod
    def pictures(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """Something to look at for each latent: [B, H, W, 3] uint8."""

    @abstractmethod
    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Something to look at for each row of the data: [B, H, W, 3] uint8."""

    def reconstruction_images(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> np.ndarray:
        """What latents show of it, to be laid below :meth:`original_images`: [B, H, W, 3] uint8."""
        return self.pictures(decoder, latents)

    def augmentations(self) -> dict[str, Callable[[Observation], Observation]]:
        """Random changes that leave an instance as likely as before, by the flag of `mnif fit` that asks for it."""
        return {}

    def metrics(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How well latents fit a batch of rows: for each figure (``psnr`` in dB at least) one number per instance."""
        observation = self.observe(batch)
        predictions = self.predict(decoder, decoder.coefficients(latents), observation)
        return {"psnr": psnr(predictions, observation.values)}

    def per_instance_loss(self, decoder: MNIFModel, latents: Tensor, observation: Observation) -> Tensor:
        """Mean squared error of each instance, [B]."""
        return observation.errors(self.predict(decoder, decoder.coefficients(latents), observation))


def psnr(values: Tensor, targets: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio of each instance in dB, [B].

    Args:
        values: [B, ..., C] in about [-1, 1], clipped to it.
        targets: [B, ..., C] in [-1, 1]. The peak is 2, which equals the PSNR of the same values on [0, 1].
        mask: [B, ...], 1 for what counts.
    """
    error = Observation(targets, None, mask).errors(values.clamp(-1, 1)) / 4
    return -10 * torch.log10(error.clamp_min(1e-10))


def intersection_over_union(values: Tensor, targets: Tensor) -> Tensor:
    """Of what lies above 0 in both, over what does in either, for each instance [B]; 1 where neither has anything."""
    inside, truth = (values > 0).flatten(1), (targets > 0).flatten(1)
    common, either = (inside & truth).sum(dim=1), (inside | truth).sum(dim=1)
    return torch.where(either > 0, common / either.clamp_min(1), 1.0)


class GridSignal(Signal):
    """Values on a grid of one, two, three ... axes: pictures, voxels, sound.

    Args:
        resolution: pixels per axis: one number, or one for each axis.
        channels: values per pixel.
        stride: a step of learning looks at every ``stride``-th pixel along each axis, with a random offset.
    """

    encoder_class = PatchEncoder

    def __init__(self, resolution: int | list[int], channels: int, stride: int = 1):
        for pixels in [resolution] if isinstance(resolution, int) else resolution:
            if stride < 1 or pixels % stride:
                raise UserError(f"--stride {stride}: must divide the resolution, {pixels}")
        self.resolution, self.channels, self.stride = resolution, channels, stride

    @property
    def grid_resolution(self) -> int | list[int]:
        """That of the data."""
        return self.resolution

    def settings(self) -> dict[str, Any]:
        """Resolution, channels and stride."""
        return {"resolution": self.resolution, "channels": self.channels, "stride": self.stride}

    def subsample(self, observation: Observation, generator: torch.Generator | None = None) -> Observation:
        """Every ``stride``-th pixel, from a random one on."""
        if self.stride == 1:
            return observation
        phases = list(product(range(self.stride), repeat=self.dimensions))
        phase = phases[int(torch.randint(len(phases), (), generator=generator))]
        taken = (slice(None), *(slice(start, None, self.stride) for start in phase))
        mask = None if observation.mask is None else observation.mask[taken]
        return Observation(observation.values[taken], (self.stride, phase), mask)

    def predict(self, decoder: MNIFModel, coefficients: Tensor, observation: Observation) -> Tensor:
        """Values on the observed grid."""
        stride, phase = observation.query
        return decoder.decode_coefficients(coefficients, decoder.grid(self.resolution, stride, phase))

    def per_instance_loss(self, decoder: MNIFModel, latents: Tensor, observation: Observation) -> Tensor:
        """Mean squared error of each instance, [B], where every field answers for itself.

        A pixel near a border is shown by several cells, and counts in each by its share: the mean of their squared
        errors. That is the squared error of the blended value and what the fields differ by, so neighbours learn to
        agree; see docs/experiments.md.
        """
        stride, phase = observation.query
        grid = decoder.grid(self.resolution, stride, phase)
        field = decoder.bake(decoder.coefficients(latents))
        weights = grid.weights[None]
        if observation.mask is not None:
            weights = weights * grid.gather_points(observation.mask[..., None].to(weights.dtype))[..., 0]
        weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        targets = grid.gather_points(observation.values).flatten(0, 1)
        return field.errors(grid.coordinates, targets, weights.flatten(0, 1)).view(len(latents), -1).sum(dim=1)

    def encoder(self, latent_dim: int, width: int) -> nn.Module:
        """A network over patches of the grid."""
        return PatchEncoder(self.channels, self.resolution, latent_dim, self.dimensions, width=width)

    def encode(self, encoder: nn.Module, observation: Observation) -> Tensor:
        """Latents [B, D] from the whole grid, or from what was seen of it."""
        return encoder(observation.values, observation.mask)

    def on_grid(self, values: Tensor) -> Observation:
        """An observation of the whole grid, [B, ..., C]."""
        return Observation(values, (1, None))


def _mirrored(observation: Observation, axis: int) -> Observation:
    """Half of the instances, at random, with one axis reversed."""
    values = observation.values
    chosen = torch.rand(len(values), *[1] * (values.ndim - 1), device=values.device) < 0.5
    return replace(observation, values=torch.where(chosen, values.flip(axis), values))
