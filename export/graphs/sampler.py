"""The sampler, noise → values with its denoising steps unrolled; a scheduler in it is a table of numbers."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import torch
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
from latent_prior.scheduler_table import LinearSchedulerTable, linear_scheduler_table
from mnif.models.mnif_model import MNIFModel


def sampler_graph(
    pipeline: MNIFPipeline, steps: LinearSchedulerTable, resolution: Resolution | None
) -> onnx.ModelProto:
    """Builds ``noise`` [batch, latent_dim] → ``values`` [batch, *resolution, channels], batch dynamic.

    Args:
        pipeline: decoder and denoiser.
        steps: its scheduler's (:func:`latent_prior.scheduler_table.linear_scheduler_table`).
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
