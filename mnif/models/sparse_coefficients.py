"""Sparse coefficients: a layer of a cell takes a few of the bases, and the coefficients of all others are zero.

By place: the bases belong to regions, and a cell takes those of its own, the same for all latents. Or the K largest
in magnitude are kept as they are (hard thresholding; Blumensath and Davies, 2008), and they alone get a gradient.
Those within a thirty-second above the next magnitude are faded, in a line down to zero: so coefficients are continuous
in the latent, no order among equals matters, and an engine that rounds otherwise makes the same field.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag


def check_sparsity(active: int | None, num_bases: int, mixing: str, rule: str, cells: int) -> None:
    """Makes sure that a layer can do with ``active`` of its bases.

    Args:
        active: how many; None for all.
        num_bases: how many there are.
        mixing: of :class:`mnif.models.mnif_model.MNIFModel`.
        rule: which they are.
        cells: of the whole domain.

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
    if rule not in ("place", "largest"):
        raise ValueError(f'sparsity_rule {rule}: choose "place" or "largest"')
    if rule == "place" and num_bases % active:
        raise ValueError(
            f"coefficient_sparsity {active}: must divide the number of bases, {num_bases}, to go by place"
        )
    if rule == "place" and cells < (sets := num_bases // active):
        raise ValueError(
            f"coefficient_sparsity {active}: makes {num_bases} bases {sets} sets, one for each place, and there "
            f"{'is 1 cell' if cells == 1 else f'are {cells} cells'}; take more cells, or as many bases as a cell takes"
        )


def bases_by_place(
    cells: int, dimensions: int, generations: Sequence[int], active: Sequence[int]
) -> Int64[Tensor, "cells taken"]:
    """Lists the bases that each cell takes: of every generation, those around its own place.

    Cells are numbered along a curve that stays in a region before it goes on (Morton, 1966), and the bases of a
    generation lie along it as evenly; a cell takes those from its place on, after the last one the first again.

    Args:
        cells: along each axis.
        dimensions: d, axes.
        generations: how many bases each has.
        active: how many of them a cell takes (:func:`share_of_each`).

    Returns:
        [cells^d, all active], numbers among all bases, one generation after the other.
    """
    ranks = morton_ranks(cells, dimensions)
    taken, before = [], 0
    for bases, count in zip(generations, active, strict=True):
        starts = ranks * bases // len(ranks)
        taken.append(before + (starts[:, None] + torch.arange(count)) % bases)
        before += bases
    return torch.cat(taken, dim=1)


def morton_ranks(cells: int, dimensions: int) -> Int64[Tensor, " cells"]:
    """Numbers ``cells``^d cells along Morton's curve, whose places come from taking turns at the axes' bits."""
    places = torch.cartesian_prod(*[torch.arange(cells)] * dimensions).view(-1, dimensions)
    bits = range((cells - 1).bit_length())
    codes = [(places[:, axis] >> bit & 1) << (bit * dimensions + axis) for axis in range(dimensions) for bit in bits]
    return sum(codes, torch.zeros(len(places), dtype=torch.int64)).argsort().argsort()


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
