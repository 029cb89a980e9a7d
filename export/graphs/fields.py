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
from export.graphs.specs import PROFILE_SIZES, REFERENCED_BAKED, GraphSpec, Profile, axes_of, profile_of, reference_of
from mnif.models.cell_grid import CellGrid, axis_cells
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField, LayerShape
from mnif.utils.pixels import as_axes

Resolution = int | Sequence[int]  # pixels per axis; one number stands for all axes

Layers = dict[int, tuple[str, str]]  # number of a layer → what its weight and its bias are called

_BATCHES = (1, 8, 64)

_MOST_VALUES = 1 << 22  # of one batch; large grids come in smaller batches


def batch_profile(model: onnx.ModelProto, largest: onnx.ValueInfoProto | None = None) -> Profile:
    """Profiles a graph whose first axes are the batch; ``largest`` is its largest tensor, default: the output."""
    most = _MOST_VALUES // _numbers_of_one(largest or model.graph.output[0])
    return profile_of(
        model, **{size: {"batch": min(n, max(most, 1))} for size, n in zip(PROFILE_SIZES, _BATCHES, strict=True)}
    )


def baked_profile(decoder: MNIFModel, resolution: Resolution) -> Profile:
    """Profiles a baked graph from one point to four times the resolution in pictures, twice in volumes."""
    config, enlargement = decoder.config, 4 if decoder.config.dimensions < 3 else 2
    sizes = as_axes(resolution, config.dimensions)

    def points(scale: int) -> int:
        axes = [axis_cells(scale * size, config.cells, config.overlap).coordinates.shape[1] for size in sizes]
        return int(np.prod(axes))

    counts = zip(PROFILE_SIZES, (1, points(1), points(enlargement)), strict=True)
    return {"coordinates": {size: (decoder.num_cells, count, config.dimensions) for size, count in counts}}


CHANNELS = 4


@torch.no_grad()
def widen_channels(decoder: MNIFModel) -> MNIFModel:
    """Widens a model to four channels, the further ones 0 everywhere; one of four or more is returned as it is."""
    if decoder.config.channels >= CHANNELS:
        return decoder
    settings = {key: value for key, value in decoder.config.items() if not key.startswith("_")}
    wide = MNIFModel(**settings | {"channels": CHANNELS}).eval()
    narrow, last = decoder.shapes[-1], len(decoder.bases) - 1
    state = decoder.state_dict()
    for name in state:
        if name.endswith((f"bases.{last}", f"means.{last}")):
            state[name] = _pad_params(state[name], narrow)
    wide.load_state_dict(state)
    return wide


def _pad_params(params: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    weights, biases = shape.split(params)
    missing = (0, CHANNELS - shape.outputs)
    return torch.cat([F.pad(weights, missing).flatten(1), F.pad(biases, missing).flatten(1)], dim=1)


_MOST_SINES = 1 << 16  # of a shared first layer that a graph stores; large grids have theirs worked out by the engine


def baked_graph(field: BakedField) -> onnx.ModelProto:
    """Builds ``coordinates`` [cells, points, dimensions] → ``values`` [cells, points, channels], points dynamic.

    Args:
        field: one instance's networks, one per cell. Each is asked at coordinates of its own cell, [-1, 1] across it
            (:func:`mnif.models.cell_grid.cell_grid`; rows shared by all cells are to be repeated).
    """
    builder = GraphBuilder()
    values = evaluate_layers(builder, "coordinates", baked_layers(builder, field), field.output_sine)
    cells, dimensions, channels = len(field.params), field.shapes[0].inputs, field.shapes[-1].outputs
    return builder.model(
        "baked",
        {"coordinates": [cells, "points", dimensions]},
        {"values": (values, [cells, "points", channels])},
    )


def decoder_graph(decoder: MNIFModel, resolution: Resolution) -> onnx.ModelProto:
    """Builds ``coefficients`` [batch, cells, layers, bases] → ``values`` [batch, *resolution, channels].

    The batch is dynamic.

    Raises:
        UserError: the resolution is below 1.
    """
    builder = GraphBuilder()
    values = decode_on_grid(builder, decoder, "coefficients", resolution)
    return builder.model(
        "decoder",
        {"coefficients": coefficient_shape(decoder)},
        {"values": (values, grid_shape(decoder, resolution))},
    )


def coefficient_shape(decoder: MNIFModel) -> list[int | str]:
    """The shape of coefficients is [batch, cells, layers, bases]."""
    return ["batch", decoder.num_cells, len(decoder.bases), decoder.config.num_bases]


def baked_layers(builder: GraphBuilder, field: BakedField) -> Layers:
    """Stores a baked field's layers: weights [cells, in, out] and biases [cells, 1, out]."""
    return {
        index: (builder.constant(f"layer_{index}.weight", weight), builder.constant(f"layer_{index}.bias", bias))
        for index, (weight, bias) in enumerate(field.layers())
    }


def mixed_layers(builder: GraphBuilder, decoder: MNIFModel, coefficients: str) -> Layers:
    """Mixes layers by coefficients: weights [batch, cells, in, out] and biases [batch, cells, 1, out].

    As in the model, what later generations add comes to the first one's sum, so that zeros change no bit of it.
    """
    by_cell = builder.reshape(coefficients, (-1, len(decoder.bases), decoder.config.num_bases), "coefficients_by_cell")
    layers = {}
    for mixed, index in enumerate(decoder.mixed_layers):
        shape, name = decoder.shapes[index], f"layer_{index}"
        place = builder.constant(f"{name}/index", np.array(mixed, dtype=np.int64))
        taken = builder.add("Gather", [by_cell, place], f"{name}/coefficients", axis=1)
        parts = [f"{name}/coefficients/{number}" for number in range(len(decoder.generations))]
        first, *later = builder.split(taken, decoder.generations, parts) if decoder.later else [taken]
        operands = [first, builder.constant(f"decoder.bases.{mixed}", decoder.bases[mixed])]
        if decoder.means:
            operands.append(builder.constant(f"decoder.means.{mixed}", decoder.means[mixed]))
        params = builder.add("Gemm", operands, f"{name}/rows")
        for number, (growth, part) in enumerate(zip(decoder.later, later, strict=True)):
            bases = builder.constant(f"decoder.later.{number}.bases.{mixed}", growth.bases[mixed])
            params = builder.add("Gemm", [part, bases, params], f"{name}/rows/{number + 1}")
        sizes = (shape.inputs * shape.outputs, shape.outputs)
        weight, bias = builder.split(params, sizes, [f"{name}/weight_rows", f"{name}/bias_rows"])
        layers[index] = (
            builder.reshape(weight, (-1, decoder.num_cells, shape.inputs, shape.outputs), f"{name}/weight"),
            builder.reshape(bias, (-1, decoder.num_cells, 1, shape.outputs), f"{name}/bias"),
        )
    return layers


def all_layers(builder: GraphBuilder, decoder: MNIFModel, coefficients: str) -> Layers:
    """Mixes layers by coefficients and stores the shared ones before them, [in, out] and [1, out]."""
    layers = mixed_layers(builder, decoder, coefficients)
    for index, (shape, row) in enumerate(zip(decoder.shapes, decoder.shared, strict=False)):
        weight, bias = (part[0] for part in shape.split(row.detach()))
        layers[index] = (
            builder.constant(f"layer_{index}.weight", weight),
            builder.constant(f"layer_{index}.bias", bias),
        )
    return layers


def evaluate_layers(builder: GraphBuilder, hidden: str, layers: Layers, output_sine: bool) -> str:
    """Runs what ``hidden`` [..., points, features] names through layers; all but the network's last end on a sine."""
    last = max(layers)
    for index, (weight, bias) in sorted(layers.items()):
        name = f"layer_{index}"
        product = builder.add("MatMul", [hidden, weight], f"{name}/product")
        hidden = builder.add("Add", [product, bias], f"{name}/sum")
        if index < last or output_sine:
            hidden = builder.add("Sin", [hidden], f"{name}/sine")
    return hidden


def grid_shape(decoder: MNIFModel, resolution: Resolution) -> list[int | str]:
    """The shape of values on a grid is [batch, resolution, ..., channels]."""
    sizes = as_axes(resolution, decoder.config.dimensions)
    return ["batch", *sizes, decoder.config.channels]


def decode_on_grid(builder: GraphBuilder, decoder: MNIFModel, coefficients: str, resolution: Resolution) -> str:
    """Mixes the bases, evaluates the fields on the grid and blends: tensors are [batch, cells, points, features]."""
    grid = decoder.grid(resolution)
    if len(grid.coordinates[0]) * len(grid.coordinates) * decoder.config.width <= _MOST_SINES:
        hidden, layers = _shared_features(decoder, grid), mixed_layers(builder, decoder, coefficients)
    else:
        hidden, layers = grid.coordinates, all_layers(builder, decoder, coefficients)
    values = evaluate_layers(builder, builder.constant("grid", hidden[None]), layers, decoder.config.output_sine)
    return _blend(builder, decoder, grid, values)


@torch.no_grad()
def _shared_features(decoder: MNIFModel, grid: CellGrid) -> Tensor:
    """Works out what all samples share: coordinates, or a first layer's sines, [1 or cells, points, n]."""
    hidden = grid.coordinates
    for shape, row in zip(decoder.shapes, decoder.shared, strict=False):
        hidden = BakedField([shape], row.expand(len(hidden), -1), output_sine=True)(hidden)
    return hidden


def _blend(builder: GraphBuilder, decoder: MNIFModel, grid: CellGrid, values: str) -> str:
    """Blends [batch, cells, points, channels] → [batch, resolution, ..., channels], as :meth:`CellGrid.blend`."""
    dimensions, count, channels = decoder.config.dimensions, decoder.config.cells, decoder.config.channels
    if count > 1:
        values = builder.reshape(values, (-1, *[count] * dimensions, *grid.points_per_axis, channels), "blend/apart")
        interleaved = [axis + offset for axis in range(1, dimensions + 1) for offset in (0, dimensions)]
        values = builder.add("Transpose", [values], "blend/order", perm=[0, *interleaved, 2 * dimensions + 1])
    values = builder.reshape(
        values, (-1, *[count * points for points in grid.points_per_axis], channels), "blend/line"
    )
    if count == 1:
        return values
    for axis, (first, second, weight) in enumerate(grid.axes, start=1):
        name = f"blend/axis_{axis}"
        ours = builder.add("Gather", [values, builder.constant(f"{name}/first", first)], f"{name}/ours", axis=axis)
        if not weight.any():
            values = ours
            continue
        share = builder.constant(f"{name}/weight", weight.view(-1, *[1] * (dimensions + 1 - axis)))
        theirs = builder.add(
            "Gather", [values, builder.constant(f"{name}/second", second)], f"{name}/theirs", axis=axis
        )
        step = builder.add("Sub", [theirs, ours], f"{name}/difference")
        values = builder.add("Add", [ours, builder.add("Mul", [step, share], f"{name}/share")], f"{name}/blended")
    return values


_REFERENCES = 3  # instances in the reference of a graph with a batch, fewer where their grids are large

_REFERENCE_VALUES = 1 << 17

_REFERENCE_POINTS = 256  # of each cell, in the reference of a baked graph

_BAKED_AT_ONCE = 64


@torch.no_grad()
def decoder_spec(decoder: MNIFModel, latents: Tensor, resolution: Resolution) -> GraphSpec:
    """Specifies coefficients → values on a grid; ``latents`` [n, D] make the reference."""
    exact_decoder, model = copy.deepcopy(decoder).double(), decoder_graph(decoder, resolution)
    coefficients = decoder.coefficients(latents[: reference_count(model)])
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
    """Specifies each of ``latents`` [n, D] baked; the first :data:`REFERENCED_BAKED` have references."""
    cells = decoder.num_cells
    coordinates = decoder.grid(resolution).coordinates.expand(cells, -1, -1)
    points = coordinates.shape[1]
    chosen = torch.linspace(0, points - 1, min(points, _REFERENCE_POINTS)).round().long()
    coordinates = coordinates[:, chosen].contiguous()
    profile = baked_profile(decoder, resolution)
    exact = list(_bake_each(copy.deepcopy(decoder).double(), latents[:REFERENCED_BAKED].double()))
    for index, (baked, label) in enumerate(zip(_bake_each(decoder, latents), labels, strict=True)):
        name, reference = f"baked_{index:04d}", None
        if index < len(exact):
            reference = reference_of(
                name,
                {"coordinates": coordinates.numpy()},
                {"values": exact[index](coordinates.double())},
                {"values": baked(coordinates)},
            )
        yield GraphSpec(name, "baked", baked_graph(baked), profile, reference, instance=label)


def _bake_each(decoder: MNIFModel, latents: Tensor) -> Iterator[BakedField]:
    """Yields the field of each of ``latents`` [n, D], many baked at a time."""
    for begin in range(0, len(latents), _BAKED_AT_ONCE):
        some = latents[begin : begin + _BAKED_AT_ONCE]
        fields = decoder.bake(decoder.coefficients(some))
        for params in fields.params.chunk(len(some)):
            yield BakedField(fields.shapes, params, fields.output_sine)


def reference_count(model: onnx.ModelProto, largest: onnx.ValueInfoProto | None = None) -> int:
    """Counts the instances in the reference of a graph whose first axes are the batch, as :func:`batch_profile`."""
    return int(np.clip(_REFERENCE_VALUES // _numbers_of_one(largest or model.graph.output[0]), 1, _REFERENCES))


def _numbers_of_one(tensor: onnx.ValueInfoProto) -> int:
    return int(np.prod([axis.dim_value for axis in axes_of(tensor)[1:]]))
