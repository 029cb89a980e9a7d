"""Bases that a model was grown by: a later generation, silent for latents that know nothing of it.

A model that grows keeps what it has and gets further bases, and its latents further numbers. A latent that has any of
these is heard anew: a further map hears them, and as many mixtures of the earlier ones, times the *presence* of the
further ones, their mean square. So an earlier latent, with zeros in their place, says exactly nothing more: its
coefficients, and all that is decoded from them, stay what they were to the last bit.
"""

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mnif.models.token_map import TokenMap
from mnif.utils.json_files import Size


class GrowthShape(TypedDict):
    """What a model was grown by: so many bases, and so many numbers in a latent."""

    num_bases: Size
    latent_dim: Size


class Generation(TypedDict):
    """What is known of one generation of a model: the first as it was fitted, or what it was grown to.

    ``fingerprint`` is that of the decoder then (empty while it is the model's own); ``data`` and ``data_fingerprint``
    are what it learned from; ``command`` and ``version`` made it; ``frozen`` says that it left the bases before it as
    they were; ``figures`` are means by the name of the data they were measured on.
    """

    fingerprint: str
    data: str
    data_fingerprint: str
    command: str
    version: str
    frozen: bool
    figures: dict[str, dict[str, float]]


class Growth(nn.Module):
    """The bases of a later generation, and what latents that have its numbers say of these and of all bases before.

    Args:
        bases: for each mixed layer, [m, parameters].
        coefficient_map: [B, tokens · (2 E + 1)] → [B, cells · vectors · (bases before + m)], zero at zero; None: the
            numbers are the coefficients of the new bases themselves. Of a model that is sparse by place, bases count
            that a cell takes.
        latent_parts: numbers that each generation has in a token, those before and E, its own, the last.
        tokens: of a latent; 1 of a global one.
    """

    def __init__(
        self,
        bases: Sequence[nn.Parameter],
        coefficient_map: nn.Linear | TokenMap | None,
        latent_parts: Sequence[int],
        tokens: int,
    ):
        super().__init__()
        self.bases, self.tokens = nn.ParameterList(bases), tokens
        self.coefficient_map = coefficient_map
        *earlier, own = latent_parts
        self.earlier_map = None if coefficient_map is None else nn.Linear(sum(earlier), own, bias=False)

    def forward(
        self,
        parts: Sequence[Float[Tensor, "batch numbers"]],
        before: Float[Tensor, "batch cells vectors earlier"],
    ) -> Float[Tensor, "batch cells vectors bases"]:
        """Adds what a latent says to the coefficients ``before`` [B, cells, vectors, bases before].

        Args:
            parts: its numbers [B, tokens · some], those of every generation before and its own the last.
            before: the coefficients of the generations before.

        Returns:
            [B, cells, vectors, bases before + m].
        """
        if self.coefficient_map is None or self.earlier_map is None:
            said = F.pad(parts[-1].view(*before.shape[:-1], -1), (before.shape[-1], 0))
        else:
            heard = what_is_heard(parts, self.earlier_map, self.tokens)
            said = self.coefficient_map(heard).view(*before.shape[:-1], -1)
        return F.pad(before, (0, said.shape[-1] - before.shape[-1])) + said


def what_is_heard(
    parts: Sequence[Float[Tensor, "batch numbers"]], earlier_map: nn.Linear, tokens: int
) -> Float[Tensor, "batch heard"]:
    """Lays out for each token what a growth's map hears: its own numbers, and times their presence mixtures and 1.

    Args:
        parts: a latent's numbers [B, tokens · some], those of every generation before and its own the last.
        earlier_map: mixes the earlier ones of a token.
        tokens: of a latent; 1 of a global one.
    """
    *earlier, own = (part.view(len(part), tokens, -1) for part in parts)
    presence = own.square().mean(dim=(1, 2), keepdim=True)
    mixed = presence * earlier_map(torch.cat(earlier, dim=2))
    return torch.cat([own, mixed, presence.expand(-1, tokens, -1)], dim=2).flatten(1)
