"""The candidates of a trial: what each changes in the default, and the few that the product does not have.

A candidate that wins moves into the product; the others stay here, so that a trial can be repeated.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from losses import POINT_LOSSES, PointLoss
from noises import NOISES
from sparse import SPARSE_DECODERS
from torch import Tensor, nn

from mnif.models.cell_grid import CellGrid
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField, LayerShape, siren_params
from mnif.models.token_map import TokenMap
from mnif.training.methods import EncoderMethod


@dataclass(frozen=True)
class Variant:
    """One candidate.

    Attributes:
        arguments: flags of `mnif fit` that differ from the default.
        decoder: the class of the decoder.
        border_weight: of the squared difference of neighbouring fields where they overlap, added to the loss.
        muon: learning rate of Muon for "bases", "map" (latent to coefficients), "encoder" (its matrices and the map)
            or "narrow" (those with at most 256 rows or columns); the rest is Adam's.
        prepare: changes the decoder before training.
        errors: "shares" (the product's: a field answers for its points by its shares of their pixels), "even" (all of
            its points count alike) or "blended" (the error of the blended values alone).
        augment: changes a batch of pictures [B, H, W, C] at random before it is learned from.
        point_loss: in place of the squared error; not with another choice of ``errors``.
        noise: changes the noise on the latents of an encoder.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    decoder: type[MNIFModel] = MNIFModel
    border_weight: float = 0.0
    muon: dict[str, float] = field(default_factory=dict)
    prepare: Callable[[MNIFModel], None] = lambda decoder: None
    augment: Callable[[Tensor], Tensor] | None = None
    errors: str = "shares"
    point_loss: PointLoss | None = None
    noise: Callable[[EncoderMethod], None] | None = None


class MixedFirstLayer(MNIFModel):
    """Delta mixing of every layer, the first one too."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        config, shape = self.config, self.shapes[0]
        first = siren_params(shape, 1 + config.num_bases, config.omega, first=True, sine=True)
        self.shared = nn.ParameterList()
        self.mixed_layers = list(range(len(self.shapes)))
        self.means = nn.ParameterList([nn.Parameter(first[:1]), *self.means])
        self.bases = nn.ParameterList([nn.Parameter(first[1:]), *self.bases])
        self.coefficient_map = _small_map(config, len(self.bases))


class MatrixForEveryToken(MNIFModel):
    """Tokens: a matrix for each of them in place of the network that all places share."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.coefficient_map = _MatrixForEveryToken(self.coefficient_map)


class _MatrixForEveryToken(nn.Module):
    def __init__(self, shared: TokenMap):
        super().__init__()
        self.around, self.order, self.bias = shared.around, shared.order, shared.bias
        inputs = shared.read.in_features
        weights = torch.randn(len(self.around), inputs, shared.write.out_features)
        self.weights = nn.Parameter(0.1 / inputs**0.5 * weights)

    def forward(self, latents: Tensor) -> Tensor:
        tokens = latents.view(len(latents), len(self.around), -1)[:, self.around.flatten()]
        heard = tokens.view(len(latents), len(self.around), -1)
        mapped = torch.einsum("bti,tio->bto", heard, self.weights).reshape(len(latents), len(self.order), -1)
        return mapped[:, self.order].flatten(1) + self.bias


class PlacedTokens(MNIFModel):
    """Tokens: the network that all places share is told where it is."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        token_map = self.coefficient_map
        token_map.place = nn.Parameter(torch.zeros(1, len(token_map.around), token_map.read.out_features))
        token_map.read.register_forward_hook(lambda module, inputs, hidden: hidden + token_map.place)


class ThroughTokens(MNIFModel):
    """A global latent from which a matrix makes 4x4 tokens of 16 numbers, and the network that all places share hears
    these."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        config, numbers = self.config, 4**self.config.dimensions * 16
        of_a_cell = self.coefficient_map.out_features // self.num_cells
        shared = TokenMap(numbers, config.dimensions, 4, config.cells, of_a_cell, bias=0.0)
        self.coefficient_map = nn.Sequential(nn.Linear(config.latent_dim, numbers), shared)
        nn.init.normal_(self.coefficient_map[0].weight, std=config.latent_dim**-0.5)


class SharedFirstAverage(MNIFModel):
    """The plain weighted average, but for the first layer, which is one for all fields."""

    def __init__(self, **settings: Any):
        super().__init__(**settings | {"mixing": "delta"})
        self.means = nn.ParameterList()
        nn.init.constant_(self.coefficient_map.bias, 1.0)


class Multiplicative(MNIFModel):
    """W = W_mean ⊙ (1 + Σ_m α_m B_m), with bases that start at N(0, 1)."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        for bases in self.bases:
            nn.init.normal_(bases)

    def bake(self, coefficients: Tensor) -> BakedField:
        flat = coefficients.reshape(-1, *coefficients.shape[2:])
        rows = [row.expand(len(flat), -1) for row in self.shared]
        for index, bases in enumerate(self.bases):
            rows.append(self.means[index] * (1 + flat[:, index] @ bases))
        return BakedField(self.shapes, torch.cat(rows, dim=1), self.config.output_sine)


class Finer(MNIFModel):
    """sin((|x| + 1) x) in place of sin(x) (FINER; Liu et al., CVPR 2024)."""

    def decode_coefficients(self, coefficients: Tensor, grid: CellGrid) -> Tensor:
        field = self.bake(coefficients)
        hidden = grid.coordinates.repeat(len(field.params) // len(grid.coordinates), 1, 1)
        for index, (weight, bias) in enumerate(field.layers()):
            hidden = torch.baddbmm(bias, hidden, weight)
            if index < len(self.shapes) - 1:
                hidden = torch.sin((hidden.detach().abs() + 1) * hidden)
        return grid.blend(hidden.view(len(coefficients), -1, *hidden.shape[1:]))


class GlobalAndLocal(MNIFModel):
    """One field over the whole domain, and a correction by the field of each cell."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        whole = settings | {"cells": 1, "omega": settings["omega"] * 3}
        self.whole = MNIFModel(**whole)
        with torch.no_grad():
            for rows in (*self.means[-1:], *self.bases[-1:]):
                rows *= 0.1

    def coefficients(self, latents: Tensor) -> Tensor:
        self.whole_coefficients = self.whole.coefficients(latents)
        return super().coefficients(latents)

    def decode_coefficients(self, coefficients: Tensor, grid: CellGrid) -> Tensor:
        local = super().decode_coefficients(coefficients, grid)
        resolution = [len(first) for first, _, _ in grid.axes]
        return local + self.whole.decode_coefficients(self.whole_coefficients, self.whole.grid(resolution))


class InterpolatedCoefficients(MNIFModel):
    """Coefficients on the corners of the cells, interpolated in between, so that weights change without a step.

    A layer with interpolated weights is the interpolation of its corners' layers before the sine, so a cell evaluates
    2^d layers where one field has one. Coordinates are those of the cell, and the corners' first layer is shared.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings | {"overlap": 0.0})
        config = self.config
        self.knots = config.cells + 1
        self.coefficient_map = nn.Linear(config.latent_dim, self.knots**2 * len(self.bases) * config.num_bases)
        nn.init.normal_(self.coefficient_map.weight, std=0.1 / config.latent_dim**0.5)
        nn.init.zeros_(self.coefficient_map.bias)
        first = LayerShape(2, config.width)
        omega = config.omega * config.cells / 2  # coordinates of the whole domain
        self.shared = nn.ParameterList([nn.Parameter(siren_params(first, 1, omega, first=True, sine=True))])

    def coefficients(self, latents: Tensor) -> Tensor:
        mapped = self.coefficient_map(latents).view(len(latents), self.knots**2, -1, self.config.num_bases)
        return mapped / self.config.num_bases**0.5

    def decode_coefficients(self, coefficients: Tensor, grid: CellGrid) -> Tensor:
        batch, cells = len(coefficients), self.config.cells
        knots = torch.arange(self.knots**2).view(self.knots, self.knots)
        corners = [knots[i : i + cells, j : j + cells].flatten() for i in (0, 1) for j in (0, 1)]
        across = (grid.coordinates + 1) / 2  # [1, points, 2] of one cell
        u, v = across[..., :1], across[..., 1:]
        weights = [(1 - u) * (1 - v), (1 - u) * v, u * (1 - v), u * v]
        place = torch.cartesian_prod(torch.arange(cells), torch.arange(cells)).float()[:, None]
        whole = (place + across) / cells * 2 - 1  # [cells², points, 2]
        weight, bias = self.shapes[0].split(self.shared[0])
        hidden = torch.sin(whole @ weight[0] + bias[0]).repeat(batch, 1, 1)
        flat = coefficients.reshape(-1, *coefficients.shape[2:])
        for index, layer in enumerate(self.mixed_layers):
            rows = torch.addmm(self.means[index], flat[:, index], self.bases[index]).view(batch, self.knots**2, -1)
            total: Any = 0
            for share, corner in zip(weights, corners, strict=True):
                weight, bias = self.shapes[layer].split(rows[:, corner].flatten(0, 1))
                total = total + share * torch.baddbmm(bias, hidden, weight)
            hidden = torch.sin(total) if layer < len(self.shapes) - 1 else total
        return grid.blend(hidden.view(batch, -1, *hidden.shape[1:]))


def _small_map(config: Any, layers: int) -> nn.Linear:
    """The latent → coefficients map as :class:`MNIFModel` starts it, for another number of mixed layers."""
    made = nn.Linear(config.latent_dim, config.cells**config.dimensions * layers * config.num_bases)
    nn.init.normal_(made.weight, std=0.1 / config.latent_dim**0.5)
    nn.init.zeros_(made.bias)
    return made


@torch.no_grad()
def _hidden_omega(decoder: MNIFModel, factor: float) -> None:
    """Another frequency after the first layer: with w0 folded in it is the size of the biases alone."""
    for index, layer in enumerate(decoder.mixed_layers):
        shape = decoder.shapes[layer]
        for rows in (*decoder.means[index : index + 1], decoder.bases[index]):
            if layer < len(decoder.shapes) - 1:
                rows[:, shape.inputs * shape.outputs :] *= factor


@torch.no_grad()
def _spread_first_layer(decoder: MNIFModel) -> None:
    """Frequencies of the first layer spread over octaves instead of one band."""
    row, shape = decoder.shared[0], decoder.shapes[0]
    octaves = 2.0 ** torch.linspace(-2, 1, shape.outputs)
    row[:, : shape.inputs * shape.outputs] *= octaves.repeat(shape.inputs)


def _permuted_colours(values: Tensor) -> Tensor:
    """Every picture with its channels in a random order."""
    order = torch.rand(len(values), 1, 1, values.shape[-1]).argsort(dim=-1)
    return values.gather(-1, order.expand_as(values))


def _turned_colours(values: Tensor) -> Tensor:
    """Every picture with its colours turned about the grey axis by a random angle."""
    angle = torch.rand(len(values)) * 2 * torch.pi
    cosine, sine = angle.cos()[:, None, None], angle.sin()[:, None, None] / 3**0.5
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    turn = cosine * torch.eye(3) + (1 - cosine) / 3 + sine * cross
    return torch.einsum("bhwc,bdc->bhwd", values, turn).clamp(-1, 1)


def _shifted(values: Tensor) -> Tensor:
    """Every picture moved by up to two pixels, its rim repeated."""
    size, reach = values.shape[1], 2
    rows = (torch.arange(size) + torch.randint(-reach, reach + 1, (len(values), 1))).clamp(0, size - 1)
    columns = (torch.arange(size) + torch.randint(-reach, reach + 1, (len(values), 1))).clamp(0, size - 1)
    batch = torch.arange(len(values))[:, None, None]
    return values[batch, rows[:, :, None], columns[:, None, :]]


def _first(arguments: dict[str, Any] | None = None, **changes: Any) -> Variant:
    """A candidate of the first round, when Adam moved everything and the blended values were compared alone."""
    return Variant({"matrix_optimizer": "adamw"} | (arguments or {}), errors="blended", **changes)


FIRST_ROUND = {
    "first default": _first(),
    "mixed first layer": _first(decoder=MixedFirstLayer),
    "plain average, shared first layer": _first(decoder=SharedFirstAverage),
    "plain average": _first({"mixing": "average"}),
    "multiplicative bases": _first(decoder=Multiplicative),
    "FINER activation": _first(decoder=Finer),
    "FINER activation, omega 4": _first({"omega": 4.0}, decoder=Finer),
    "output sine": _first({"output_sine": True}),
    "hidden biases a tenth": _first(prepare=lambda decoder: _hidden_omega(decoder, 0.1)),
    "first layer over three octaves": _first(prepare=_spread_first_layer),
    "a quarter of the pixels a step": _first({"stride": 2}),
    "global field and local corrections": _first(decoder=GlobalAndLocal),
    "interpolated coefficients": _first(decoder=InterpolatedCoefficients),
    "overlap 1/16": _first({"overlap": 1 / 16}),
    "overlap 1/8": _first({"overlap": 1 / 8}),
    "overlap 5/16": _first({"overlap": 5 / 16}),
    "overlap 1/2": _first({"overlap": 0.5}),
    "border loss 0.1": _first(border_weight=0.1),
    "border loss 1": _first(border_weight=1.0),
    "Muon for bases, 0.01": _first(muon={"bases": 0.01}),
    "Muon for bases, 0.04": _first(muon={"bases": 0.04}),
    "Muon for the map, 0.005": _first(muon={"map": 0.005}),
    "Muon for encoder and map, 0.005": _first(muon={"encoder": 0.005}),
    "Muon for narrow matrices, 0.005": _first(muon={"narrow": 0.005}),
    "rates doubled": _first({"learning_rate": 8e-3, "basis_learning_rate": 2.4e-2}),
    "rates halved": _first({"learning_rate": 2e-3, "basis_learning_rate": 6e-3}),
    "channels in any order": _first(augment=_permuted_colours),
}
SECOND_ROUND = {
    "default": Variant(),
    "AdamW": Variant({"matrix_optimizer": "adamw"}),
    "blended error": Variant(errors="blended"),
    "even weights": Variant(errors="even"),
    "rate 0.005": Variant({"learning_rate": 5e-3}),
    "rate 0.01": Variant({"learning_rate": 1e-2}),
    "bases' rate doubled": Variant({"basis_learning_rate": 2.4e-2}),
    "no warm-up": Variant({"lr_warmup_steps": 0}),
    "warm-up of 300 steps": Variant({"lr_warmup_steps": 300}),
    "one field of width 48": Variant({"cells": 1, "width": 48}),
    "2x2 cells of width 32": Variant({"cells": 2, "width": 32}),
    "8x8 cells of width 16": Variant({"cells": 8, "width": 16}),
    "shared coefficients": Variant({"coefficient_form": "shared"}),
    "a plain average": Variant({"mixing": "average"}),
    "an average after a shared first layer": Variant(decoder=SharedFirstAverage),
    "every layer mixed": Variant(decoder=MixedFirstLayer),
    "overlap of 1/8": Variant({"overlap": 1 / 8}),
    "overlap of 1/4": Variant({"overlap": 1 / 4}),
    "colours turned": Variant(augment=_turned_colours),
    "colours' channels in any order": Variant(augment=_permuted_colours),
    "shifted by up to two pixels": Variant(augment=_shifted),
    "128 bases of width 32": Variant({"num_bases": 128, "width": 32}),
    "latent noise 0.3": Variant({"latent_noise": 0.3}),
    "FINER, blended error": Variant(decoder=Finer, errors="blended"),
    "first layer spread over three octaves": Variant(prepare=_spread_first_layer),
    "hidden biases at a tenth": Variant(prepare=lambda decoder: _hidden_omega(decoder, 0.1)),
    "every second pixel along each axis": Variant({"stride": 2}),
    "multiplied bases": Variant(decoder=Multiplicative),
    "Muon for bases too, 0.01": Variant(muon={"bases": 0.01}),
}
_TOKENS = {"latent_layout": "tokens"}
TOKENS = {
    "a matrix for every token": Variant(_TOKENS, MatrixForEveryToken),
    "tokens that know their place": Variant(_TOKENS, PlacedTokens),
    "global, through tokens": Variant(decoder=ThroughTokens),
}
SPARSE = {name: Variant({"sparsity_rule": "largest"}, decoder=decoder) for name, decoder in SPARSE_DECODERS.items()}
SHARP = {name: Variant(point_loss=loss) for name, loss in POINT_LOSSES.items()}
SHARP |= {f"gradients, {weight}": Variant({"gradient_weight": weight}) for weight in (0.1, 0.5, 2.0)}
NOISY = {name: Variant(noise=noise) for name, noise in NOISES.items()}

VARIANTS = FIRST_ROUND | SECOND_ROUND | TOKENS | SPARSE | SHARP | NOISY
