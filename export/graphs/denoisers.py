"""Denoisers as nodes of a graph, at one timestep: what the time says is a constant of each step."""

from collections.abc import Iterable
from typing import TypeAlias, cast

import torch

from export.graphs.builder import GraphBuilder
from latent_prior.denoiser_blocks import ResidualBlock, TransformerBlock
from latent_prior.denoisers import ResMLPDenoiser, TransformerDenoiser
from latent_prior.settings import HEAD_WIDTH
from mnif.models.mnif_model import MNIFModel

ExportedDenoiser: TypeAlias = ResMLPDenoiser | TransformerDenoiser


@torch.no_grad()
def denoise(builder: GraphBuilder, denoiser: ExportedDenoiser, sample: str, timestep: float, name: str) -> str:
    """Evaluates a denoiser once.

    Args:
        builder: of the graph.
        denoiser: whose weights are stored under their names, once for all steps.
        sample: noisy standardised latents, [batch, latent_dim].
        timestep: the scheduler's, 0 to 1000.
        name: begins the names of all that is added.

    Returns:
        The name of the prediction, [batch, latent_dim].
    """
    if isinstance(denoiser, TransformerDenoiser):
        return _transformer(builder, denoiser, sample, timestep, name)
    return _residual(builder, denoiser, sample, timestep, name)


def _residual(builder: GraphBuilder, denoiser: ResMLPDenoiser, sample: str, timestep: float, name: str) -> str:
    """Evaluates a residual network over whole latents."""
    weights = dict(denoiser.named_parameters())

    def weight_named(parameter: str) -> str:
        return builder.constant(f"denoiser.{parameter}", weights[parameter])

    time = denoiser.time_embedding(timestep)
    hidden = builder.linear(sample, weight_named("read.weight"), weight_named("read.bias"), f"{name}/read")
    for index, block in enumerate(cast(Iterable[ResidualBlock], denoiser.blocks)):
        here, place = f"{name}/block_{index}", f"blocks.{index}"
        # up((normal · gain) (1 + scale) + shift) = up.weight @ (normal · factor) + up(shift), both constant at a step.
        scale, shift = block.modulation(time).chunk(2, dim=-1)
        factor = builder.constant(f"{here}/factor", block.norm.weight * (1 + scale))
        offset = builder.constant(f"{here}/offset", block.up(shift))
        inner = builder.add("Mul", [_normalize(builder, hidden, block.norm, here), factor], f"{here}/modulated")
        inner = builder.linear(inner, weight_named(f"{place}.up.weight"), offset, f"{here}/up")
        inner = _silu(builder, inner, here)
        inner = builder.linear(
            inner, weight_named(f"{place}.down.weight"), weight_named(f"{place}.down.bias"), f"{here}/down"
        )
        hidden = builder.add("Add", [hidden, inner], f"{here}/out")
    hidden = builder.add(
        "Mul", [_normalize(builder, hidden, denoiser.norm, name), weight_named("norm.weight")], f"{name}/norm"
    )
    return builder.linear(hidden, weight_named("write.weight"), weight_named("write.bias"), f"{name}/write")


def _transformer(builder: GraphBuilder, denoiser: TransformerDenoiser, sample: str, timestep: float, name: str) -> str:
    """Evaluates a transformer; a row is a token, [batch · tokens, width], but where tokens hear each other."""
    weights = dict(denoiser.named_parameters())

    def linear(rows: str, layer: str, output: str, offset: torch.Tensor | None = None) -> str:
        bias = weights[f"{layer}.bias"] if offset is None else offset
        stored = f"denoiser.{layer}.bias" if offset is None else f"{output}/offset"
        matrix = builder.constant(f"denoiser.{layer}.weight", weights[f"{layer}.weight"])
        return builder.linear(rows, matrix, builder.constant(stored, bias), output)

    def modulated(rows: str, norm: torch.nn.RMSNorm, scale: torch.Tensor, output: str) -> str:
        factor = builder.constant(f"{output}/factor", 1 + scale)  # the shift is in the offset of what reads it
        return builder.add("Mul", [_normalize(builder, rows, norm, output), factor], f"{output}/modulated")

    def gated(rows: str, inner: str, gate: torch.Tensor, output: str) -> str:
        inner = builder.add("Mul", [inner, builder.constant(f"{output}/gate", gate)], f"{output}/gated")
        return builder.add("Add", [rows, inner], f"{output}/out")

    time, (count, width) = denoiser.time_embedding(timestep), denoiser.positions.shape
    rows = builder.reshape(sample, (-1, denoiser.read.in_features), f"{name}/rows")
    rows = builder.reshape(linear(rows, "read", f"{name}/read"), (-1, count, width), f"{name}/tokens")
    positions = builder.constant("denoiser.positions", denoiser.positions)
    rows = builder.reshape(builder.add("Add", [rows, positions], f"{name}/placed"), (-1, width), f"{name}/stream")
    for index, block in enumerate(cast(Iterable[TransformerBlock], denoiser.blocks)):
        here, place = f"{name}/block_{index}", f"blocks.{index}"
        scale, shift, gate, scale_up, shift_up, gate_down = block.modulation(time).chunk(6, dim=-1)
        inner = modulated(rows, block.norm, scale, f"{here}/attention")
        inner = linear(inner, f"{place}.attend", f"{here}/attend", block.attend(shift))
        inner = linear(_attention(builder, inner, count, width, here), f"{place}.merge", f"{here}/merge")
        rows = gated(rows, inner, gate, f"{here}/attention")
        inner = modulated(rows, block.norm, scale_up, f"{here}/network")
        inner = _silu(builder, linear(inner, f"{place}.up", f"{here}/up", block.up(shift_up)), here)
        rows = gated(rows, linear(inner, f"{place}.down", f"{here}/down"), gate_down, f"{here}/network")
    scale, shift = denoiser.modulation(time).chunk(2, dim=-1)
    rows = linear(modulated(rows, denoiser.norm, scale, name), "write", f"{name}/write", denoiser.write(shift))
    return builder.reshape(rows, (-1, count * denoiser.write.out_features), f"{name}/prediction")


def _attention(builder: GraphBuilder, parts: str, count: int, width: int, name: str) -> str:
    """Lets tokens hear each other: queries, keys and values [batch · tokens, 3 width] → [batch · tokens, width]."""
    heads = max(width // HEAD_WIDTH, 1)
    names = [f"{name}/{part}" for part in ("query", "key", "value")]
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])  # [batch, heads, tokens, numbers], keys ready to be multiplied
    query, key, value = (
        builder.add(
            "Transpose",
            [builder.reshape(part, (-1, count, heads, width // heads), f"{part}/heads")],
            f"{part}/by_head",
            perm=order,
        )
        for part, order in zip(builder.split(parts, [width] * 3, names), orders, strict=True)
    )
    query = builder.add("Mul", [query, builder.number((width // heads) ** -0.5)], f"{name}/query/scaled")
    shares = builder.add("Softmax", [builder.add("MatMul", [query, key], f"{name}/scores")], f"{name}/shares", axis=-1)
    heard = builder.add("MatMul", [shares, value], f"{name}/heard")
    heard = builder.add("Transpose", [heard], f"{name}/heard/by_token", perm=[0, 2, 1, 3])
    return builder.reshape(heard, (-1, width), f"{name}/heard/rows")


def _normalize(builder: GraphBuilder, hidden: str, norm: torch.nn.RMSNorm, name: str) -> str:
    """Divides by the root mean square, x / sqrt(mean(x²) + eps) over the last axis, without the gain."""
    square = builder.add("Mul", [hidden, hidden], f"{name}/square")
    mean = builder.add("ReduceMean", [square], f"{name}/mean", axes=[-1], keepdims=1)
    shifted = builder.add("Add", [mean, builder.number(cast(float, norm.eps))], f"{name}/mean_and_epsilon")
    root = builder.add("Sqrt", [shifted], f"{name}/root")
    return builder.add("Div", [hidden, root], f"{name}/normal")


def _silu(builder: GraphBuilder, hidden: str, name: str) -> str:
    """x · sigmoid(x)."""
    return builder.add("Mul", [hidden, builder.add("Sigmoid", [hidden], f"{name}/sigmoid")], f"{name}/silu")


@torch.no_grad()
def for_decoder(denoiser: ExportedDenoiser, decoder: MNIFModel) -> ExportedDenoiser:
    """Copies a denoiser for a padded decoder, whose fingerprint is another; its own decoder gets itself."""
    fingerprint = decoder.fingerprint()
    if denoiser.config.decoder_fingerprint == fingerprint:
        return denoiser
    settings = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    moved = type(denoiser)(**settings | {"decoder_fingerprint": fingerprint, "rounded_fingerprints": ()}).eval()
    moved.load_state_dict(denoiser.state_dict())
    return moved
