"""A model's graphs, each with a fixed input and PyTorch's answer to it: what a bundle holds and is measured by."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
import torch

from export.engine import Profile
from export.graphs import baked_graph, decoder_graph, sampler_graph
from export.steps import linear_steps
from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.cells import axis_cells
from mnif.fields import BakedField
from mnif.modeling import MNIFModel

_BATCHES = (1, 8, 64)  # smallest, best and largest batch of an engine
_REFERENCE_SAMPLES = 3
_ENLARGEMENT = 4  # a baked engine evaluates pictures up to this many times the resolution


@dataclass(frozen=True)
class GraphCase:
    """One graph and what it must answer.

    Attributes:
        name: ``"decoder"``, ``"sampler"``, ``"baked_0000"``, ...
        model: the graph, with one input and one output.
        array: a value of the input.
        expected: PyTorch's output for it.
        tolerance: the largest difference allowed; values lie in about [-1, 1].
        profile: the shapes to build an engine for.
    """

    name: str
    model: onnx.ModelProto
    array: np.ndarray
    expected: np.ndarray
    tolerance: float
    profile: Profile

    def parity(self) -> float:
        """Checks the graph by ONNX's rules and runs it: max |ONNX Runtime - PyTorch| over the output."""
        onnx.checker.check_model(self.model, full_check=True)
        session = onnxruntime.InferenceSession(self.model.SerializeToString(), providers=["CPUExecutionProvider"])
        (answer,) = session.run(None, {self.model.graph.input[0].name: self.array})
        return float(np.abs(answer - self.expected).max())


@torch.no_grad()
def graph_cases(
    pipeline: MNIFPipeline, num_baked: int, num_inference_steps: int, resolution: int, seed: int
) -> Iterator[GraphCase]:
    """The decoder's graph, the sampler's, and those of the first baked samples.

    Args:
        pipeline: on the CPU, in float32.
        num_baked: how many samples of ``seed`` are baked, from sample 0.
        num_inference_steps: of the sampler, at least 1.
        resolution: pixels per axis of decoder and sampler, at least 1.
        seed: of the noise.

    Raises:
        UserError: the resolution is below 1, or the scheduler cannot be exported.
    """
    decoder = pipeline.decoder
    steps = linear_steps(pipeline.scheduler, num_inference_steps)
    noise = initial_noise(seed, range(max(_REFERENCE_SAMPLES, num_baked)), decoder.config.latent_dim)
    (latents,) = pipeline(
        latents=torch.from_numpy(noise),
        num_inference_steps=num_inference_steps,
        output_type="latent",
        return_dict=False,
    )
    coefficients = decoder.coefficients(latents)
    values = decoder(latents[:_REFERENCE_SAMPLES], resolution).numpy()
    first = coefficients[:_REFERENCE_SAMPLES].numpy()
    tolerance = _tolerance(decoder, latents[:_REFERENCE_SAMPLES], values, resolution)
    yield _batched("decoder", decoder_graph(decoder, resolution), first, values, tolerance)
    model = sampler_graph(pipeline, steps, resolution)
    # Each of the unrolled steps hands its rounding on to the next.
    yield _batched("sampler", model, noise[:_REFERENCE_SAMPLES], values, 10 * tolerance)
    for index in range(num_baked):
        field = decoder.bake(coefficients[index : index + 1])
        yield _baked(f"baked_{index:04d}", decoder, field, resolution, tolerance)


def _tolerance(decoder: MNIFModel, latents: torch.Tensor, values: np.ndarray, resolution: int) -> float:
    """Four times what float32 itself costs PyTorch here, which grows with the fields' frequencies.

    At least 1e-5; at most 2e-4, so that even ten times as much stays below half a step of an 8-bit pixel.
    """
    exact = copy.deepcopy(decoder).double()(latents.double(), resolution).numpy()
    return float(np.clip(4 * np.abs(values - exact).max(), 1e-5, 2e-4))


def _batched(name: str, model: onnx.ModelProto, array: np.ndarray, values: np.ndarray, tolerance: float) -> GraphCase:
    least, best, most = ((batch, *array.shape[1:]) for batch in _BATCHES)
    profile = Profile(model.graph.input[0].name, least, best, most)
    return GraphCase(name, model, array, values, tolerance, profile)


def _baked(name: str, decoder: MNIFModel, field: BakedField, resolution: int, tolerance: float) -> GraphCase:
    config = decoder.config
    cells = config.cells**config.dimensions
    coordinates = decoder.grid(resolution).coordinates.expand(cells, -1, -1)
    enlarged = axis_cells(_ENLARGEMENT * resolution, config.cells, config.overlap).coordinates.shape[1]
    points = (1, coordinates.shape[1], enlarged**config.dimensions)
    least, best, most = ((cells, count, config.dimensions) for count in points)
    profile = Profile("coordinates", least, best, most)
    array = np.ascontiguousarray(coordinates.numpy())
    return GraphCase(name, baked_graph(field), array, field(coordinates).numpy(), tolerance, profile)
