"""Bases that a model was grown by: a later generation, silent for latents that know nothing of it.

A model that grows keeps what it has and gets further bases, and its latents further numbers. What those numbers say is
linear in them and without a constant, so an earlier latent, with zeros in their place, says exactly nothing: its
coefficients, and all that is decoded from them, stay what they were to the last bit.
"""

from collections.abc import Sequence
from typing import TypedDict

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
    """The bases of a later generation, and what its numbers say of these and of all bases before them.

    Args:
        bases: for each mixed layer, [m, parameters].
        coefficient_map: [B, E] → [B, cells · vectors · (bases before + m)], zero at zero; None: the numbers are the
            coefficients of the new bases themselves.
    """

    def __init__(self, bases: Sequence[nn.Parameter], coefficient_map: nn.Linear | TokenMap | None):
        super().__init__()
        self.bases = nn.ParameterList(bases)
        self.coefficient_map = coefficient_map

    def forward(
        self, numbers: Float[Tensor, "batch latent_dim"], before: Float[Tensor, "batch cells vectors earlier"]
    ) -> Float[Tensor, "batch cells vectors bases"]:
        """Adds what ``numbers`` [B, E] say to the coefficients ``before`` [B, cells, vectors, bases before].

        Returns:
            [B, cells, vectors, bases before + m].
        """
        added = len(self.bases[0])
        if self.coefficient_map is None:
            said = F.pad(numbers.view(*before.shape[:-1], added), (before.shape[-1], 0))
        else:
            said = self.coefficient_map(numbers).view(*before.shape[:-1], -1)
        return F.pad(before, (0, added)) + said
