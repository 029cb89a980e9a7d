"""Two graphs with which a page draws samples at any resolution (`mnif export --browser`, examples/browser).

- *prior*: noise → coefficients, the sampler without its end.
- *field*: coefficients, coordinates → values; which points to ask for, and how cells blend, is left to the caller.

The first runs once for a sample, the second for every picture of it.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import onnx
import torch
from torch import Tensor

from export.graphs.cases import GraphCase, reference_of, sampler_case
from export.graphs.model import Resolution, all_layers, cells_of, coefficient_shape, evaluated
from export.graphs.nodes import Nodes
from export.graphs.profiles import baked_profile, profile_of
from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.modeling import MNIFModel

BROWSER_KINDS = ("prior", "field")
_LARGEST_BATCH = 4  # of *field*, whose points are many
_REFERENCES = 2  # instances
_REFERENCE_POINTS = 256  # of each cell


@torch.no_grad()
def browser_cases(
    pipeline: MNIFPipeline, num_inference_steps: int, resolution: Resolution, seed: int
) -> Iterator[GraphCase]:
    """*prior* and *field* with fixed inputs and exact answers.

    Raises:
        UserError: the scheduler cannot be exported with so many steps.
    """
    yield replace(sampler_case(pipeline, num_inference_steps, None, seed), name="prior", kind="prior")
    noise = initial_noise(seed, range(_REFERENCES), pipeline.decoder.config.latent_dim)
    coefficients = pipeline.decoder.coefficients(pipeline.denoiser.to_latents(torch.from_numpy(noise)))
    yield _field_case(pipeline.decoder, coefficients, resolution, seed)


def _field_case(decoder: MNIFModel, coefficients: Tensor, resolution: Resolution, seed: int) -> GraphCase:
    """*field*, asked at places all over the cells."""
    shape = (cells_of(decoder), _REFERENCE_POINTS, decoder.config.dimensions)
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
    return GraphCase("field", "field", model, profile_of(model, **sizes), reference)


def field_graph(decoder: MNIFModel) -> onnx.ModelProto:
    """``coefficients``, ``coordinates`` → ``values``, batch and points dynamic.

    They are [batch, cells, layers, bases], [cells, points, dimensions] in each cell's own [-1, 1], and
    [batch, cells, points, channels].
    """
    nodes = Nodes()
    points = nodes.unsqueeze("coordinates", [0], "coordinates_of_all")
    layers = all_layers(nodes, decoder, "coefficients")
    values = evaluated(nodes, points, layers, decoder.config.output_sine)
    cells, config = cells_of(decoder), decoder.config
    return nodes.model(
        "field",
        {"coefficients": coefficient_shape(decoder), "coordinates": [cells, "points", config.dimensions]},
        {"values": (values, ["batch", cells, "points", config.channels])},
    )
