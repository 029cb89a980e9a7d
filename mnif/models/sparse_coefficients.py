"""Sparse coefficients: a layer of a cell takes a few of the bases, and the coefficients of all others are zero.

The K largest in magnitude are kept as they are (hard thresholding; Blumensath and Davies, 2008), and they alone get a
gradient. Those within a thirty-second above the next magnitude are faded, in a line down to zero: so coefficients are
continuous in the latent, no order among equals matters, and an engine that rounds otherwise makes the same field.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import embedding_bag


def check_sparsity(active: int | None, num_bases: int, mixing: str) -> None:
    """Makes sure that a layer can do with ``active`` of its bases.

    Args:
        active: how many; None for all.
        num_bases: how many there are.
        mixing: of :class:`mnif.models.mnif_model.MNIFModel`.

    Raises:
        ValueError: they do not go together; the message begins with the argument that would have to be another.
    """
    if active is None:
        return
    if mixing != "delta":
        raise ValueError(f'mixing {mixing}: without coefficients a layer is nothing; sparse ones need "delta"')
    if not 1 <= active < num_bases:
        raise ValueError(
            f"coefficient_sparsity {active}: must be at least 1 and below the number of bases, {num_bases}"
        )


FADE = 1 / 32
"""How far above the next magnitude a coefficient is faded, as a fraction of that."""


def keep_largest(coefficients: Float[Tensor, "*rows bases"], active: int) -> Float[Tensor, "*rows bases"]:
    """Keeps the ``active`` largest of each row in magnitude, fewer where several share the next magnitude.

    The gradient is that of what is kept, how much of it being a constant; where nothing comes next, that of all, or a
    search that starts at zero would never move.

    Args:
        coefficients: [..., M].
        active: K, 1 to M - 1.
    """
    sizes = coefficients.detach().abs()
    threshold = sizes.topk(active + 1, dim=-1).values[..., -1:]
    share = ((sizes - threshold) / (FADE * threshold.clamp(min=floor_of(sizes.dtype)))).clamp(0, 1)
    return coefficients * share.where(threshold > 0, 1)


def share_of_each(active: int, generations: Sequence[int]) -> list[int]:
    """Says how many bases of each generation may be taken: ``active`` of the first, as large a share of the others.

    A share is rounded up, so a generation of few bases may take all of them.

    Args:
        active: K, below the number of the first generation's bases.
        generations: how many bases each has.
    """
    return [-(-active * bases // generations[0]) for bases in generations]


def keep_largest_of_each(
    coefficients: Float[Tensor, "*rows bases"], generations: Sequence[int], active: Sequence[int]
) -> Float[Tensor, "*rows bases"]:
    """Keeps the largest of each generation among its own, so that what a later one says makes no earlier one leave.

    Args:
        coefficients: [..., M], one generation after the other.
        generations: how many bases each has.
        active: how many of them are kept (:func:`share_of_each`).
    """
    parts = zip(coefficients.split([*generations], dim=-1), active, strict=True)
    kept = [keep_largest(part, count) if count < part.shape[-1] else part for part, count in parts]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)


def floor_of(dtype: torch.dtype) -> float:
    """Gives what a magnitude is taken for at least where it divides."""
    return torch.finfo(dtype).eps


def gathering_pays(active: int, fields: int, num_bases: int, parameters: int) -> bool:
    """Says whether gathering ``active`` rows of ``parameters`` numbers for each field is quicker than one product.

    The unit is a multiplication of the product. By ``python benchmarks/mixing.py`` on a CPU a gathered number costs
    two, finding a row as much as 1,500, and beginning as much as 500,000.
    """
    gathered = 500_000 + fields * active * (1_500 + 2 * parameters)
    return gathered < fields * num_bases * parameters


def mix_gathered(
    coefficients: Float[Tensor, "fields bases"], bases: Float[Tensor, "bases parameters"]
) -> Float[Tensor, "fields parameters"]:
    """Computes ``coefficients @ bases`` from the rows whose coefficient is not zero."""
    fields, num_bases = coefficients.shape
    flat = coefficients.flatten()
    places = flat.nonzero()[:, 0]
    begins = torch.searchsorted(places, torch.arange(0, fields * num_bases, num_bases, device=places.device))
    return embedding_bag(places % num_bases, bases, begins, per_sample_weights=flat[places], mode="sum")
