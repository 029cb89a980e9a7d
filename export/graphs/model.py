"""The graphs of a model, written node by node; :mod:`export.graphs.radiance` has those of radiance fields alone.

- *baked*: coordinates → values, the weights of one instance inside; a plain coordinate network per cell.
- *decoder*: mixture coefficients → values on a fixed grid.
- *sampler*: noise → values on a fixed grid (or coefficients), the denoising steps unrolled.

Everything that does not depend on the input is worked out here and stored: what the time embedding does to each block
at each step, and the first layer of delta mixing, whose sine is the same for all samples (unless the grid is large).
Weights bear the names they have in the model's state dict, with ``decoder.`` or ``denoiser.`` in front, and each is
stored once.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import onnx
import torch
from torch import Tensor

from export.graphs.nodes import Nodes
from export.graphs.steps import LinearSteps
from latent_prior.denoiser import LatentDenoiser, ResidualBlock
from latent_prior.pipeline import MNIFPipeline
from mnif.cells import CellGrid
from mnif.fields import BakedField
from mnif.modeling import MNIFModel

Resolution = int | Sequence[int]  # pixels per axis; one number stands for all axes
Layers = dict[int, tuple[str, str]]  # number of a layer → what its weight and its bias are called
_MOST_SINES = 1 << 16  # of a shared first layer that a graph stores; large grids have theirs worked out by the engine


def baked_graph(field: BakedField) -> onnx.ModelProto:
    """``coordinates`` [cells, points, dimensions] → ``values`` [cells, points, channels], ``points`` dynamic.

    Args:
        field: one instance's networks, one per cell. Each is asked at coordinates of its own cell, [-1, 1] across it
            (:func:`mnif.cells.cell_grid`; rows shared by all cells are to be repeated).
    """
    nodes = Nodes()
    values = evaluated(nodes, "coordinates", baked_layers(nodes, field), field.output_sine)
    cells, dimensions, channels = len(field.rows), field.shapes[0].inputs, field.shapes[-1].outputs
    return nodes.model(
        "baked",
        {"coordinates": [cells, "points", dimensions]},
        {"values": (values, [cells, "points", channels])},
    )


def decoder_graph(decoder: MNIFModel, resolution: Resolution) -> onnx.ModelProto:
    """``coefficients`` [batch, cells, layers, bases] → ``values`` [batch, *resolution, channels], batch dynamic.

    Raises:
        UserError: the resolution is below 1.
    """
    nodes = Nodes()
    values = _decoded(nodes, decoder, "coefficients", resolution)
    return nodes.model(
        "decoder",
        {"coefficients": coefficient_shape(decoder)},
        {"values": (values, _grid_shape(decoder, resolution))},
    )


def sampler_graph(pipeline: MNIFPipeline, steps: LinearSteps, resolution: Resolution | None) -> onnx.ModelProto:
    """``noise`` [batch, latent_dim] → ``values`` [batch, *resolution, channels], batch dynamic.

    Args:
        pipeline: decoder and denoiser.
        steps: its scheduler's (:func:`export.graphs.steps.linear_steps`).
        resolution: pixels per axis; None ends the graph at ``coefficients`` [batch, cells, layers, bases].

    Raises:
        UserError: the resolution is below 1.
    """
    decoder, denoiser = pipeline.decoder, pipeline.denoiser
    nodes = Nodes()
    samples = ["noise"]
    predictions: list[str] = []
    for step, timestep in enumerate(steps.timesteps):
        predictions.append(_denoised(nodes, denoiser, samples[-1], float(timestep), f"step_{step}"))
        samples.append(nodes.weighted_sum(steps.terms(step, samples, predictions), f"step_{step}/next"))

    spread = nodes.constant("denoiser.latent_std", denoiser.latent_std)
    mean = nodes.constant("denoiser.latent_mean", denoiser.latent_mean)
    latents = nodes.add("Add", [nodes.add("Mul", [samples[-1], spread], "latents/spread"), mean], "latents")
    coefficients = _coefficients(nodes, decoder, latents)
    if resolution is None:
        shape = coefficient_shape(decoder)
        apart = nodes.reshape(coefficients, (-1, *(int(size) for size in shape[1:])), "coefficients/apart")
        results = {"coefficients": (apart, shape)}
    else:
        values = _decoded(nodes, decoder, coefficients, resolution)
        results = {"values": (values, _grid_shape(decoder, resolution))}
    return nodes.model("sampler", {"noise": ["batch", decoder.config.latent_dim]}, results)


def coefficient_shape(decoder: MNIFModel) -> list[int | str]:
    """[batch, cells, layers, bases]."""
    return ["batch", cells_of(decoder), len(decoder.bases), decoder.config.num_bases]


def cells_of(decoder: MNIFModel) -> int:
    """Cells of all axes together."""
    return decoder.config.cells**decoder.config.dimensions


def baked_layers(nodes: Nodes, field: BakedField) -> Layers:
    """A baked field's layers as constants: weights [cells, in, out] and biases [cells, 1, out]."""
    return {
        index: (nodes.constant(f"layer_{index}.weight", weight), nodes.constant(f"layer_{index}.bias", bias))
        for index, (weight, bias) in enumerate(field.layers())
    }


def mixed_layers(nodes: Nodes, decoder: MNIFModel, coefficients: str) -> Layers:
    """The layers that coefficients mix: weights [batch, cells, in, out] and biases [batch, cells, 1, out]."""
    by_cell = nodes.reshape(coefficients, (-1, len(decoder.bases), decoder.config.num_bases), "coefficients_by_cell")
    layers = {}
    for mixed, index in enumerate(decoder.mixed_layers):
        shape, name = decoder.shapes[index], f"layer_{index}"
        place = nodes.constant(f"{name}/index", np.array(mixed, dtype=np.int64))
        operands = [
            nodes.add("Gather", [by_cell, place], f"{name}/coefficients", axis=1),
            nodes.constant(f"decoder.bases.{mixed}", decoder.bases[mixed]),
        ]
        if decoder.means:
            operands.append(nodes.constant(f"decoder.means.{mixed}", decoder.means[mixed]))
        rows = nodes.add("Gemm", operands, f"{name}/rows")
        sizes = (shape.inputs * shape.outputs, shape.outputs)
        weight, bias = nodes.split(rows, sizes, [f"{name}/weight_rows", f"{name}/bias_rows"])
        layers[index] = (
            nodes.reshape(weight, (-1, cells_of(decoder), shape.inputs, shape.outputs), f"{name}/weight"),
            nodes.reshape(bias, (-1, cells_of(decoder), 1, shape.outputs), f"{name}/bias"),
        )
    return layers


def all_layers(nodes: Nodes, decoder: MNIFModel, coefficients: str) -> Layers:
    """All layers of a field: those that coefficients mix, and before them the shared ones, [in, out] and [1, out]."""
    layers = mixed_layers(nodes, decoder, coefficients)
    for index, (shape, row) in enumerate(zip(decoder.shapes, decoder.shared, strict=False)):
        weight, bias = (part[0] for part in shape.split(row.detach()))
        layers[index] = nodes.constant(f"layer_{index}.weight", weight), nodes.constant(f"layer_{index}.bias", bias)
    return layers


def evaluated(nodes: Nodes, hidden: str, layers: Layers, output_sine: bool) -> str:
    """Runs what ``hidden`` [..., points, features] names through layers; all but the network's last end on a sine."""
    last = max(layers)
    for index, (weight, bias) in sorted(layers.items()):
        name = f"layer_{index}"
        product = nodes.add("MatMul", [hidden, weight], f"{name}/product")
        hidden = nodes.add("Add", [product, bias], f"{name}/sum")
        if index < last or output_sine:
            hidden = nodes.add("Sin", [hidden], f"{name}/sine")
    return hidden


def _coefficients(nodes: Nodes, decoder: MNIFModel, latents: str) -> str:
    """Latents [batch, latent_dim] → coefficients [batch, cells · layers · bases], as the model has them."""
    config, scale = decoder.config, decoder.config.num_bases**-0.5
    if decoder.coefficient_map is None:
        factor = nodes.number(scale)
        if config.mixing == "average":
            latents = nodes.add("Add", [latents, nodes.number(1.0)], "coefficients/shifted")
        return nodes.add("Mul", [latents, factor], "coefficients/flat")
    mapped = nodes.linear(
        latents,
        nodes.constant("decoder.coefficient_map.weight", decoder.coefficient_map.weight),
        nodes.constant("decoder.coefficient_map.bias", decoder.coefficient_map.bias),
        "coefficients/flat",
        scale=scale,
    )
    if config.coefficient_form == "layer":
        return mapped
    by_cell = nodes.reshape(mapped, (-1, 1, config.num_bases), "coefficients/shared")
    return nodes.add("Concat", [by_cell] * len(decoder.bases), "coefficients/by_layer", axis=1)


def _grid_shape(decoder: MNIFModel, resolution: Resolution) -> list[int | str]:
    sizes = [resolution] * decoder.config.dimensions if isinstance(resolution, int) else resolution
    return ["batch", *sizes, decoder.config.channels]


def _decoded(nodes: Nodes, decoder: MNIFModel, coefficients: str, resolution: Resolution) -> str:
    """Mixes the bases, evaluates the fields on the grid and blends: tensors are [batch, cells, points, features]."""
    grid = decoder.grid(resolution)
    if len(grid.coordinates[0]) * len(grid.coordinates) * decoder.config.width <= _MOST_SINES:
        hidden, layers = _shared_part(decoder, grid), mixed_layers(nodes, decoder, coefficients)
    else:
        hidden, layers = grid.coordinates, all_layers(nodes, decoder, coefficients)
    values = evaluated(nodes, nodes.constant("grid", hidden[None]), layers, decoder.config.output_sine)
    return _blended(nodes, decoder, grid, values)


@torch.no_grad()
def _shared_part(decoder: MNIFModel, grid: CellGrid) -> Tensor:
    """What all samples have in common: the coordinates, or a shared first layer's sines, [1 or cells, points, n]."""
    hidden = grid.coordinates
    for shape, row in zip(decoder.shapes, decoder.shared, strict=False):
        hidden = BakedField([shape], row.expand(len(hidden), -1), output_sine=True)(hidden)
    return hidden


def _blended(nodes: Nodes, decoder: MNIFModel, grid: CellGrid, values: str) -> str:
    """[batch, cells, points, channels] → [batch, resolution, ..., channels], as :meth:`CellGrid.blend` does it."""
    dimensions, count, channels = decoder.config.dimensions, decoder.config.cells, decoder.config.channels
    if count > 1:
        values = nodes.reshape(values, (-1, *[count] * dimensions, *grid.points_per_axis, channels), "blend/apart")
        interleaved = [axis + offset for axis in range(1, dimensions + 1) for offset in (0, dimensions)]
        values = nodes.add("Transpose", [values], "blend/order", perm=[0, *interleaved, 2 * dimensions + 1])
    values = nodes.reshape(values, (-1, *[count * points for points in grid.points_per_axis], channels), "blend/line")
    if count == 1:
        return values
    for axis, (first, second, weight) in enumerate(grid.axes, start=1):
        name = f"blend/axis_{axis}"
        ours = nodes.add("Gather", [values, nodes.constant(f"{name}/first", first)], f"{name}/ours", axis=axis)
        if not weight.any():
            values = ours
            continue
        share = nodes.constant(f"{name}/weight", weight.view(-1, *[1] * (dimensions + 1 - axis)))
        theirs = nodes.add("Gather", [values, nodes.constant(f"{name}/second", second)], f"{name}/theirs", axis=axis)
        step = nodes.add("Sub", [theirs, ours], f"{name}/difference")
        values = nodes.add("Add", [ours, nodes.add("Mul", [step, share], f"{name}/share")], f"{name}/blended")
    return values


@torch.no_grad()
def _denoised(nodes: Nodes, denoiser: LatentDenoiser, sample: str, timestep: float, name: str) -> str:
    """One evaluation of the denoiser, [batch, latent_dim] → [batch, latent_dim]."""
    weights = dict(denoiser.named_parameters())

    def stored(parameter: str) -> str:
        return nodes.constant(f"denoiser.{parameter}", weights[parameter])

    time = denoiser.time_embedding(timestep)
    hidden = nodes.linear(sample, stored("read.weight"), stored("read.bias"), f"{name}/read")
    for index, block in enumerate(cast(Iterable[ResidualBlock], denoiser.blocks)):
        here, place = f"{name}/block_{index}", f"blocks.{index}"
        # up((normal · gain) (1 + scale) + shift) = up.weight @ (normal · factor) + up(shift), both constant at a step.
        scale, shift = block.modulation(time).chunk(2, dim=-1)
        factor = nodes.constant(f"{here}/factor", block.norm.weight * (1 + scale))
        offset = nodes.constant(f"{here}/offset", block.up(shift))
        inner = nodes.add("Mul", [_normalised(nodes, hidden, block.norm, here), factor], f"{here}/modulated")
        inner = nodes.linear(inner, stored(f"{place}.up.weight"), offset, f"{here}/up")
        inner = nodes.add("Mul", [inner, nodes.add("Sigmoid", [inner], f"{here}/sigmoid")], f"{here}/silu")
        inner = nodes.linear(inner, stored(f"{place}.down.weight"), stored(f"{place}.down.bias"), f"{here}/down")
        hidden = nodes.add("Add", [hidden, inner], f"{here}/out")
    hidden = nodes.add("Mul", [_normalised(nodes, hidden, denoiser.norm, name), stored("norm.weight")], f"{name}/norm")
    return nodes.linear(hidden, stored("write.weight"), stored("write.bias"), f"{name}/write")


def _normalised(nodes: Nodes, hidden: str, norm: torch.nn.RMSNorm, name: str) -> str:
    """x / sqrt(mean(x²) + eps) over the last axis, without the gain."""
    square = nodes.add("Mul", [hidden, hidden], f"{name}/square")
    mean = nodes.add("ReduceMean", [square], f"{name}/mean", axes=[-1], keepdims=1)
    shifted = nodes.add("Add", [mean, nodes.number(cast(float, norm.eps))], f"{name}/mean_and_epsilon")
    root = nodes.add("Sqrt", [shifted], f"{name}/root")
    return nodes.add("Div", [hidden, root], f"{name}/normal")
