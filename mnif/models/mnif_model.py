"""The model of stage one: shared basis networks, and the way from a latent to one light field per cell.

latent z [B, D] → coefficients α [B, cells, layers, M] → bake: one matrix product per layer, α @ bases → a field per
cell → blended values on a grid. You et al., *Generative Neural Fields by Mixtures of Neural Implicit Functions*
(NeurIPS 2023), section 3; the cells and the delta form are this project's.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor, nn

from mnif.models.cell_grid import CellGrid, assign_points, cell_grid
from mnif.models.growth import Generation, Growth, GrowthShape
from mnif.models.io import OwnMemory
from mnif.models.siren import BakedField, layer_shapes, siren_params
from mnif.models.sparse_coefficients import (
    bases_by_place,
    check_sparsity,
    gathering_pays,
    keep_largest_of_each,
    mix_gathered,
    share_of_each,
)
from mnif.models.token_map import TokenMap, check_tokens
from mnif.utils.json_files import Depth, Size
from mnif.utils.pixels import as_axes

MOST_POINTS, _MOST_CELLS = 1 << 26, 1 << 16  # that no weight bounds: 8192² points, 256² cells
_MOST_TAKEN = 1 << 24  # bases that cells take by place, all cells together; likewise


class MNIFModel(OwnMemory, ModelMixin, ConfigMixin):
    """Mixtures of neural implicit functions.

    Two forms of mixing:

    - ``"delta"``: W = W_mean + Σ_m α_m B_m; the first layer is one for all fields and is not mixed.
    - ``"average"``: W = Σ_m α_m B_m for every layer, the paper's form with ``cells=1``. The coefficients start near
      1/sqrt(M), not 1/M: averaging M independent networks at 1/M would shrink the weights by sqrt(M) and leave the
      field dead at the start.

    Three ways from a latent to coefficients:

    - ``"layer"``: a linear map gives every layer of every cell coefficients of its own.
    - ``"shared"``: the layers of a cell share one vector of coefficients.
    - ``"direct"``: there is no map; the latent is the coefficients, D = cells^d · mixed layers · M.

    Two layouts of a latent: all cells hear all of it; or it is tokens on a grid, and a cell hears its own token and
    those around it (:class:`mnif.models.token_map.TokenMap`).

    Args:
        channels: values per point (3 for colours).
        dimensions: d, coordinates per point (2 for images).
        resolution: pixels per axis of the training data, the default of decoding; one number, or one for each axis.
        num_bases: M, basis networks per layer.
        width: hidden units of a field.
        depth: hidden-to-hidden layers; a field has ``depth + 2`` linear layers.
        latent_dim: D, numbers in a latent; with ``"direct"`` it is worked out and must be None.
        cells: cells per axis; 1 is one global field.
        overlap: how far a cell's field reaches over its borders, as a fraction of its width, 0 to 0.5.
        omega: w0 of the sines.
        mixing: ``"delta"`` or ``"average"``.
        coefficient_form: ``"layer"``, ``"shared"`` or ``"direct"``.
        output_sine: a sine follows the last layer too, as the paper's image fields have it.
        signal: what the fields show, by its name in :mod:`mnif.signals.registry`.
        signal_settings: of the signal; default: pictures of this resolution and these channels.
        tokens: along each axis, a divisor of ``cells``; D is a multiple of their number. None: the latent is global.
        coefficient_sparsity: bases that a layer of a cell takes at most, below M; the coefficients of the others are
            zero. For ``"delta"``. None: all bases. Of a model that was grown it is of the first generation's bases;
            every later one takes as large a share of its own.
        sparsity_rule: which they are: ``"place"``, those of the cell's own region, the same for all latents, so that
            the map has coefficients of no others (:func:`mnif.models.sparse_coefficients.bases_by_place`); they are
            a divisor of M, and start as one set for all regions. Or ``"largest"``, those with the largest
            coefficients (:func:`mnif.models.sparse_coefficients.keep_largest`), as in models of earlier versions.
        growths: what the model was grown by, in order; M and D count all of it (:mod:`mnif.models.growth`).
        lineage: of a model that was grown, what is known of each generation, the first one first.

    Raises:
        ValueError: an argument is out of range.
    """

    @register_to_config
    def __init__(
        self,
        channels: Size = 3,
        dimensions: Annotated[int, Meta(ge=1, le=8)] = 2,
        resolution: Size | Sequence[Size] = 32,
        num_bases: Size = 96,
        width: Size = 24,
        depth: Depth = 2,
        latent_dim: Size | None = 128,
        cells: Size = 4,
        overlap: float = 0.1875,
        omega: float = 10.0,
        mixing: str = "delta",
        coefficient_form: str = "layer",
        output_sine: bool = False,
        signal: str = "image",
        signal_settings: dict[str, Any] | None = None,
        tokens: Size | None = None,
        coefficient_sparsity: Size | None = None,
        sparsity_rule: str = "largest",
        growths: Sequence[GrowthShape] = (),
        lineage: Sequence[Generation] = (),
    ):
        super().__init__()
        _check_form(mixing, coefficient_form, overlap)
        added = [growth["num_bases"] for growth in growths]
        self.generations = [num_bases - sum(added), *added]
        check_sparsity(coefficient_sparsity, self.generations[0], mixing, sparsity_rule, self.num_cells)
        if signal_settings is None:
            self.register_to_config(signal_settings={"resolution": resolution, "channels": channels})
        if math.prod(as_axes(resolution, dimensions)) > MOST_POINTS or cells**dimensions > _MOST_CELLS:
            limits = f"at most {MOST_POINTS} points and {_MOST_CELLS} cells"
            raise ValueError(f"resolution {resolution}, cells {cells}: {limits}")
        shapes = layer_shapes(dimensions, channels, width, depth)
        last = len(shapes) - 1

        def rows(index: int, count: int) -> Tensor:
            sine = index < last or output_sine
            return siren_params(shapes[index], count, omega, first=index == 0, sine=sine)

        delta = mixing == "delta"
        self.shapes = shapes
        self.shared = nn.ParameterList([nn.Parameter(rows(0, 1))] if delta else [])
        self.mixed_layers = list(range(len(self.shared), len(shapes)))
        self.means = nn.ParameterList([nn.Parameter(rows(index, 1)) for index in self.mixed_layers] if delta else [])
        if tokens is not None:
            check_tokens(tokens, cells, dimensions, latent_dim, coefficient_form)
        vectors = self.num_cells * (1 if coefficient_form == "shared" else len(self.mixed_layers))
        if coefficient_form == "direct":
            numbers = vectors * sum(self.mapped_bases)
            if latent_dim not in (None, numbers):
                raise ValueError(f"latent_dim {latent_dim}: direct coefficients make it {numbers}")
            self.register_to_config(latent_dim=numbers)
        elif latent_dim is None:
            raise ValueError("latent_dim: a number is needed unless coefficients are direct")
        self._check_growths(vectors)
        of_a_cell = self.mapped_bases[0]
        sets = self.generations[0] // of_a_cell
        self.bases = nn.ParameterList(
            nn.Parameter(rows(index, of_a_cell).repeat(sets, 1)) for index in self.mixed_layers
        )
        bias = 0.0 if delta else 1.0
        self.coefficient_map = self._map(self.latent_parts[0] * self.num_tokens, vectors * of_a_cell, bias)
        later = []
        for number, growth in enumerate(growths, 1):
            new = [nn.Parameter(rows(index, growth["num_bases"])) for index in self.mixed_layers]
            heard = 2 * growth["latent_dim"] + self.num_tokens
            said = self._map(heard, vectors * sum(self.mapped_bases[: number + 1]), None)
            later.append(Growth(new, said, self.latent_parts[: number + 1], self.num_tokens))
        self.later = cast(Sequence[Growth], nn.ModuleList(later))
        if self.is_sparse_by_place:
            if self.num_cells * sum(self.mapped_bases) > _MOST_TAKEN:
                raise ValueError(f"coefficient_sparsity {coefficient_sparsity}: too many for {self.num_cells} cells")
            taken = bases_by_place(cells, dimensions, self.generations, self.mapped_bases)
            self.register_buffer("taken", taken, persistent=False)

    def _check_growths(self, vectors: int) -> None:
        """Makes sure that bases and numbers of a latent are shared out among the generations, and among tokens."""
        config, count = self.config, self.num_tokens
        added = [growth["latent_dim"] for growth in config.growths]
        first = config.latent_dim - sum(added)
        if min(self.generations[0], first, *added) < 1 or any(numbers % count for numbers in added):
            raise ValueError(f"growths {[*config.growths]}: bases or numbers cannot be shared out so")
        if config.coefficient_form == "direct" and added != [vectors * bases for bases in self.mapped_bases[1:]]:
            raise ValueError(f"growths: direct coefficients make latent_dim {vectors} times the bases of a cell")
        self.latent_parts = [numbers // count for numbers in (first, *added)]

    def _map(self, latent_dim: int, coefficients: int, bias: float | None) -> nn.Linear | TokenMap | None:
        """Makes the map from the numbers of one generation; None if they are the coefficients themselves."""
        config = self.config
        if config.coefficient_form == "direct":
            return None
        if config.tokens is None:
            return _coefficient_map(latent_dim, coefficients, bias)
        of_a_cell = coefficients // self.num_cells
        return TokenMap(latent_dim, config.dimensions, config.tokens, config.cells, of_a_cell, bias)

    @property
    def num_cells(self) -> int:
        """Cells of the whole domain, each with a field of its own."""
        return self.config.cells**self.config.dimensions

    @property
    def num_tokens(self) -> int:
        """Tokens of a latent; 1 of a global one."""
        return 1 if self.config.tokens is None else self.config.tokens**self.config.dimensions

    @property
    def coefficient_scale(self) -> float:
        """What coefficients are divided by: the square root of the number of them that the first generation has."""
        return math.sqrt(self.mapped_bases[0])

    @property
    def active_bases(self) -> list[int] | None:
        """Bases that a layer of a cell takes at most, of each generation; None where it takes all."""
        active = self.config.coefficient_sparsity
        return None if active is None else share_of_each(active, self.generations)

    @property
    def is_sparse_by_place(self) -> bool:
        """Whether a cell takes the bases of its own region, whatever the latent is."""
        return self.config.coefficient_sparsity is not None and self.config.sparsity_rule == "place"

    @property
    def mapped_bases(self) -> list[int]:
        """Bases of each generation that a layer of a cell is given a coefficient of; by place, those that it takes."""
        active = self.active_bases
        return active if active is not None and self.is_sparse_by_place else self.generations

    def all_bases(self) -> list[Float[Tensor, "bases parameters"]]:
        """Gives the bases of all generations, [M, parameters] for each mixed layer."""
        return [
            torch.cat([bases, *(growth.bases[index] for growth in self.later)])
            for index, bases in enumerate(self.bases)
        ]

    def split_latents(self, latents: Float[Tensor, "batch latent_dim"]) -> list[Float[Tensor, "batch part"]]:
        """Splits latents [B, D] into the numbers of each generation; each token has some of every one."""
        if not self.later:
            return [latents]
        parts = latents.view(len(latents), self.num_tokens, -1).split(self.latent_parts, dim=2)
        return [part.flatten(1).contiguous() for part in parts]  # products round by how their numbers lie

    def coefficients(self, latents: Float[Tensor, "batch latent_dim"]) -> Float[Tensor, "batch cells layers bases"]:
        """Maps latents [B, D] to mixture coefficients [B, cells, layers, M], scaled by 1/sqrt(M).

        M counts all bases, for the scale those of the first generation, of which a model that is sparse by place has
        :attr:`active_bases`. Of a sparse model all but these of each generation's are zero.
        """
        config = self.config
        parts = self.split_latents(latents)
        mapped = parts[0] if self.coefficient_map is None else self.coefficient_map(parts[0])
        if self.coefficient_map is None and config.mixing == "average":
            mapped = mapped + 1  # zero latents then mean the average of all bases, as the map's bias has it elsewhere
        mapped = mapped.view(len(latents), self.num_cells, -1, self.mapped_bases[0])
        for number, growth in enumerate(self.later, 2):
            mapped = growth(parts[:number], mapped)
        if self.is_sparse_by_place:
            apart = mapped.new_zeros(*mapped.shape[:-1], config.num_bases)
            mapped = apart.scatter(3, self.taken[:, None].expand_as(mapped), mapped)
        elif (active := self.active_bases) is not None:
            mapped = keep_largest_of_each(mapped, self.generations, active)
        return mapped.expand(-1, -1, len(self.bases), -1) / self.coefficient_scale

    def bake(self, coefficients: Float[Tensor, "batch cells layers bases"]) -> BakedField:
        """Mixes the bases into plain networks, one matrix product per layer and generation, or of sparse ones a sum.

        The products of later generations are added to the first one's, so that coefficients of zero change no bit.

        Args:
            coefficients: [B, cells, layers, M].

        Returns:
            B · cells fields, instance-major.
        """
        flat = coefficients.reshape(-1, *coefficients.shape[2:])
        parts = [flat]
        if self.later:  # products round by how their numbers lie
            parts = [part.contiguous() for part in flat.split(self.generations, dim=2)]
        first, *later = parts
        rows = [row.expand(len(flat), -1) for row in self.shared]
        for index, bases in enumerate(self.bases):
            if self._gathers(first, bases):
                mixed = self.means[index] + mix_gathered(first[:, index], bases)
            elif self.means:
                mixed = torch.addmm(self.means[index], first[:, index], bases)
            else:
                mixed = first[:, index] @ bases
            for growth, part in zip(self.later, later, strict=True):
                mixed = torch.addmm(mixed, part[:, index], growth.bases[index])
            rows.append(mixed)
        return BakedField(self.shapes, torch.cat(rows, dim=1), self.config.output_sine)

    def _gathers(self, coefficients: Tensor, bases: Tensor) -> bool:
        """Whether few enough bases are taken for gathering them to be quicker than a product with all.

        Gradients are those of products, and what is compiled has shapes that do not depend on values.
        """
        active, differentiated = self.config.coefficient_sparsity, torch.is_grad_enabled()
        if active is None or differentiated or coefficients.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return gathering_pays(active, len(coefficients), *bases.shape)

    def grid(
        self,
        resolution: int | Sequence[int] | None = None,
        stride: int = 1,
        phase: tuple[int, ...] | None = None,
    ) -> CellGrid:
        """Lays out a grid (default: the training resolution), or every ``stride``-th pixel, for :meth:`decode_on`."""
        config, dimensions = self.config, self.config.dimensions
        axes = as_axes(config.resolution if resolution is None else resolution, dimensions)
        return cell_grid(axes, config.cells, config.overlap, dimensions, self.device, self.dtype, stride, phase)

    def decode_coefficients(
        self, coefficients: Float[Tensor, "batch cells layers bases"], grid: CellGrid
    ) -> Float[Tensor, "batch *grid channels"]:
        """Decodes coefficients [B, cells, layers, M] on a grid: values [B, resolution, ..., channels]."""
        values = self.bake(coefficients)(grid.coordinates)
        return grid.blend(values.view(len(coefficients), -1, *values.shape[1:]))

    def values_at(
        self,
        coefficients: Float[Tensor, "batch cells layers bases"],
        coordinates: Float[Tensor, "batch_or_1 points d"],
    ) -> Float[Tensor, "batch points channels"]:
        """Evaluates fields at any points of the domain.

        Args:
            coefficients: [B, cells, layers, M].
            coordinates: [B, points, d] or [1, points, d], in [-1, 1] across the whole domain.

        Returns:
            [B, points, channels].
        """
        field, config = self.bake(coefficients), self.config
        if config.cells == 1:
            return field(coordinates)
        routes = assign_points(coordinates.expand(len(coefficients), -1, -1), config.cells, config.overlap)
        return routes.gather(field(routes.coordinates))

    def decode_on(
        self, latents: Float[Tensor, "batch latent_dim"], grid: CellGrid
    ) -> Float[Tensor, "batch *grid channels"]:
        """Decodes latents [B, D] on a grid: values [B, resolution, ..., channels] in about [-1, 1]."""
        return self.decode_coefficients(self.coefficients(latents), grid)

    def forward(
        self, latents: Float[Tensor, "batch latent_dim"], resolution: int | Sequence[int] | None = None
    ) -> Float[Tensor, "batch *grid channels"]:
        """Decodes latents [B, D] at any resolution: values [B, resolution, ..., channels] in about [-1, 1]."""
        return self.decode_on(latents, self.grid(resolution))

    def fingerprint(self, *dtypes: torch.dtype) -> str:
        """Computes the SHA-256 of what a latent's meaning depends on: configuration, bases and coefficient map.

        Args:
            dtypes: as if the weights had been cast to these, one after another.
        """
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        return decoder_fingerprint(settings, self.state_dict(), *dtypes)

    def rounded_fingerprints(self) -> list[str]:
        """Computes the fingerprints of this model in half precision.

        Cast to both kinds one after another, weights are rounded twice; a third time changes nothing more.
        """
        half, brain = torch.float16, torch.bfloat16
        return [self.fingerprint(*dtypes) for dtypes in ((half,), (brain,), (half, brain), (brain, half))]


def decoder_fingerprint(settings: Mapping[str, Any], state: Mapping[str, Tensor], *dtypes: torch.dtype) -> str:
    """Computes the fingerprint of a decoder of these settings and weights (:meth:`MNIFModel.fingerprint`)."""
    settings = {key: value for key, value in settings.items() if key != "lineage"}
    if not settings["coefficient_sparsity"] or settings["sparsity_rule"] == "largest":
        del settings["sparsity_rule"]  # unknown to the folders of earlier versions, whose fingerprints stay
    for name in ("tokens", "growths", "coefficient_sparsity"):
        if not settings[name]:
            del settings[name]  # likewise
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        for dtype in dtypes:
            tensor = tensor.to(dtype)
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _check_form(mixing: str, coefficient_form: str, overlap: float) -> None:
    if mixing not in ("delta", "average"):
        raise ValueError(f'mixing "{mixing}": choose "delta" or "average"')
    if coefficient_form not in ("layer", "shared", "direct"):
        raise ValueError(f'coefficient_form "{coefficient_form}": choose "layer", "shared" or "direct"')
    if not 0 <= overlap <= 0.5:
        raise ValueError(f"overlap {overlap}: must lie between 0 and 0.5")


def _coefficient_map(latent_dim: int, coefficients: int, bias: float | None) -> nn.Linear:
    """Makes the map from latents; it starts small, so that all fields start as one well-scaled network."""
    layer = nn.Linear(latent_dim, coefficients, bias=bias is not None)
    nn.init.normal_(layer.weight, std=0.1 / math.sqrt(latent_dim))
    if bias is not None:
        nn.init.constant_(layer.bias, bias)
    return layer
