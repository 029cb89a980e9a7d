"""A model's graphs in float32, each with fixed inputs and the exact answer in float64.

Exact means: the same model with the same weights, evaluated by PyTorch in float64. What float32 costs PyTorch is
measured along with it, and the tolerance of a graph grows with that.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from export.graphs.model import Resolution, baked_graph, decoder_graph, sampler_graph
from export.graphs.profiles import Profile, baked_profile, batch_profile
from export.graphs.steps import LinearSteps, linear_steps
from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.errors import UserError
from mnif.fields import BakedField
from mnif.modeling import MNIFModel

_REFERENCES = 3  # instances in the reference of a graph with a batch, fewer where their grids are large
_REFERENCE_VALUES = 1 << 17
_REFERENCE_POINTS = 256  # of each cell, in the reference of a baked graph
_BAKED_AT_ONCE = 64
REFERENCED_BAKED = 8  # baked graphs that have a reference; the others are the same graph with other numbers


@dataclass(frozen=True)
class Reference:
    """What a graph must answer.

    Attributes:
        prefix: of the arrays' names in reference.npz.
        inputs: for each input a value, float32.
        outputs: for each output the exact answer, float64.
        float32_error: the largest difference of PyTorch in float32 to it.
        limits: the least and the largest tolerance. The largest stays below half a step of an 8-bit pixel.
    """

    prefix: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    float32_error: float
    limits: tuple[float, float] = (1e-5, 2e-4)

    @property
    def tolerance(self) -> float:
        """The largest absolute difference allowed to a float32 graph: four times what float32 costs PyTorch here."""
        return float(np.clip(4 * self.float32_error, *self.limits))


@dataclass(frozen=True)
class GraphCase:
    """One graph in float32 and what it must answer.

    Attributes:
        name: ``"decoder"``, ``"sampler_4"``, ``"baked_0000"``, ...
        kind: as in :mod:`export.manifest`.
        model: the graph.
        profile: the shapes to build an engine for.
        reference: what it must answer; None for baked graphs after the first few.
        steps: of a sampler.
        instance: what is baked, as the manifest has it.
    """

    name: str
    kind: str
    model: onnx.ModelProto
    profile: Profile
    reference: Reference | None
    steps: int | None = None
    instance: dict[str, Any] | None = None


def reference_of(
    prefix: str,
    inputs: Mapping[str, np.ndarray],
    exact: Mapping[str, Tensor],
    single: Mapping[str, Tensor],
    limits: tuple[float, float] = (1e-5, 2e-4),
) -> Reference:
    """A reference from PyTorch's answers in float64 and in float32.

    Raises:
        UserError: the two differ by more than any tolerance, or are no numbers.
    """
    error = max(float((exact[name] - single[name]).abs().max()) for name in exact)
    if not error <= limits[1]:  # NaN is refused too
        raise UserError(
            f"{prefix}: PyTorch in float32 differs from float64 by {error:.1e}, more than {limits[1]:.0e}; nothing "
            "was written; try another --seed or fewer --num_inference_steps, and check that training did not diverge"
        )
    outputs = {name: answer.numpy() for name, answer in exact.items()}
    return Reference(prefix, dict(inputs), outputs, error, limits)


@torch.no_grad()
def decoder_case(decoder: MNIFModel, latents: Tensor, resolution: Resolution) -> GraphCase:
    """Coefficients → values on a grid; ``latents`` [n, D] make the reference."""
    exact_decoder, model = copy.deepcopy(decoder).double(), decoder_graph(decoder, resolution)
    coefficients = decoder.coefficients(latents[: _reference_count(model)])
    reference = reference_of(
        "decoder",
        {"coefficients": coefficients.numpy()},
        {"values": exact_decoder.decode_coefficients(coefficients.double(), exact_decoder.grid(resolution))},
        {"values": decoder.decode_coefficients(coefficients, decoder.grid(resolution))},
    )
    return GraphCase("decoder", "decoder", model, batch_profile(model), reference)


@torch.no_grad()
def sampler_case(
    pipeline: MNIFPipeline, num_inference_steps: int, resolution: Resolution | None, seed: int
) -> GraphCase:
    """Noise → values on a grid, or coefficients where ``resolution`` is None.

    Raises:
        UserError: the scheduler cannot be exported with so many steps.
    """
    decoder, steps = pipeline.decoder, linear_steps(pipeline.scheduler, num_inference_steps)
    model = sampler_graph(pipeline, steps, resolution)
    noise = initial_noise(seed, range(_reference_count(model)), decoder.config.latent_dim)
    start = torch.from_numpy(noise)
    (latents,) = pipeline(
        latents=start, num_inference_steps=num_inference_steps, output_type="latent", return_dict=False
    )
    exact_decoder = copy.deepcopy(decoder).double()
    exact_latents = _denoised(pipeline, steps, start.double())
    output, single, exact = (
        ("coefficients", decoder.coefficients(latents), exact_decoder.coefficients(exact_latents))
        if resolution is None
        else ("values", decoder(latents, resolution), exact_decoder(exact_latents, resolution))
    )
    # Each of the unrolled steps hands its rounding on to the next.
    name, limits = f"sampler_{num_inference_steps}", (1e-4, 2e-3)
    reference = reference_of(name, {"noise": noise}, {output: exact}, {output: single}, limits)
    return GraphCase(name, "sampler", model, batch_profile(model), reference, steps=len(steps.timesteps))


@torch.no_grad()
def baked_cases(
    decoder: MNIFModel, latents: Tensor, labels: Sequence[dict[str, Any]], resolution: Resolution
) -> Iterator[GraphCase]:
    """Coordinates → values for each of ``latents`` [n, D]; the first :data:`REFERENCED_BAKED` have references."""
    cells = decoder.config.cells**decoder.config.dimensions
    coordinates = decoder.grid(resolution).coordinates.expand(cells, -1, -1)
    points = coordinates.shape[1]
    chosen = torch.linspace(0, points - 1, min(points, _REFERENCE_POINTS)).round().long()
    coordinates = coordinates[:, chosen].contiguous()
    profile = baked_profile(decoder, resolution)
    exact = list(_baked(copy.deepcopy(decoder).double(), latents[:REFERENCED_BAKED].double()))
    for index, (baked, label) in enumerate(zip(_baked(decoder, latents), labels, strict=True)):
        name, reference = f"baked_{index:04d}", None
        if index < len(exact):
            reference = reference_of(
                name,
                {"coordinates": coordinates.numpy()},
                {"values": exact[index](coordinates.double())},
                {"values": baked(coordinates)},
            )
        yield GraphCase(name, "baked", baked_graph(baked), profile, reference, instance=label)


def _baked(decoder: MNIFModel, latents: Tensor) -> Iterator[BakedField]:
    """The field of each of ``latents`` [n, D], many baked at a time."""
    for begin in range(0, len(latents), _BAKED_AT_ONCE):
        some = latents[begin : begin + _BAKED_AT_ONCE]
        fields = decoder.bake(decoder.coefficients(some))
        for rows in fields.rows.chunk(len(some)):
            yield BakedField(fields.shapes, rows, fields.output_sine)


def _denoised(pipeline: MNIFPipeline, steps: LinearSteps, noise: Tensor) -> Tensor:
    """Latents from noise [n, D] float64, in float64."""
    denoiser = copy.deepcopy(pipeline.denoiser).double()
    samples, predictions = [noise], []
    for step, timestep in enumerate(steps.timesteps):
        predictions.append(denoiser(samples[-1], float(timestep)))
        samples.append(torch.stack([weight * each for each, weight in steps.terms(step, samples, predictions)]).sum(0))
    return denoiser.to_latents(samples[-1])


def _reference_count(model: onnx.ModelProto) -> int:
    """Instances in the reference of a graph whose first axis is the batch."""
    values = np.prod([axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim[1:]])
    return int(np.clip(_REFERENCE_VALUES // values, 1, _REFERENCES))
