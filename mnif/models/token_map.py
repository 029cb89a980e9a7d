"""Latents with a place: tokens on a grid, and the map from them to the coefficients of the cells that lie on each.

The D numbers of a latent are the tokens one after the other, in the order of cells (the last axis runs fastest).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

_HIDDEN = 256  # units of the map, at each token

_MOST_PLACES = 1 << 21  # of all tokens' neighbourhoods together: 256² tokens, 40³


def check_tokens(tokens: int, cells: int, dimensions: int, latent_dim: int | None, coefficient_form: str) -> None:
    """Makes sure that a latent can be cut into tokens, and that every token has cells to itself.

    Args:
        tokens: along each axis.
        cells: along each axis.
        dimensions: d, axes.
        latent_dim: D, numbers in the latent.
        coefficient_form: of :class:`mnif.models.mnif_model.MNIFModel`.

    Raises:
        ValueError: they do not go together; the message begins with the argument that would have to be another.
    """
    count = tokens**dimensions
    if coefficient_form == "direct":
        raise ValueError('coefficient_form direct: the latent is the coefficients then, without tokens; take "layer"')
    if tokens < 2:
        raise ValueError(f"tokens {tokens}: a place needs 2 tokens along each axis at least, and as many cells")
    if cells % tokens:
        raise ValueError(f"tokens {tokens}: must divide the cells along each axis, {cells}")
    if latent_dim is None or latent_dim % count:
        raise ValueError(f"latent_dim {latent_dim}: {count} tokens share it evenly; a multiple of {count} is needed")
    if count * 3**dimensions > _MOST_PLACES:
        raise ValueError(f"tokens {tokens}: too many on {dimensions} axes")


class TokenMap(nn.Module):
    """Maps tokens to the coefficients of cells; a cell hears its own token and those around it.

    One two-layer network, W₂ silu(W₁ x + b), serves all places: x are a token and its 3^d − 1 neighbours (so it is a
    convolution with a kernel of 3), its outputs the coefficients of the cells that lie on the token. Beyond the border
    of the domain the token at the border is heard again. Each cell has a bias of its own. All of it is gathering and
    matrix products, so it is the same on any number of axes, Muon moves the matrices, and graphs need no further
    operators.

    Args:
        latent_dim: D, numbers in a latent; :func:`check_tokens` says what goes together.
        dimensions: d, axes.
        tokens: along each axis.
        cells: along each axis.
        coefficients: of one cell.
        bias: that all coefficients start with; None: there is none, and none of the hidden units either, so that
            tokens of zeros give zeros.
    """

    around: Int64[Tensor, "tokens neighbours"]
    order: Int64[Tensor, " cells"]

    def __init__(
        self, latent_dim: int, dimensions: int, tokens: int, cells: int, coefficients: int, bias: float | None
    ):
        super().__init__()
        around, order = neighbourhoods(tokens, dimensions), cell_order(tokens, cells // tokens, dimensions)
        self.register_buffer("around", torch.from_numpy(around), persistent=False)
        self.register_buffer("order", torch.from_numpy(order), persistent=False)
        self.read = nn.Linear(around.shape[1] * latent_dim // len(around), _HIDDEN, bias=bias is not None)
        self.write = nn.Linear(_HIDDEN, len(order) // len(around) * coefficients, bias=False)
        nn.init.normal_(self.write.weight, std=0.1 / math.sqrt(_HIDDEN))
        self.bias = None if bias is None else nn.Parameter(torch.full((len(order) * coefficients,), bias))

    def forward(self, latents: Float[Tensor, "batch latent_dim"]) -> Float[Tensor, "batch coefficients"]:
        """Maps latents [B, D] to the coefficients of all cells [B, cells · coefficients of one]."""
        tokens = latents.view(len(latents), len(self.around), -1)
        heard = tokens.index_select(1, self.around.flatten()).view(len(latents), len(self.around), -1)
        mapped = self.write(F.silu(self.read(heard))).view(len(latents), len(self.order), -1)
        if len(self.order) > len(self.around):
            mapped = mapped.index_select(1, self.order)
        mapped = mapped.flatten(1)
        return mapped if self.bias is None else mapped + self.bias


def neighbourhoods(tokens: int, dimensions: int) -> np.ndarray:
    """Lists for every token the numbers of those around it and its own: [tokens^d, 3^d] int64."""
    along = (np.arange(tokens)[:, None] + [-1, 0, 1]).clip(0, tokens - 1)
    around = np.zeros((1, 1), np.int64)
    for _ in range(dimensions):
        around = around[:, None, :, None] * tokens + along[None, :, None, :]
        around = around.reshape(len(around) * tokens, -1)
    return around


def cell_order(tokens: int, cells_per_token: int, dimensions: int) -> np.ndarray:
    """Finds every cell where cells lie token by token: [cells^d] int64, in the order of cells."""
    token_by_token = np.arange((tokens * cells_per_token) ** dimensions)
    apart = token_by_token.reshape([tokens] * dimensions + [cells_per_token] * dimensions)
    axes = [axis + offset for axis in range(dimensions) for offset in (0, dimensions)]
    return apart.transpose(axes).reshape(-1)
