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
from torch import Tensor, nn

from export.graphs.builder import GraphBuilder
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
from mnif.models.sparse_coefficients import FADE, floor_of
from mnif.models.token_map import TokenMap
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
    coefficients = _coefficients(builder, decoder, latents)
    if resolution is None:
        shape = coefficient_shape(decoder)
        apart = builder.reshape(coefficients, (-1, *(int(size) for size in shape[1:])), "coefficients/apart")
        results = {"coefficients": (apart, shape)}
    else:
        values = decode_on_grid(builder, decoder, coefficients, resolution)
        results = {"values": (values, grid_shape(decoder, resolution))}
    return builder.model("sampler", {"noise": ["batch", decoder.config.latent_dim]}, results)


def _coefficients(builder: GraphBuilder, decoder: MNIFModel, latents: str) -> str:
    """Maps latents [batch, latent_dim] to coefficients [batch, cells · layers · bases], as the model does."""
    scale = decoder.generations[0] ** -0.5
    first, *later = _split_latents(builder, decoder, latents)
    if decoder.coefficient_map is None and decoder.config.mixing == "average":
        first = builder.add("Add", [first, builder.number(1.0)], "coefficients/shifted")
    mapped = _mapped(builder, decoder.coefficient_map, "coefficient_map", first, scale, "coefficients/flat")
    if (active := decoder.config.coefficient_sparsity) is not None:
        mapped = _keep_largest(builder, mapped, decoder.generations[0], active)
    for number, (growth, part) in enumerate(zip(decoder.later, later, strict=True)):
        weights, name = f"later.{number}.coefficient_map", f"coefficients/{number + 1}"
        said = _mapped(builder, growth.coefficient_map, weights, part, scale, f"{name}/said")
        mapped = _grown_coefficients(builder, decoder, number + 1, mapped, said, name)
    if decoder.config.coefficient_form != "shared":
        return mapped
    by_cell = builder.reshape(mapped, (-1, 1, decoder.config.num_bases), "coefficients/shared")
    return builder.add("Concat", [by_cell] * len(decoder.bases), "coefficients/by_layer", axis=1)


def _keep_largest(builder: GraphBuilder, coefficients: str, num_bases: int, active: int) -> str:
    """Shrinks all but ``active`` of each ``num_bases`` to zero, as :mod:`mnif.models.sparse_coefficients` does."""
    name = "coefficients/sparse"
    rows = builder.reshape(coefficients, (-1, num_bases), f"{name}/rows")
    sizes = builder.add("Abs", [rows], f"{name}/sizes")
    place = builder.constant(f"{name}/place", np.array([active], dtype=np.int64))
    largest = builder.largest(sizes, active + 1, f"{name}/largest")
    threshold = builder.add("Gather", [largest, place], f"{name}/threshold", axis=1)
    above = builder.add("Sub", [sizes, threshold], f"{name}/above")
    least = builder.add("Max", [threshold, builder.number(floor_of(torch.float32))], f"{name}/divisor")
    faded = builder.add("Mul", [least, builder.number(FADE)], f"{name}/faded")
    share = builder.add("Div", [above, faded], f"{name}/share")
    share = builder.add("Clip", [share, builder.scalar(0.0), builder.scalar(1.0)], f"{name}/kept")
    return builder.add("Mul", [rows, share], name)


def _split_latents(builder: GraphBuilder, decoder: MNIFModel, latents: str) -> list[str]:
    """Splits latents into the numbers of each generation, [batch, numbers]; each token has some of every one."""
    if not decoder.later:
        return [latents]
    count = decoder.num_tokens
    tokens = builder.reshape(latents, (-1, count, decoder.config.latent_dim // count), "latents/tokens")
    names = [f"latents/of_{number}" for number in range(len(decoder.latent_parts))]
    parts = builder.split(tokens, decoder.latent_parts, names)
    sizes = zip(parts, decoder.latent_parts, strict=True)
    return [builder.reshape(part, (-1, count * numbers), f"{part}/flat") for part, numbers in sizes]


def _grown_coefficients(
    builder: GraphBuilder, decoder: MNIFModel, generation: int, before: str, said: str, name: str
) -> str:
    """Adds what a generation's numbers say to the coefficients before, as :class:`mnif.models.growth.Growth` does."""
    vectors = decoder.num_cells * (1 if decoder.config.coefficient_form == "shared" else len(decoder.bases))
    earlier, added = sum(decoder.generations[:generation]), decoder.generations[generation]
    before = builder.reshape(before, (-1, vectors, earlier), f"{name}/before")
    if decoder.coefficient_map is None:
        new = builder.reshape(said, (-1, vectors, added), f"{name}/new")
    else:
        said = builder.reshape(said, (-1, vectors, earlier + added), f"{name}/apart")
        old, new = builder.split(said, (earlier, added), [f"{name}/old", f"{name}/new"])
        before = builder.add("Add", [before, old], f"{name}/sum")
    every = builder.add("Concat", [before, new], f"{name}/all", axis=2)
    return builder.reshape(every, (-1, vectors * (earlier + added)), f"{name}/flat")


def _mapped(
    builder: GraphBuilder, mapping: nn.Linear | TokenMap | None, weights: str, numbers: str, scale: float, name: str
) -> str:
    """Maps numbers [batch, n] to coefficients times ``scale``; ``weights`` names the map among the decoder's parts."""
    if mapping is None:
        return builder.add("Mul", [numbers, builder.number(scale)], name)
    if isinstance(mapping, TokenMap):
        return builder.add("Mul", [_map_tokens(builder, mapping, weights, numbers), builder.number(scale)], name)
    weight = builder.constant(f"decoder.{weights}.weight", mapping.weight)
    bias = None if mapping.bias is None else builder.constant(f"decoder.{weights}.bias", mapping.bias)
    return builder.linear(numbers, weight, bias, name, scale=scale)


def _map_tokens(builder: GraphBuilder, mapping: TokenMap, weights: str, latents: str) -> str:
    """Maps latents of tokens to coefficients as :class:`mnif.models.token_map.TokenMap` does: a row is a token."""
    parameters = dict(mapping.named_parameters())
    place = weights.replace("coefficient_map", "tokens")

    def weight_named(parameter: str) -> str | None:
        name = f"decoder.{weights}.{parameter}"
        return builder.constant(name, parameters[parameter]) if parameter in parameters else None

    count, heard = mapping.around.shape
    tokens = builder.reshape(latents, (-1, count, mapping.read.in_features // heard), place)
    around = builder.constant("tokens/around", mapping.around.flatten())
    tokens = builder.add("Gather", [tokens, around], f"{place}/heard", axis=1)
    rows = builder.reshape(tokens, (-1, mapping.read.in_features), f"{place}/rows")
    read = builder.constant(f"decoder.{weights}.read.weight", mapping.read.weight)
    hidden = builder.linear(rows, read, weight_named("read.bias"), f"{place}/read")
    hidden = builder.add("Mul", [hidden, builder.add("Sigmoid", [hidden], f"{place}/sigmoid")], f"{place}/silu")
    write = builder.constant(f"decoder.{weights}.write.weight", mapping.write.weight)
    mapped = builder.add("Gemm", [hidden, write], f"{place}/write", transB=1)
    cells = len(mapping.order)
    of_a_cell = mapping.write.out_features * count // cells
    mapped = builder.reshape(mapped, (-1, cells, of_a_cell), f"{place}/by_cell")
    if cells > count:
        order = builder.constant("tokens/order", mapping.order)
        mapped = builder.add("Gather", [mapped, order], f"{place}/in_order", axis=1)
    mapped = builder.reshape(mapped, (-1, cells * of_a_cell), f"{place}/flat")
    bias = weight_named("bias")
    return mapped if bias is None else builder.add("Add", [mapped, bias], f"{place}/coefficients")


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
