"""The model of stage one: shared basis networks, and the way from a latent to one light field per cell.

latent z [B, D] → coefficients α [B, cells, layers, M] → bake: one matrix product per layer, α @ bases → a field per
cell → blended values on a grid. You et al., *Generative Neural Fields by Mixtures of Neural Implicit Functions*
(NeurIPS 2023), section 3; the cells and the delta form are this project's.
"""

import hashlib
import json
import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from mnif.cells import CellGrid, cell_grid
from mnif.fields import BakedField, layer_shapes, siren_rows


class MNIFModel(ModelMixin, ConfigMixin):
    """Mixtures of neural implicit functions for signals on a square grid.

    Two forms of mixing:

    - ``"delta"``: W = W_mean + Σ_m α_m B_m; the first layer is one for all fields and is not mixed.
    - ``"average"``: W = Σ_m α_m B_m for every layer, the paper's form with ``cells=1``. The coefficients start near
      1/sqrt(M), not 1/M: averaging M independent networks at 1/M would shrink the weights by sqrt(M) and leave the
      field dead at the start.

    Args:
        channels: values per point (3 for colours).
        dimensions: coordinates per point (2 for images).
        resolution: pixels per axis of the training data, the default of decoding.
        num_bases: M, basis networks per layer.
        width: hidden units of a field.
        depth: hidden-to-hidden layers; a field has ``depth + 2`` linear layers.
        latent_dim: D, numbers in a latent.
        cells: cells per axis; 1 is one global field.
        overlap: how far a cell's field reaches over its borders, as a fraction of its width, 0 to 0.5.
        omega: w0 of the sines.
        mixing: ``"delta"`` or ``"average"``.
        output_sine: a sine follows the last layer too, as the paper's image fields have it.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        dimensions: int = 2,
        resolution: int = 32,
        num_bases: int = 96,
        width: int = 24,
        depth: int = 2,
        latent_dim: int = 128,
        cells: int = 4,
        overlap: float = 0.1875,
        omega: float = 10.0,
        mixing: str = "delta",
        output_sine: bool = False,
    ):
        super().__init__()
        if mixing not in ("delta", "average"):
            raise ValueError(f'mixing "{mixing}": choose "delta" or "average"')
        if not 0 <= overlap <= 0.5:
            raise ValueError(f"overlap {overlap}: must lie between 0 and 0.5")
        shapes = layer_shapes(dimensions, channels, width, depth)
        last = len(shapes) - 1

        def rows(index: int, count: int) -> nn.Parameter:
            sine = index < last or output_sine
            return nn.Parameter(siren_rows(shapes[index], count, omega, first=index == 0, sine=sine))

        delta = mixing == "delta"
        self.shapes = shapes
        self.shared = nn.ParameterList([rows(0, 1)] if delta else [])
        self.mixed_layers = list(range(len(self.shared), len(shapes)))
        self.means = nn.ParameterList([rows(index, 1) for index in self.mixed_layers] if delta else [])
        self.bases = nn.ParameterList([rows(index, num_bases) for index in self.mixed_layers])
        self.coefficient_map = nn.Linear(latent_dim, cells**dimensions * len(self.mixed_layers) * num_bases)
        # The map starts small, so that all fields start as one well-scaled network and training spreads them.
        nn.init.normal_(self.coefficient_map.weight, std=0.1 / math.sqrt(latent_dim))
        nn.init.constant_(self.coefficient_map.bias, 0.0 if delta else 1.0)

    def coefficients(self, latents: Tensor) -> Tensor:
        """Latents [B, D] → mixture coefficients [B, cells, layers, M], scaled by 1/sqrt(M)."""
        count = self.config.num_bases
        return self.coefficient_map(latents).view(len(latents), -1, len(self.bases), count) / math.sqrt(count)

    def bake(self, coefficients: Tensor) -> BakedField:
        """Mixes the bases into plain networks, one matrix product per layer.

        Args:
            coefficients: [B, cells, layers, M].

        Returns:
            B · cells fields, instance-major.
        """
        rows = list(self.shared)
        flat = coefficients.reshape(-1, *coefficients.shape[2:])
        for index, bases in enumerate(self.bases):
            if self.means:
                rows.append(torch.addmm(self.means[index], flat[:, index], bases))
            else:
                rows.append(flat[:, index] @ bases)
        layers = [shape.split(row) for shape, row in zip(self.shapes, rows, strict=True)]
        return BakedField([w for w, _ in layers], [b for _, b in layers], self.config.output_sine)

    def grid(self, resolution: int | None = None) -> CellGrid:
        """The pixels of a ``resolution``-wide grid (default: the training resolution), ready for :meth:`decode_on`."""
        config = self.config
        resolution = config.resolution if resolution is None else resolution
        return cell_grid(resolution, config.cells, config.overlap, config.dimensions, self.device, self.dtype)

    def decode_coefficients(self, coefficients: Tensor, grid: CellGrid) -> Tensor:
        """Values on a grid from coefficients [B, cells, layers, M]: [B, resolution, resolution, channels]."""
        field = self.bake(coefficients)
        coordinates = grid.coordinates
        if len(coordinates) > 1:
            coordinates = coordinates.repeat(len(coefficients), 1, 1)
        values = field(coordinates)
        return grid.blend(values.view(len(coefficients), -1, *values.shape[1:]))

    def decode_on(self, latents: Tensor, grid: CellGrid) -> Tensor:
        """The values of the latents' fields [B, D] on a grid: [B, resolution, resolution, channels], about [-1, 1]."""
        return self.decode_coefficients(self.coefficients(latents), grid)

    def forward(self, latents: Tensor, resolution: int | None = None) -> Tensor:
        """Decodes latents [B, D] at any resolution: values [B, resolution, resolution, channels] in about [-1, 1]."""
        return self.decode_on(latents, self.grid(resolution))

    def fingerprint(self) -> str:
        """The SHA-256 of configuration, bases and coefficient map: what a latent's meaning depends on."""
        digest = hashlib.sha256()
        settings = {key: value for key, value in self.config.items() if not key.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()
