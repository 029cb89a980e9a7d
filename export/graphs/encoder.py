"""The encoder: an observation → its latent, its coefficients, and how far their decoded values are from it.

Encoders of grids alone are exported (:class:`mnif.models.encoders.PatchEncoder` and ``TokenEncoder``). Layer
normalisation is written out, since TensorRT's parser knows it from 8.6 on.
"""

import copy
import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.graphs.builder import GraphBuilder, Shape
from export.graphs.coefficients import coefficients_of
from export.graphs.fields import (
    batch_profile,
    coefficient_shape,
    decode_on_grid,
    reference_count,
)
from export.graphs.specs import GraphSpec, reference_of
from mnif.latents.patches import residuals_in_patches
from mnif.models.encoders import AttentionBlock, PatchEncoder, TokenEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.utils.pixels import as_axes

GridEncoder = PatchEncoder | TokenEncoder

_SEEN = 0.7  # share of the grid that is seen of the further instances of the reference


def encoder_graph(encoder: GridEncoder, decoder: MNIFModel, patches: Sequence[int] | None = None) -> onnx.ModelProto:
    """Builds ``values``, ``mask`` → ``latents``, ``coefficients``, ``fields`` and two residuals; batch dynamic.

    They are [batch, *resolution, channels], [batch, *resolution], [batch, latent_dim], [batch, cells, layers, bases],
    [batch, cells, parameters] as :class:`mnif.models.siren.BakedField` has them, and ``cell_residuals`` [batch, cells]
    and ``residual`` [batch]: mean squared errors over what was seen, of each cell's own box of the grid and of all of
    it; 0 where nothing was seen. The resolution is the encoder's.

    Args:
        encoder: the model's.
        decoder: the model's.
        patches: along each axis, of the model's reference profile, where it has one: there is an output
            ``patch_residuals`` [batch, patches] then, mean squared errors that do not look at the mask.
    """
    builder, config = GraphBuilder(), decoder.config
    axes = as_axes(encoder.config.resolution, config.dimensions)
    seen = builder.unsqueeze("mask", [-1], "encoder/seen")
    observed = builder.add("Mul", ["values", seen], "encoder/observed")
    latents = _latents(builder, encoder, observed, [*axes, config.channels])
    shape = coefficient_shape(decoder)
    flat = coefficients_of(builder, decoder, latents)
    coefficients = builder.reshape(flat, (-1, *(int(size) for size in shape[1:])), "coefficients/apart")
    decoded = decode_on_grid(builder, decoder, coefficients, axes)
    by_cell, whole = _residuals(builder, decoder, decoded, axes)
    results: dict[str, tuple[str, Shape]] = {
        "latents": (latents, ["batch", config.latent_dim]),
        "coefficients": (coefficients, shape),
        "fields": (_fields(builder, decoder), ["batch", decoder.num_cells, _parameters(decoder)]),
        "cell_residuals": (by_cell, ["batch", decoder.num_cells]),
        "residual": (whole, ["batch"]),
    }
    if patches is not None:
        results["patch_residuals"] = (_patch_residuals(builder, axes, patches), ["batch", math.prod(patches)])
    sources = {"values": ["batch", *axes, config.channels], "mask": ["batch", *axes]}
    return builder.model("encoder", sources, results)


def _latents(builder: GraphBuilder, encoder: GridEncoder, values: str, shape: Sequence[int]) -> str:
    """Infers latents [batch, latent_dim] from values [batch, *shape]."""
    features = _patch_features(builder, encoder, values, shape)
    if isinstance(encoder, TokenEncoder):
        raw = _mix_tokens(builder, encoder, features)
    else:
        raw = _mix_patches(builder, encoder, features)
    return _normalized(builder, raw, "encoder/latents")


def _linear(builder: GraphBuilder, encoder: GridEncoder, place: str, rows: str, name: str) -> str:
    """Runs on rows the linear layer that lies at ``place`` in the encoder."""
    return builder.linear(rows, *_weight_and_bias(builder, encoder, place), name)


def _weight_and_bias(builder: GraphBuilder, encoder: GridEncoder, place: str) -> tuple[str, str]:
    layer = encoder.get_submodule(place)
    weight, bias = (builder.constant(f"encoder.{place}.{part}", getattr(layer, part)) for part in ("weight", "bias"))
    return weight, bias


def _patch_features(builder: GraphBuilder, encoder: GridEncoder, values: str, shape: Sequence[int]) -> str:
    """Runs :class:`mnif.models.encoders.Patches`: [batch, *shape] → rows [batch · patches, features]."""
    patches, (*axes, channels) = encoder.patch_network, shape
    for axis, (pixels, size) in enumerate(zip(axes, patches.shape, strict=True)):
        if size * patches.per_axis > pixels:
            values = _padded(builder, values, axis, pixels, size * patches.per_axis, len(axes))
    split = [size for pixels in patches.shape for size in (patches.per_axis, pixels)]
    apart = builder.reshape(values, (-1, *split, channels), "encoder/patches/apart")
    count = 2 * len(axes)
    order = [0, *range(1, count, 2), *range(2, count + 1, 2), count + 1]
    apart = builder.add("Transpose", [apart], "encoder/patches/order", perm=order)
    rows = builder.reshape(apart, (-1, patches.read.in_features), "encoder/patches/rows")
    width = patches.read.out_features
    read = _linear(builder, encoder, "patch_network.read", rows, "encoder/read")
    hidden = builder.reshape(read, (-1, patches.count, width), "encoder/read/by_patch")
    position = builder.constant("encoder.patch_network.position", patches.position)
    hidden = _gelu(builder, builder.add("Add", [hidden, position], "encoder/patches/placed"), "encoder/patches/gelu")
    rows = builder.reshape(hidden, (-1, width), "encoder/patches/hidden")
    return _linear(builder, encoder, "patch_network.write", rows, "encoder/patches/write")


def _padded(builder: GraphBuilder, values: str, axis: int, pixels: int, length: int, dimensions: int) -> str:
    """Lengthens an axis with zeros: its last pixel again and again, times 0."""
    name, place = f"encoder/padding_{axis}", np.arange(length)
    repeated = builder.constant(f"{name}/pixels", np.minimum(place, pixels - 1))
    inside = (place < pixels).astype(np.float32).reshape(-1, *[1] * (dimensions - axis))
    values = builder.add("Gather", [values, repeated], f"{name}/repeated", axis=axis + 1)
    return builder.add("Mul", [values, builder.constant(f"{name}/inside", inside)], name)


def _mix_patches(builder: GraphBuilder, encoder: PatchEncoder, rows: str) -> str:
    """Mixes the features of all patches, as :class:`mnif.models.encoders.PatchEncoder` does."""
    features = builder.reshape(rows, (-1, encoder.patch_network.outputs), "encoder/features")
    hidden = _gelu(builder, _linear(builder, encoder, "mix_in", features, "encoder/mix_in"), "encoder/mix_in/gelu")
    change = _linear(builder, encoder, "mix_residual", hidden, "encoder/mix_residual")
    change = _gelu(builder, change, "encoder/mix_residual/gelu")
    hidden = builder.add("Add", [hidden, change], "encoder/mixed")
    mixed = _linear(builder, encoder, "mix_out", hidden, "encoder/mix_out")
    return builder.add("Add", [mixed, _linear(builder, encoder, "skip", features, "encoder/skip")], "encoder/raw")


def _mix_tokens(builder: GraphBuilder, encoder: TokenEncoder, rows: str) -> str:
    """Lets tokens, which lie in rows, hear each other, as :class:`mnif.models.encoders.TokenEncoder` does."""
    count, width = encoder.patch_network.count, encoder.write.in_features
    tokens = builder.reshape(rows, (-1, count, width), "encoder/tokens")
    for index in range(len(encoder.blocks)):
        tokens = _attention_block(builder, encoder, index, tokens)
    normal = _norm_layer(builder, encoder, "norm", tokens, "encoder/norm")
    written = _on_tokens(builder, encoder, "write", normal, "encoder/write")
    return builder.reshape(written, (-1, encoder.config.latent_dim), "encoder/raw")


def _on_tokens(builder: GraphBuilder, encoder: TokenEncoder, place: str, tokens: str, name: str) -> str:
    """Runs the linear layer at ``place`` on each token.

    The result is laid out anew before anything is added: OpenVINO 2026.4 crashes on a sum that it fuses into Gemm.
    """
    layer = cast(nn.Linear, encoder.get_submodule(place))
    rows = builder.reshape(tokens, (-1, layer.in_features), f"{name}/rows")
    made = _linear(builder, encoder, place, rows, name)
    return builder.reshape(made, (-1, encoder.patch_network.count, layer.out_features), f"{name}/by_token")


def _attention_block(builder: GraphBuilder, encoder: TokenEncoder, index: int, tokens: str) -> str:
    """Runs one block on tokens [batch, tokens, width]."""
    block, name, place = cast(AttentionBlock, encoder.blocks[index]), f"encoder/block_{index}", f"blocks.{index}"
    count, width = encoder.patch_network.count, block.read.in_features
    size = width // block.heads
    normal = _norm_layer(builder, encoder, f"{place}.norm_attention", tokens, f"{name}/norm_attention")
    read = _on_tokens(builder, encoder, f"{place}.read", normal, f"{name}/read")
    parts = dict(zip("qkv", builder.split(read, (width,) * 3, [f"{name}/{part}" for part in "qkv"]), strict=True))
    for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        apart = builder.reshape(parts[part], (-1, count, block.heads, size), f"{name}/{part}/heads")
        parts[part] = builder.add("Transpose", [apart], f"{name}/{part}/order", perm=order)
    scores = builder.add("MatMul", [parts["q"], parts["k"]], f"{name}/scores")
    scaled = builder.add("Mul", [scores, builder.number(1 / math.sqrt(size))], f"{name}/scaled")
    shares = builder.add("Softmax", [scaled], f"{name}/shares", axis=-1)
    heard = builder.add("MatMul", [shares, parts["v"]], f"{name}/heard")
    heard = builder.add("Transpose", [heard], f"{name}/heard/order", perm=[0, 2, 1, 3])
    change = _on_tokens(builder, encoder, f"{place}.write", heard, f"{name}/write")
    tokens = builder.add("Add", [tokens, change], f"{name}/attended")
    normal = _norm_layer(builder, encoder, f"{place}.norm_network", tokens, f"{name}/norm_network")
    hidden = _gelu(builder, _on_tokens(builder, encoder, f"{place}.up", normal, f"{name}/up"), f"{name}/gelu")
    change = _on_tokens(builder, encoder, f"{place}.down", hidden, f"{name}/down")
    return builder.add("Add", [tokens, change], f"{name}/out")


def _gelu(builder: GraphBuilder, value: str, name: str) -> str:
    """Computes x (1 + erf(x / √2)) / 2."""
    error = builder.add(
        "Erf", [builder.add("Mul", [value, builder.number(0.5**0.5)], f"{name}/scaled")], f"{name}/erf"
    )
    half = builder.add("Mul", [value, builder.number(0.5)], f"{name}/half")
    return builder.add("Mul", [half, builder.add("Add", [error, builder.number(1.0)], f"{name}/shifted")], name)


def _norm_layer(builder: GraphBuilder, encoder: GridEncoder, place: str, rows: str, name: str) -> str:
    """Normalises the last axis, with gain and offset, as the layer at ``place`` does."""
    gain, offset = _weight_and_bias(builder, encoder, place)
    scaled = builder.add("Mul", [_normalized(builder, rows, f"{name}/normal"), gain], f"{name}/gained")
    return builder.add("Add", [scaled, offset], name)


def _normalized(builder: GraphBuilder, value: str, name: str) -> str:
    """Brings the last axis to mean 0 and variance 1, as ``torch.nn.functional.layer_norm`` does."""
    mean = builder.add("ReduceMean", [value], f"{name}/mean", axes=[-1], keepdims=1)
    centred = builder.add("Sub", [value, mean], f"{name}/centred")
    square = builder.add("Mul", [centred, centred], f"{name}/square")
    variance = builder.add("ReduceMean", [square], f"{name}/variance", axes=[-1], keepdims=1)
    shifted = builder.add("Add", [variance, builder.number(1e-5)], f"{name}/variance_and_epsilon")
    return builder.add("Div", [centred, builder.add("Sqrt", [shifted], f"{name}/deviation")], name)


def _fields(builder: GraphBuilder, decoder: MNIFModel) -> str:
    """Lays the parameters that were mixed for decoding out by cell, behind those of a layer that all fields share."""
    parts = []
    for index in decoder.mixed_layers:
        shape = (-1, decoder.num_cells, decoder.shapes[index].parameters)
        parts.append(builder.reshape(f"layer_{index}/rows", shape, f"fields/layer_{index}"))
    if decoder.shared:
        largest = builder.add("ReduceMax", [parts[0]], "fields/largest", axes=[-1], keepdims=1)
        blank = builder.add("Mul", [largest, builder.number(0.0)], "fields/blank")
        shared = builder.constant("decoder.shared.0", decoder.shared[0])
        parts.insert(0, builder.add("Add", [blank, shared], "fields/layer_0"))
    return builder.add("Concat", parts, "fields/all", axis=2)


def _parameters(decoder: MNIFModel) -> int:
    return sum(shape.parameters for shape in decoder.shapes)


def _residuals(builder: GraphBuilder, decoder: MNIFModel, decoded: str, axes: Sequence[int]) -> tuple[str, str]:
    """Compares decoded values with those observed: mean squares by cell, [batch, cells], and of all, [batch]."""
    difference = builder.add("Sub", [decoded, "values"], "residuals/difference")
    seen = builder.add("Mul", [_mean_square(builder, difference, "residuals/error"), "mask"], "residuals/seen")
    cells = decoder.config.cells
    boxes = [(cells_of_pixels(pixels, cells) == np.arange(cells)[:, None]).astype(np.float32) for pixels in axes]
    sums = {
        name: _sum_in_boxes(builder, pixels, boxes, f"residuals/{name}")
        for name, pixels in (("errors", seen), ("counts", "mask"))
    }
    one = builder.number(1.0)
    by_cell = builder.add("Max", [sums["counts"], one], "residuals/counts/of_some")
    by_cell = builder.add("Div", [sums["errors"], by_cell], "residuals/by_cell")
    whole = {name: builder.reduce_sum(each, -1, f"residuals/{name}/whole", keep=False) for name, each in sums.items()}
    some = builder.add("Max", [whole["counts"], one], "residuals/whole/of_some")
    return by_cell, builder.add("Div", [whole["errors"], some], "residuals/whole")


def _patch_residuals(builder: GraphBuilder, axes: Sequence[int], patches: Sequence[int]) -> str:
    """Computes :func:`mnif.latents.patches.residuals_in_patches` of decoded values, [batch, patches]."""
    boxes = []
    for pixels, count in zip(axes, patches, strict=True):
        inside = (np.arange(pixels) * count // pixels == np.arange(count)[:, None]).astype(np.float32)
        boxes.append(inside / inside.sum(axis=1, keepdims=True))
    return _sum_in_boxes(builder, "residuals/error", boxes, "patches/residuals")


def _mean_square(builder: GraphBuilder, values: str, name: str) -> str:
    square = builder.add("Mul", [values, values], f"{name}/square")
    return builder.add("ReduceMean", [square], name, axes=[-1], keepdims=0)


def _sum_in_boxes(builder: GraphBuilder, pixels: str, boxes: Sequence[np.ndarray], name: str) -> str:
    """Sums pixels [batch, *axes] over boxes of the grid, [batch, boxes], by one product for each axis.

    Args:
        builder: of the graph.
        pixels: what is summed.
        boxes: for each axis [boxes, pixels] float32, how much of each pixel lies in each.
        name: of the result; what stands before its first slash names the boxes.
    """
    beyond = 1
    for axis in reversed(range(len(boxes))):
        count, length = boxes[axis].shape
        rows = builder.reshape(pixels, (-1, length, beyond), f"{name}/rows_{axis}")
        inside = builder.constant(f"{name.split('/')[0]}/boxes_{axis}", boxes[axis])
        pixels, beyond = builder.add("MatMul", [inside, rows], f"{name}/sum_{axis}"), beyond * count
    return builder.reshape(pixels, (-1, beyond), name)


def cells_of_pixels(resolution: int, cells: int) -> np.ndarray:
    """Finds the cell in which the centre of each pixel of an axis lies, [resolution] int64."""
    return ((np.arange(resolution) + 0.5) * cells / resolution).astype(np.int64)


@torch.no_grad()
def encoder_spec(
    encoder: GridEncoder, decoder: MNIFModel, latents: Tensor, seed: int, patches: Sequence[int] | None = None
) -> GraphSpec:
    """Specifies the encoder; ``latents`` [n, D], decoded, make the reference, the first whole, others in part."""
    model = encoder_graph(encoder, decoder, patches)
    size = model.graph.input[0]
    values = decoder(latents[: reference_count(model, size)]).clamp(-1, 1)
    mask = torch.from_numpy(np.random.default_rng(seed).random(values.shape[:-1]) < _SEEN).float()
    mask[0] = 1
    exact_encoder, exact_decoder = copy.deepcopy(encoder).double(), copy.deepcopy(decoder).double()
    reference = reference_of(
        "encoder",
        {"values": values.numpy(), "mask": mask.numpy()},
        encode_exactly(exact_encoder, exact_decoder, values.double(), mask.double(), patches),
        encode_exactly(encoder, decoder, values, mask, patches),
    )
    return GraphSpec("encoder", "encoder", model, batch_profile(model, size), reference)


@torch.no_grad()
def encode_exactly(
    encoder: GridEncoder, decoder: MNIFModel, values: Tensor, mask: Tensor, patches: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Computes what the graph does by the model itself, in the type of ``values``."""
    latents = encoder(values, mask)
    coefficients = decoder.coefficients(latents)
    decoded = decoder.decode_coefficients(coefficients, decoder.grid(values.shape[1:-1]))
    squares = ((decoded - values).square().mean(dim=-1) * mask).flatten(1)
    seen, count = mask.flatten(1), decoder.config.cells
    place = np.zeros((), np.int64)
    for pixels in values.shape[1:-1]:
        place = place[..., None] * count + cells_of_pixels(pixels, count)
    boxes = F.one_hot(torch.from_numpy(place.ravel()), decoder.num_cells).to(values)
    results = {
        "latents": latents,
        "coefficients": coefficients,
        "fields": decoder.bake(coefficients).params.view(len(values), decoder.num_cells, -1),
        "cell_residuals": squares @ boxes / (seen @ boxes).clamp_min(1),
        "residual": squares.sum(dim=1) / seen.sum(dim=1).clamp_min(1),
    }
    if patches is None:
        return results
    return results | {"patch_residuals": residuals_in_patches(values, decoded, patches)}
