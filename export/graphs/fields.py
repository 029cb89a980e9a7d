"""The graphs of a model, written node by node; :mod:`export.graphs.radiance` has those of radiance fields alone.

- *baked*: coordinates → values, the weights of one instance inside; a plain coordinate network per cell.
- *decoder*: mixture coefficients → values on a fixed grid.
- *sampler*: noise → values on a fixed grid (or coefficients), the denoising steps unrolled.

Everything that does not depend on the input is worked out here and stored: what the time embedding does to each block
at each step, and the first layer of delta mixing, whose sine is the same for all samples (unless the grid is large).
Weights bear the names they have in the model's state dict, with ``decoder.`` or ``denoiser.`` in front, and each is
stored once.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from export.graphs.builder import GraphBuilder
from export.graphs.specs import _SIZES, REFERENCED_BAKED, GraphSpec, Profile, _axes, profile_of, reference_of
from mnif.models.cell_grid import CellGrid, axis_cells
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField, LayerShape

Resolution = int | Sequence[int]  # pixels per axis; one number stands for all axes


Layers = dict[int, tuple[str, str]]  # number of a layer → what its weight and its bias are called


_BATCHES = (1, 8, 64)


_MOST_VALUES = 1 << 22  # of one batch; large grids come in smaller batches


def batch_profile(model: onnx.ModelProto) -> Profile:
    """Of a graph with one input and one output, whose first axis is the batch."""
    most = _MOST_VALUES // int(np.prod([axis.dim_value for axis in _axes(model.graph.output[0])[1:]]))
    return profile_of(
        model, **{size: {"batch": min(n, max(most, 1))} for size, n in zip(_SIZES, _BATCHES, strict=True)}
    )


def baked_profile(decoder: MNIFModel, resolution: Resolution) -> Profile:
    """From one point to several times the resolution: four times in pictures, twice in volumes."""
    config, enlargement = decoder.config, 4 if decoder.config.dimensions < 3 else 2
    sizes = [resolution] * config.dimensions if isinstance(resolution, int) else resolution

    def points(scale: int) -> int:
        axes = [axis_cells(scale * size, config.cells, config.overlap).coordinates.shape[1] for size in sizes]
        return int(np.prod(axes))

    cells = config.cells**config.dimensions
    counts = zip(_SIZES, (1, points(1), points(enlargement)), strict=True)
    return {"coordinates": {size: (cells, count, config.dimensions) for size, count in counts}}


CHANNELS = 4


@torch.no_grad()
def padded(decoder: MNIFModel) -> MNIFModel:
    """The same model with four channels, the further ones 0 everywhere; one of four or more is returned as it is."""
    if decoder.config.channels >= CHANNELS:
        return decoder
    settings = {key: value for key, value in decoder.config.items() if not key.startswith("_")}
    wide = MNIFModel(**settings | {"channels": CHANNELS}).eval()
    narrow, last = decoder.shapes[-1], len(decoder.bases) - 1
    state = decoder.state_dict()
    for name in (f"bases.{last}", f"means.{last}"):
        if name in state:
            state[name] = _padded_rows(state[name], narrow)
    wide.load_state_dict(state)
    return wide


def _padded_rows(rows: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    weights, biases = shape.split(rows)
    missing = (0, CHANNELS - shape.outputs)
    return torch.cat([F.pad(weights, missing).flatten(1), F.pad(biases, missing).flatten(1)], dim=1)


_MOST_SINES = 1 << 16  # of a shared first layer that a graph stores; large grids have theirs worked out by the engine


def baked_graph(field: BakedField) -> onnx.ModelProto:
    """``coordinates`` [cells, points, dimensions] → ``values`` [cells, points, channels], ``points`` dynamic.

    Args:
        field: one instance's networks, one per cell. Each is asked at coordinates of its own cell, [-1, 1] across it
            (:func:`mnif.models.cell_grid.cell_grid`; rows shared by all cells are to be repeated).
    """
    nodes = GraphBuilder()
    values = evaluated(nodes, "coordinates", baked_layers(nodes, field), field.output_sine)
    cells, dimensions, channels = len(field.params), field.shapes[0].inputs, field.shapes[-1].outputs
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
    nodes = GraphBuilder()
    values = _decoded(nodes, decoder, "coefficients", resolution)
    return nodes.model(
        "decoder",
        {"coefficients": coefficient_shape(decoder)},
        {"values": (values, _grid_shape(decoder, resolution))},
    )


def coefficient_shape(decoder: MNIFModel) -> list[int | str]:
    """[batch, cells, layers, bases]."""
    return ["batch", cells_of(decoder), len(decoder.bases), decoder.config.num_bases]


def cells_of(decoder: MNIFModel) -> int:
    """Cells of all axes together."""
    return decoder.config.cells**decoder.config.dimensions


def baked_layers(nodes: GraphBuilder, field: BakedField) -> Layers:
    """A baked field's layers as constants: weights [cells, in, out] and biases [cells, 1, out]."""
    return {
        index: (nodes.constant(f"layer_{index}.weight", weight), nodes.constant(f"layer_{index}.bias", bias))
        for index, (weight, bias) in enumerate(field.layers())
    }


def mixed_layers(nodes: GraphBuilder, decoder: MNIFModel, coefficients: str) -> Layers:
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


def all_layers(nodes: GraphBuilder, decoder: MNIFModel, coefficients: str) -> Layers:
    """All layers of a field: those that coefficients mix, and before them the shared ones, [in, out] and [1, out]."""
    layers = mixed_layers(nodes, decoder, coefficients)
    for index, (shape, row) in enumerate(zip(decoder.shapes, decoder.shared, strict=False)):
        weight, bias = (part[0] for part in shape.split(row.detach()))
        layers[index] = nodes.constant(f"layer_{index}.weight", weight), nodes.constant(f"layer_{index}.bias", bias)
    return layers


def evaluated(nodes: GraphBuilder, hidden: str, layers: Layers, output_sine: bool) -> str:
    """Runs what ``hidden`` [..., points, features] names through layers; all but the network's last end on a sine."""
    last = max(layers)
    for index, (weight, bias) in sorted(layers.items()):
        name = f"layer_{index}"
        product = nodes.add("MatMul", [hidden, weight], f"{name}/product")
        hidden = nodes.add("Add", [product, bias], f"{name}/sum")
        if index < last or output_sine:
            hidden = nodes.add("Sin", [hidden], f"{name}/sine")
    return hidden


def _grid_shape(decoder: MNIFModel, resolution: Resolution) -> list[int | str]:
    sizes = [resolution] * decoder.config.dimensions if isinstance(resolution, int) else resolution
    return ["batch", *sizes, decoder.config.channels]


def _decoded(nodes: GraphBuilder, decoder: MNIFModel, coefficients: str, resolution: Resolution) -> str:
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


def _blended(nodes: GraphBuilder, decoder: MNIFModel, grid: CellGrid, values: str) -> str:
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


_REFERENCES = 3  # instances in the reference of a graph with a batch, fewer where their grids are large


_REFERENCE_VALUES = 1 << 17


_REFERENCE_POINTS = 256  # of each cell, in the reference of a baked graph


_BAKED_AT_ONCE = 64


@torch.no_grad()
def decoder_spec(decoder: MNIFModel, latents: Tensor, resolution: Resolution) -> GraphSpec:
    """Coefficients → values on a grid; ``latents`` [n, D] make the reference."""
    exact_decoder, model = copy.deepcopy(decoder).double(), decoder_graph(decoder, resolution)
    coefficients = decoder.coefficients(latents[: _reference_count(model)])
    reference = reference_of(
        "decoder",
        {"coefficients": coefficients.numpy()},
        {"values": exact_decoder.decode_coefficients(coefficients.double(), exact_decoder.grid(resolution))},
        {"values": decoder.decode_coefficients(coefficients, decoder.grid(resolution))},
    )
    return GraphSpec("decoder", "decoder", model, batch_profile(model), reference)


@torch.no_grad()
def baked_specs(
    decoder: MNIFModel, latents: Tensor, labels: Sequence[dict[str, Any]], resolution: Resolution
) -> Iterator[GraphSpec]:
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
        yield GraphSpec(name, "baked", baked_graph(baked), profile, reference, instance=label)


def _baked(decoder: MNIFModel, latents: Tensor) -> Iterator[BakedField]:
    """The field of each of ``latents`` [n, D], many baked at a time."""
    for begin in range(0, len(latents), _BAKED_AT_ONCE):
        some = latents[begin : begin + _BAKED_AT_ONCE]
        fields = decoder.bake(decoder.coefficients(some))
        for rows in fields.params.chunk(len(some)):
            yield BakedField(fields.shapes, rows, fields.output_sine)


def _reference_count(model: onnx.ModelProto) -> int:
    """Instances in the reference of a graph whose first axis is the batch."""
    values = np.prod([axis.dim_value for axis in model.graph.output[0].type.tensor_type.shape.dim[1:]])
    return int(np.clip(_REFERENCE_VALUES // values, 1, _REFERENCES))
