"""What a signal is: how an instance is observed, how fields are asked for it, how well they fit, how they are shown.

Everything that learns, draws, writes or exports latents knows signals by this interface alone, so a new one is a class
of its own: see docs/new_signal.md.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mnif.data.batches import InstanceGenerator
from mnif.data.dataset import Dataset
from mnif.data.source import DataSource
from mnif.models.encoders import PatchEncoder, TokenEncoder
from mnif.models.io import OwnMemory
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from mnif.utils.json_files import Size
from mnif.utils.pixels import as_axes, save_image


@dataclass(frozen=True)
class Observation:
    """What is known of a batch of instances.

    Attributes:
        values: [B, ..., C] in [-1, 1], what was seen.
        query: where it was seen, in a form only the signal knows (a grid, cameras, rays).
        mask: [B, ...], 1 where it was seen and 0 where it was not; None: all of it.
    """

    values: Float[Tensor, "batch *places channels"]
    query: Any
    mask: Float[Tensor, "batch *places"] | None = None

    def errors(self, predictions: Float[Tensor, "batch *places channels"]) -> Float[Tensor, " batch"]:
        """Computes the mean squared error of each instance over what was seen of it, [B]; others do not enter."""
        squares = (predictions - self.values).square().mean(dim=-1).flatten(1)
        if self.mask is None:
            return squares.mean(dim=1)
        seen = self.mask.flatten(1)
        return (squares * seen).sum(dim=1) / seen.sum(dim=1).clamp_min(1)


Augmentation = Callable[[Observation, InstanceGenerator], Observation]
"""Changes every instance of a batch at random, by what the generator draws for it."""

Change = Callable[[Observation], Observation]
"""Changes every instance of a batch in one and the same way."""


@dataclass(frozen=True)
class OutputWriter(ABC):
    """How latents of a signal become files and arrays; its fields are the flags of `mnif decode` that it takes.

    Attributes:
        array_name: of the array in the `.npz` file that `mnif sample` writes.
    """

    array_name: ClassVar[str]

    @abstractmethod
    def files(self, name: str) -> list[str]:
        """Names the files of the latent called ``name``, below the output folder; an image of it comes first."""

    @abstractmethod
    def write(self, decoder: MNIFModel, signal: "Signal", latent: Tensor, output: Path, name: str) -> str | None:
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

    def write_each(
        self,
        decoder: MNIFModel,
        signal: "Signal",
        latents: Tensor,
        output: Path,
        names: Mapping[int, str],
        batch_size: int,
    ) -> Iterator[str | None]:
        """Writes several latents, and yields for each what :meth:`write` returns.

        Args:
            decoder: the model.
            signal: the model's.
            latents: [B, D].
            output: the folder.
            names: for each row of ``latents`` to be written the latent's name.
            batch_size: how many may be decoded at a time; changes speed and memory, not the result.
        """
        for row, name in names.items():
            yield self.write(decoder, signal, latents[row : row + 1], output, name)

    @abstractmethod
    def to_array(
        self, decoder: MNIFModel, signal: "Signal", latents: Tensor, count: int, batch_size: int
    ) -> np.ndarray:
        """Decodes the first ``count`` of ``latents`` [B, D] to rows of the array called :attr:`array_name`."""

    def images(self, decoder: MNIFModel, signal: "Signal", latents: Tensor) -> np.ndarray:
        """Draws something to look at for each of ``latents`` [B, D], as the flags ask for it: [B, H, W, 3] uint8."""
        return signal.images(decoder, latents)


@dataclass(frozen=True)
class PreviewWriter(OutputWriter):
    """Writes the image that :meth:`Signal.images` makes of a latent: all that is known of a signal of one's own."""

    array_name = "pictures"

    def files(self, name: str) -> list[str]:
        """Names one PNG."""
        return [f"{name}.png"]

    def write(self, decoder: MNIFModel, signal: "Signal", latent: Tensor, output: Path, name: str) -> str | None:
        """Writes the image."""
        save_image(output / f"{name}.png", signal.images(decoder, latent)[0])
        return None

    def to_array(
        self, decoder: MNIFModel, signal: "Signal", latents: Tensor, count: int, batch_size: int
    ) -> np.ndarray:
        """Stacks the images: [count, H, W, 3] uint8."""
        return np.concatenate([signal.images(decoder, latent) for latent in latents[:count].split(1)])


class Signal(ABC):
    """A modality. An instance of this class also holds the settings of one model (resolution, cameras, ...).

    Attributes:
        name: as on the command line.
        noun: what one instance is called.
        encoder_class: what :meth:`encoder` makes.
        token_encoder_class: what :meth:`token_encoder` makes; None if there is no such encoder.
        dimensions: coordinates per point.
        channels: values a field gives per point.
        mirror_axis: of the arrays of a data set and of observed values; None if an instance cannot be mirrored.
        output_writer: what `mnif decode` and `mnif sample` write.
        output_types: what :meth:`decode_as` makes, the ``output_type`` of a pipeline beyond images and latents.
        pipeline_tag: of a model's card on the Hugging Face hub; None if no tag of the hub fits.
        values_note: what a bundle's README says of the values of its fields.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    encoder_class: ClassVar[type[OwnMemory]]
    token_encoder_class: ClassVar[type[OwnMemory] | None] = None
    dimensions: int
    channels: int
    mirror_axis: ClassVar[int | None] = None
    output_writer: ClassVar[type[OutputWriter]] = PreviewWriter
    output_types: ClassVar[tuple[str, ...]] = ()
    pipeline_tag: ClassVar[str | None] = None
    values_note: ClassVar[str] = "Values lie in about [-1, 1]."

    @classmethod
    def recognizes(cls, source: DataSource) -> bool:
        """Whether ``--data`` is of this signal, as far as names and headers tell; asked by ``--signal auto``."""
        return False

    @classmethod
    @abstractmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads a data set to learn from; ``options`` are the flags of ``mnif fit`` by name."""

    @classmethod
    @abstractmethod
    def from_data(cls, data: Any, options: Mapping[str, Any]) -> "Signal":
        """Makes the signal that fits ``data``; ``options`` are the flags of ``mnif fit`` by name."""

    @abstractmethod
    def load_like(self, source: str) -> Dataset:
        """Reads further data in the form this model was trained on."""

    def default_cells(self) -> int:
        """Says how many cells per axis a decoder has where `--cells` is not given: 4."""
        return 4

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Returns what makes this object again, ``type(self)(**settings)``; it is stored in the decoder's config."""

    @property
    @abstractmethod
    def grid_resolution(self) -> int | list[int]:
        """Points per axis of the grid that :class:`mnif.models.mnif_model.MNIFModel` decodes to unless told
        otherwise."""

    @abstractmethod
    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """Gives all that is known of a batch of rows (:meth:`mnif.data.dataset.Dataset.arrays`, as tensors)."""

    def num_views(self, batch: Mapping[str, Tensor]) -> int:
        """Counts the views of each row of a batch; 0 for a signal that is not observed in views."""
        return 0

    def observe_views(self, batch: Mapping[str, Tensor], views: slice | list[int]) -> Observation:
        """Observes some of the views, by number, where :meth:`num_views` is not 0."""
        raise NotImplementedError

    @abstractmethod
    def subsample(self, observation: Observation, generator: torch.Generator | None = None) -> Observation:
        """Draws at random what one step of learning looks at, the same part of every instance of the batch."""

    @abstractmethod
    def predict(
        self, decoder: MNIFModel, coefficients: Float[Tensor, "batch cells layers bases"], observation: Observation
    ) -> Float[Tensor, "batch *places channels"]:
        """Predicts ``observation.values`` from the fields of ``coefficients`` [B, cells, layers, M]."""

    @abstractmethod
    def encoder(self, latent_dim: int, width: int) -> nn.Module:
        """Makes a network with ``width`` hidden units that :meth:`encode` runs: observation → latents."""

    def token_encoder(self, latent_dim: int, tokens: int, width: int) -> nn.Module:
        """Makes what :meth:`encoder` does where latents are ``tokens`` along each axis; only with
        :attr:`token_encoder_class`."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, encoder: nn.Module, observation: Observation) -> Float[Tensor, "batch latent_dim"]:
        """Infers latents [B, D] by a network that :meth:`encoder` or :meth:`token_encoder` made."""

    @abstractmethod
    def images(
        self, decoder: MNIFModel, latents: Float[Tensor, "batch latent_dim"]
    ) -> UInt8[np.ndarray, "batch height width 3"]:
        """Draws something to look at for each latent: [B, H, W, 3] uint8."""

    @abstractmethod
    def original_images(self, batch: Mapping[str, Tensor]) -> UInt8[np.ndarray, "batch height width 3"]:
        """Draws something to look at for each row of the data: [B, H, W, 3] uint8."""

    def reconstruction_images(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Draws what latents show of rows, to be laid below :meth:`original_images`: [B, H, W, 3] uint8."""
        return self.images(decoder, latents)

    def float_images(self, decoder: MNIFModel, latents: Tensor, resolution: int | None) -> Tensor:
        """Makes a pipeline's images, [B, H, W, C] float32 in [0, 1]; here those of :meth:`images`, of one size."""
        return torch.from_numpy(self.images(decoder, latents)).float() / 255

    def decode_as(
        self, output_type: str, decoder: MNIFModel, latents: Tensor, resolution: int | None, views: int
    ) -> Any:
        """Decodes latents [B, D] to one of :attr:`output_types`, as :func:`mnif.signals.outputs.postprocess` says."""
        raise NotImplementedError(output_type)

    def points_per_step(self, decoder: MNIFModel) -> int:
        """Counts the points of one instance that a step of learning evaluates, twice where cells overlap."""
        return decoder.grid().coordinates.shape[1]

    def augmentations(self) -> dict[str, Augmentation]:
        """Returns random changes that leave an instance as likely as before, by the flag of `mnif fit` for each."""
        return {}

    def changes(self) -> dict[str, list[Change]]:
        """Returns all that each of :meth:`augmentations` can make of an instance, but for the instance as it is."""
        return {}

    def metrics(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Measures how latents fit rows: for each metric (``psnr`` in dB at least) one number per instance."""
        observation = self.observe(batch)
        predictions = self.predict(decoder, decoder.coefficients(latents), observation)
        return self.compare(predictions, observation.values)

    def compare(self, predictions: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Measures predictions against observed values, both [B, ..., C]: for each metric one number per instance."""
        return {"psnr": psnr(predictions, values)}

    def per_instance_loss(
        self, decoder: MNIFModel, latents: Float[Tensor, "batch latent_dim"], observation: Observation
    ) -> Float[Tensor, " batch"]:
        """Computes the mean squared error of each instance, [B]."""
        return observation.errors(self.predict(decoder, decoder.coefficients(latents), observation))


def psnr(
    values: Float[Tensor, "batch *places channels"],
    targets: Float[Tensor, "batch *places channels"],
    mask: Float[Tensor, "batch *places"] | None = None,
) -> Float[Tensor, " batch"]:
    """Computes the peak signal-to-noise ratio of each instance in dB, [B].

    Args:
        values: [B, ..., C] in about [-1, 1], clipped to it.
        targets: [B, ..., C] in [-1, 1]. The peak is 2, which equals the PSNR of the same values on [0, 1].
        mask: [B, ...], 1 for what counts.
    """
    error = Observation(targets, None, mask).errors(values.clamp(-1, 1)) / 4
    return -10 * torch.log10(error.clamp_min(1e-10))


def intersection_over_union(
    values: Float[Tensor, "batch *places channels"], targets: Float[Tensor, "batch *places channels"]
) -> Float[Tensor, " batch"]:
    """Divides what is above 0 in both by what is in either, for each instance [B]; 1 where neither has anything."""
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
    token_encoder_class = TokenEncoder

    def __init__(self, resolution: Size | list[Size], channels: Size, stride: Size = 1):
        for pixels in as_axes(resolution, self.dimensions):
            if stride < 1 or pixels % stride:
                raise UserError(f"--stride {stride}: must divide the resolution, {pixels}")
        self.resolution, self.channels, self.stride = resolution, channels, stride

    @property
    def grid_resolution(self) -> int | list[int]:
        """The resolution of the data."""
        return self.resolution

    def settings(self) -> dict[str, Any]:
        """Returns resolution, channels and stride."""
        return {"resolution": self.resolution, "channels": self.channels, "stride": self.stride}

    def subsample(self, observation: Observation, generator: torch.Generator | None = None) -> Observation:
        """Takes every ``stride``-th pixel, from a random one on."""
        if self.stride == 1:
            return observation
        phases = list(product(range(self.stride), repeat=self.dimensions))
        phase = phases[int(torch.randint(len(phases), (), generator=generator))]
        taken = (slice(None), *(slice(start, None, self.stride) for start in phase))
        mask = None if observation.mask is None else observation.mask[taken]
        return Observation(observation.values[taken], (self.stride, phase), mask)

    def predict(
        self, decoder: MNIFModel, coefficients: Float[Tensor, "batch cells layers bases"], observation: Observation
    ) -> Float[Tensor, "batch *places channels"]:
        """Decodes values on the observed grid."""
        stride, phase = observation.query
        return decoder.decode_coefficients(coefficients, decoder.grid(self.resolution, stride, phase))

    def per_instance_loss(
        self, decoder: MNIFModel, latents: Float[Tensor, "batch latent_dim"], observation: Observation
    ) -> Float[Tensor, " batch"]:
        """Computes the mean squared error of each instance, [B], where every field answers for itself.

        A pixel near a border is shown by several cells, and counts in each by its share: the mean of their squared
        errors. That is the squared error of the blended value and what the fields differ by, so neighbours learn to
        agree; see docs/experiments.md.
        """
        return self.errors_of_cells(decoder, decoder.coefficients(latents), observation).sum(dim=1)

    def errors_of_cells(
        self, decoder: MNIFModel, coefficients: Float[Tensor, "batch cells layers bases"], observation: Observation
    ) -> Float[Tensor, "batch cells"]:
        """Computes the part of every cell's field, [B, cells], in the squared error of :meth:`per_instance_loss`."""
        stride, phase = observation.query
        grid = decoder.grid(self.resolution, stride, phase)
        field = decoder.bake(coefficients)
        weights = grid.weights[None]
        if observation.mask is not None:
            weights = weights * grid.gather_points(observation.mask[..., None].to(weights.dtype))[..., 0]
        weights = weights / weights.sum(dim=(1, 2), keepdim=True).clamp_min(1e-12)
        targets = grid.gather_points(observation.values).flatten(0, 1)
        return field.errors(grid.coordinates, targets, weights.flatten(0, 1)).view(len(coefficients), -1)

    def encoder(self, latent_dim: int, width: int) -> nn.Module:
        """Makes a network over patches of the grid."""
        return PatchEncoder(self.channels, self.resolution, latent_dim, self.dimensions, width=width)

    def token_encoder(self, latent_dim: int, tokens: int, width: int) -> nn.Module:
        """Makes a network over patches of the grid, one for each token, and attention among them."""
        return TokenEncoder(self.channels, self.resolution, latent_dim, self.dimensions, tokens, width=width)

    def encode(self, encoder: nn.Module, observation: Observation) -> Float[Tensor, "batch latent_dim"]:
        """Infers latents [B, D] from the whole grid, or from what was seen of it."""
        return encoder(observation.values, observation.mask)

    def points_per_step(self, decoder: MNIFModel) -> int:
        """Counts the points of every cell on the grid that a step looks at."""
        return decoder.grid(self.resolution, self.stride).coordinates.shape[1] * decoder.num_cells

    def on_grid(self, values: Tensor) -> Observation:
        """Makes an observation of the whole grid of ``values`` [B, ..., C]."""
        return Observation(values, (1, None))


def mirror(observation: Observation, axis: int) -> Observation:
    """Reverses one axis of all instances."""
    return replace(observation, values=observation.values.flip(axis))


def mirror_half(observation: Observation, generator: InstanceGenerator, axis: int) -> Observation:
    """Reverses one axis of half of the instances, at random."""
    values = observation.values
    chosen = generator.uniform(*[1] * (values.ndim - 1)) < 0.5
    return replace(observation, values=torch.where(chosen, values.flip(axis), values))
