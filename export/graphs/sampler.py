"""The sampler, noise → values with its denoising steps unrolled; a scheduler in it is a table of numbers.

Deterministic diffusers schedulers (DDIM, UniPC, DPM-Solver++, flow matching with Euler or Heun steps, ...) make the
next sample as a weighted sum of recent samples and predictions, with weights that depend on the step alone. The
weights are found by watching the scheduler at work: it is stepped through random samples and predictions, and each
step is explained by least squares from what it may have used. A step with noise of its own, or with clipping, leaves a
residual and is refused, so no scheduler needs to be known by name.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import onnx
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from export.graphs.builder import GraphBuilder
from export.graphs.coefficients import coefficients_of
from export.graphs.denoisers import denoise
from export.graphs.fields import (
    Resolution,
    all_layers,
    baked_profile,
    batch_profile,
    coefficient_shape,
    decode_on_grid,
    evaluate_layers,
    grid_shape,
    reference_count,
)
from export.graphs.specs import GraphSpec, profile_of, reference_of
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from latent_prior.schedulers import scales_samples
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError

T = TypeVar("T")

_LAGS = 3


# What a step may use, the likeliest first: (0 for samples or 1 for predictions, lag).
_PLACES = [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2), (0, 2)]

_ELEMENTS = 512

_LOUDNESS = 100.0  # far beyond any range a scheduler clips to

_TOLERANCE = 1e-5  # schedulers count in float32

_NOTHING = 1e-9  # what rounding leaves of a weight that is zero


@dataclass(frozen=True)
class LinearSchedulerTable:
    """Denoising as x[i+1] = Σ sample_weights[i, k] · x[i-k] + Σ prediction_weights[i, k] · m[i-k].

    Attributes:
        timesteps: [steps] float64, what the denoiser is told at each step, 0 to 1000.
        sample_weights: [steps, 3] float64, of the current sample x[i] and the two before it.
        prediction_weights: [steps, 3] float64, of the denoiser's current prediction m[i] and the two before it.
    """

    timesteps: np.ndarray
    sample_weights: np.ndarray
    prediction_weights: np.ndarray

    def terms(self, step: int, samples: list[T], predictions: list[T]) -> list[tuple[T, float]]:
        """Lists what the next sample is the sum of: (item, weight) pairs, those with weight zero left out.

        Args:
            step: i, from 0.
            samples: x[0] ... x[i], of any kind.
            predictions: m[0] ... m[i], of the same kind.
        """
        return [
            (history[-1 - lag], float(weight))
            for history, weights in ((samples, self.sample_weights), (predictions, self.prediction_weights))
            for lag, weight in enumerate(weights[step])
            if weight != 0
        ]


def linear_scheduler_table(scheduler: SchedulerMixin, num_inference_steps: int) -> LinearSchedulerTable:
    """Reads off a scheduler's weights; the scheduler itself and torch's random state stay as they are.

    Args:
        scheduler: of diffusers.
        num_inference_steps: at least 1. A second-order scheduler may take more steps than that.

    Raises:
        UserError: the scheduler refuses the number of steps, draws noise, clips, or looks back further than two steps.
    """
    name = type(scheduler).__name__
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps {num_inference_steps}: at least 1 step is needed")
    if scales_samples(scheduler):
        raise UserError(
            f"scheduler {name} cannot be exported: it scales what the denoiser is given; use DDIMScheduler or "
            "UniPCMultistepScheduler"
        )
    scheduler = copy.deepcopy(scheduler)
    with torch.random.fork_rng(devices=[]):
        try:
            scheduler.set_timesteps(num_inference_steps)
            samples, predictions = _trajectory(scheduler)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"scheduler {name}, {num_inference_steps} steps: {str(error).splitlines()[0]}") from None

    steps = len(predictions)
    weights = np.zeros((2, steps, _LAGS))
    for step in range(steps):
        for order in range(2, len(_PLACES) + 1):
            used = [place for place in _PLACES[:order] if place[1] <= step]
            columns = np.stack([(samples, predictions)[kind][step - lag] for kind, lag in used], axis=1)
            solution, *_ = np.linalg.lstsq(columns, samples[step + 1], rcond=None)
            residual = np.abs(columns @ solution - samples[step + 1]).max()
            if residual <= _TOLERANCE * np.abs(columns).max():
                break
        else:
            raise UserError(
                f"scheduler {name} cannot be exported: step {step} draws noise, clips, or looks too far back; use "
                "DDIMScheduler or UniPCMultistepScheduler, with clip_sample and thresholding off"
            )
        for (kind, lag), weight in zip(used, solution, strict=True):
            weights[kind, step, lag] = weight if abs(weight) > _NOTHING else 0.0
    return LinearSchedulerTable(
        timesteps=scheduler.timesteps.double().numpy(),
        sample_weights=weights[0],
        prediction_weights=weights[1],
    )


def _trajectory(scheduler: SchedulerMixin) -> tuple[np.ndarray, np.ndarray]:
    """Runs on random predictions: samples [steps + 1, elements] and predictions [steps, elements]."""
    random = np.random.default_rng(0)
    timesteps = scheduler.timesteps
    predictions = random.standard_normal((len(timesteps), _ELEMENTS)) * _LOUDNESS
    samples = [random.standard_normal(_ELEMENTS) * _LOUDNESS]
    for timestep, prediction in zip(timesteps, predictions, strict=True):
        sample, output = (torch.from_numpy(row).view(1, -1, 1) for row in (samples[-1], prediction))
        samples.append(scheduler.step(output, timestep, sample).prev_sample.double().flatten().numpy())
    return np.stack(samples), predictions


def sampler_graph(
    pipeline: MNIFPipeline, steps: LinearSchedulerTable, resolution: Resolution | None
) -> onnx.ModelProto:
    """Builds ``noise`` [batch, latent_dim] → ``values`` [batch, *resolution, channels], batch dynamic.

    Args:
        pipeline: decoder and denoiser.
        steps: its scheduler's (:func:`export.graphs.sampler.linear_scheduler_table`).
        resolution: pixels per axis; None ends the graph at ``coefficients`` [batch, cells, layers, bases].

    Raises:
        UserError: the resolution is below 1.
    """
    decoder, denoiser = pipeline.decoder, pipeline.denoiser
    builder = GraphBuilder()
    samples = ["noise"]
    predictions: list[str] = []
    for step, timestep in enumerate(steps.timesteps):
        predictions.append(denoise(builder, denoiser, samples[-1], float(timestep), f"step_{step}"))
        samples.append(builder.weighted_sum(steps.terms(step, samples, predictions), f"step_{step}/next"))

    spread = builder.constant("denoiser.latent_std", denoiser.latent_std)
    mean = builder.constant("denoiser.latent_mean", denoiser.latent_mean)
    latents = builder.add("Add", [builder.add("Mul", [samples[-1], spread], "latents/spread"), mean], "latents")
    coefficients = coefficients_of(builder, decoder, latents)
    if resolution is None:
        shape = coefficient_shape(decoder)
        apart = builder.reshape(coefficients, (-1, *(int(size) for size in shape[1:])), "coefficients/apart")
        results = {"coefficients": (apart, shape)}
    else:
        values = decode_on_grid(builder, decoder, coefficients, resolution)
        results = {"values": (values, grid_shape(decoder, resolution))}
    return builder.model("sampler", {"noise": ["batch", decoder.config.latent_dim]}, results)


@torch.no_grad()
def sampler_spec(
    pipeline: MNIFPipeline, num_inference_steps: int, resolution: Resolution | None, seed: int
) -> GraphSpec:
    """Specifies noise → values on a grid, or coefficients where ``resolution`` is None.

    Raises:
        UserError: the scheduler cannot be exported with so many steps.
    """
    decoder, steps = pipeline.decoder, linear_scheduler_table(pipeline.scheduler, num_inference_steps)
    model = sampler_graph(pipeline, steps, resolution)
    noise = initial_noise(seed, range(reference_count(model)), decoder.config.latent_dim)
    start = torch.from_numpy(noise)
    (latents,) = pipeline(
        latents=start, num_inference_steps=num_inference_steps, output_type="latent", return_dict=False
    )
    exact_decoder = copy.deepcopy(decoder).double()
    exact_latents = _denoise_exactly(pipeline, steps, start.double())
    output, single, exact = (
        ("coefficients", decoder.coefficients(latents), exact_decoder.coefficients(exact_latents))
        if resolution is None
        else ("values", decoder(latents, resolution), exact_decoder(exact_latents, resolution))
    )
    # Each of the unrolled steps hands its rounding on to the next.
    name, limits = f"sampler_{num_inference_steps}", (1e-4, 2e-3)
    reference = reference_of(name, {"noise": noise}, {output: exact}, {output: single}, limits)
    scheduler = type(pipeline.scheduler).__name__
    return GraphSpec(name, "sampler", model, batch_profile(model), reference, len(steps.timesteps), scheduler)


def _denoise_exactly(pipeline: MNIFPipeline, steps: LinearSchedulerTable, noise: Tensor) -> Tensor:
    """Draws latents from noise [n, D] in float64."""
    denoiser = copy.deepcopy(pipeline.denoiser).double()
    samples, predictions = [noise], []
    for step, timestep in enumerate(steps.timesteps):
        predictions.append(denoiser(samples[-1], float(timestep)))
        samples.append(torch.stack([weight * each for each, weight in steps.terms(step, samples, predictions)]).sum(0))
    return denoiser.to_latents(samples[-1])


_LARGEST_BATCH = 4  # of *field*, whose points are many

_REFERENCES = 2  # instances

_REFERENCE_POINTS = 256  # of each cell


def prior_spec(pipeline: MNIFPipeline, num_inference_steps: int, seed: int, name: str) -> GraphSpec:
    """Specifies the sampler that ends with coefficients, for a browser.

    Raises:
        UserError: the scheduler cannot be exported with so many steps.
    """
    return replace(sampler_spec(pipeline, num_inference_steps, None, seed), name=name, kind="prior")


@torch.no_grad()
def browser_specs(
    pipeline: MNIFPipeline, num_inference_steps: int, resolution: Resolution, seed: int
) -> Iterator[GraphSpec]:
    """Yields *prior* and *field* with fixed inputs and exact answers.

    Raises:
        UserError: the scheduler cannot be exported with so many steps.
    """
    yield prior_spec(pipeline, num_inference_steps, seed, "prior")
    noise = initial_noise(seed, range(_REFERENCES), pipeline.decoder.config.latent_dim)
    coefficients = pipeline.decoder.coefficients(pipeline.denoiser.to_latents(torch.from_numpy(noise)))
    yield _field_spec(pipeline.decoder, coefficients, resolution, seed)


def _field_spec(decoder: MNIFModel, coefficients: Tensor, resolution: Resolution, seed: int) -> GraphSpec:
    """Specifies *field*, asked at places all over the cells."""
    shape = (decoder.num_cells, _REFERENCE_POINTS, decoder.config.dimensions)
    places = torch.from_numpy(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))
    exact = copy.deepcopy(decoder).double().bake(coefficients.double())(places.double())
    by_cell = (len(coefficients), *shape[:2], decoder.config.channels)
    reference = reference_of(
        "field",
        {"coefficients": coefficients.numpy(), "coordinates": places.numpy()},
        {"values": exact.view(by_cell)},
        {"values": decoder.bake(coefficients)(places).view(by_cell)},
    )
    model, coordinates = field_graph(decoder), baked_profile(decoder, resolution)["coordinates"]
    sizes = {
        size: {"batch": batch, "points": coordinates[size][1]}
        for size, batch in (("minimum", 1), ("optimum", 1), ("maximum", _LARGEST_BATCH))
    }
    return GraphSpec("field", "field", model, profile_of(model, **sizes), reference)


def field_graph(decoder: MNIFModel) -> onnx.ModelProto:
    """Builds ``coefficients``, ``coordinates`` → ``values``, batch and points dynamic.

    They are [batch, cells, layers, bases], [cells, points, dimensions] in each cell's own [-1, 1], and
    [batch, cells, points, channels].
    """
    builder = GraphBuilder()
    points = builder.unsqueeze("coordinates", [0], "coordinates_of_all")
    layers = all_layers(builder, decoder, "coefficients")
    values = evaluate_layers(builder, points, layers, decoder.config.output_sine)
    cells, config = decoder.num_cells, decoder.config
    return builder.model(
        "field",
        {"coefficients": coefficient_shape(decoder), "coordinates": [cells, "points", config.dimensions]},
        {"values": (values, ["batch", cells, "points", config.channels])},
    )
