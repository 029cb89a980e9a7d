"""Nodes from latents to mixture coefficients, as :class:`mnif.models.mnif_model.MNIFModel` maps them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from export.graphs.builder import GraphBuilder
from mnif.models.mnif_model import MNIFModel
from mnif.models.sparse_coefficients import FADE, floor_of
from mnif.models.token_map import TokenMap


def coefficients_of(builder: GraphBuilder, decoder: MNIFModel, latents: str) -> str:
    """Maps latents [batch, latent_dim] to coefficients [batch, cells · layers · bases], as the model does."""
    scale = 1 / decoder.coefficient_scale
    parts = _split_latents(builder, decoder, latents)
    first = parts[0]
    if decoder.coefficient_map is None and decoder.config.mixing == "average":
        first = builder.add("Add", [first, builder.number(1.0)], "coefficients/shifted")
    mapped = _mapped(builder, decoder.coefficient_map, "coefficient_map", first, scale, "coefficients/flat")
    for number, growth in enumerate(decoder.later, 1):
        weights, name = f"later.{number - 1}.coefficient_map", f"coefficients/{number}"
        heard = _heard(builder, decoder, parts[: number + 1], name)
        said = _mapped(builder, growth.coefficient_map, weights, heard, scale, f"{name}/said")
        mapped = _grown_coefficients(builder, decoder, number, mapped, said, name)
    if decoder.is_sparse_by_place:
        mapped = _at_their_places(builder, decoder, mapped)
    elif decoder.active_bases is not None:
        mapped = _sparse(builder, decoder, mapped, decoder.active_bases)
    if decoder.config.coefficient_form != "shared":
        return mapped
    by_cell = builder.reshape(mapped, (-1, 1, decoder.config.num_bases), "coefficients/shared")
    return builder.add("Concat", [by_cell] * len(decoder.bases), "coefficients/by_layer", axis=1)


def _at_their_places(builder: GraphBuilder, decoder: MNIFModel, coefficients: str) -> str:
    """Gives the bases that a cell does not take coefficients of zero: [batch, cells · layers · bases]."""
    name, (cells, taken) = "coefficients/by_place", decoder.taken.shape
    vectors = 1 if decoder.config.coefficient_form == "shared" else len(decoder.bases)
    begins = np.arange(0, cells * vectors * taken, taken).reshape(cells, vectors, 1)
    origins = np.zeros((cells, vectors, decoder.config.num_bases), dtype=np.int64)
    present = np.zeros(origins.shape, dtype=np.float32)
    places = np.broadcast_to(decoder.taken.cpu().numpy()[:, None], (cells, vectors, taken))
    np.put_along_axis(origins, places, begins + np.arange(taken), axis=2)
    np.put_along_axis(present, places, 1, axis=2)
    origin = builder.constant("coefficients/origins", origins.reshape(-1))
    gathered = builder.add("Gather", [coefficients, origin], f"{name}/gathered", axis=1)
    return builder.add("Mul", [gathered, builder.constant("coefficients/present", present.reshape(1, -1))], name)


def _sparse(builder: GraphBuilder, decoder: MNIFModel, coefficients: str, active: Sequence[int]) -> str:
    """Keeps ``active`` of each generation's bases, in rows [batch · cells · layers, bases]."""
    name = "coefficients/sparse"
    rows = builder.reshape(coefficients, (-1, decoder.config.num_bases), f"{name}/rows")
    if not decoder.later:
        return _keep_largest(builder, rows, active[0], name)
    names = [f"{name}/{number}" for number in range(len(active))]
    parts = builder.split(rows, decoder.generations, [f"{each}/rows" for each in names])
    kept = [
        _keep_largest(builder, part, count, each) if count < bases else part
        for part, count, bases, each in zip(parts, active, decoder.generations, names, strict=True)
    ]
    return builder.add("Concat", kept, name, axis=1)


def _keep_largest(builder: GraphBuilder, rows: str, active: int, name: str) -> str:
    """Shrinks all but ``active`` of each row to zero, as :mod:`mnif.models.sparse_coefficients` does."""
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


def _heard(builder: GraphBuilder, decoder: MNIFModel, parts: Sequence[str], name: str) -> str:
    """Lays out what a generation's map hears, [batch, numbers], as :func:`mnif.models.growth.what_is_heard` does."""
    *earlier, own = parts
    *sizes, added = decoder.latent_parts[: len(parts)]
    count, earlier_map = decoder.num_tokens, decoder.later[len(earlier) - 1].earlier_map
    if earlier_map is None:
        return own
    square = builder.add("Mul", [own, own], f"{name}/square")
    presence = builder.add("ReduceMean", [square], f"{name}/mean_square", axes=[1], keepdims=1)
    presence = builder.reshape(presence, (-1, 1, 1), f"{name}/presence")
    tokens = [
        builder.reshape(part, (-1, numbers), f"{name}/{part}") for part, numbers in zip(earlier, sizes, strict=True)
    ]
    before = builder.add("Concat", tokens, f"{name}/earlier", axis=1)
    weight = builder.constant(f"decoder.later.{len(earlier) - 1}.earlier_map.weight", earlier_map.weight)
    mixed = builder.linear(before, weight, None, f"{name}/mixed")
    mixed = builder.reshape(mixed, (-1, count, added), f"{name}/mixed/by_token")
    mixed = builder.add("Mul", [mixed, presence], f"{name}/mixed/present")
    ones = builder.constant("tokens/ones", np.ones((1, count, 1), dtype=np.float32))
    present = builder.add("Mul", [presence, ones], f"{name}/presence/of_each")
    own = builder.reshape(own, (-1, count, added), f"{name}/own")
    heard = builder.add("Concat", [own, mixed, present], f"{name}/heard/by_token", axis=2)
    return builder.reshape(heard, (-1, count * (2 * added + 1)), f"{name}/heard")


def _grown_coefficients(
    builder: GraphBuilder, decoder: MNIFModel, generation: int, before: str, said: str, name: str
) -> str:
    """Adds what a latent says to the coefficients before a generation, as :class:`mnif.models.growth.Growth` does."""
    vectors = decoder.num_cells * (1 if decoder.config.coefficient_form == "shared" else len(decoder.bases))
    earlier, added = sum(decoder.mapped_bases[:generation]), decoder.mapped_bases[generation]
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
