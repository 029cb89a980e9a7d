"""Where and how much a data set uses each basis, which instances use it most, and which bases go together."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import normalize

from mnif.models.mnif_model import MNIFModel


@dataclass(frozen=True)
class Usage:
    """How instances use the bases; layers · M bases, numbered layer by layer.

    A use is |α - baseline| · ‖B‖: how far a basis moves the weights of its layer.

    Attributes:
        cells: [cells, layers, M], the root mean square of a basis's use in a cell over the instances.
        instances: [N, layers · M], that over the cells, of every instance.
        active: [layers, M], the share of coefficients that are not zero.
        correlation: [layers · M, layers · M], of signed coefficients less the baseline, over instances and cells.
        likeness: [layers · M, layers · M], the cosine between the weights of two bases of one layer, else 0.
    """

    cells: Float[Tensor, "cells layers bases"]
    instances: Float[Tensor, "instances all"]
    active: Float[Tensor, "layers bases"]
    correlation: Float[Tensor, "all all"]
    likeness: Float[Tensor, "all all"]

    def users(self, basis: int, count: int) -> Int64[Tensor, " count"]:
        """Lists the instances that use a basis most, the first of all in front."""
        return self.instances[:, basis].topk(min(count, len(self.instances))).indices

    def nearest(self, basis: int, count: int, by: Tensor) -> list[tuple[int, float]]:
        """Lists the bases nearest to one by :attr:`correlation` or :attr:`likeness`, whatever its sign, with it."""
        values = by[basis].clone()
        values[basis] = 0
        found = values.abs().topk(min(count, len(values) - 1)).indices.tolist()
        return [(other, float(values[other])) for other in found if values[other]]


def measured_usage(decoder: MNIFModel, batches: Iterable[Tensor], baseline: Tensor) -> Usage:
    """Measures the usage over instances.

    Args:
        decoder: the model.
        batches: their coefficients [B, cells, layers, M] (:func:`evals.atlas.mixture.coefficient_batches`).
        baseline: [cells, layers, M], of :class:`evals.atlas.mixture.Mixture`.
    """
    norms = basis_norms(decoder, baseline.shape[1])
    squares, active, count, instances = torch.zeros_like(baseline), torch.zeros_like(baseline), 0, []
    moments = baseline.new_zeros(norms.numel(), norms.numel())
    for coefficients in batches:
        moved = coefficients - baseline
        squares += moved.square().sum(dim=0)
        active += (coefficients != 0).sum(dim=0)
        instances.append((moved.square().mean(dim=1).sqrt() * norms).flatten(1))
        rows = moved.flatten(2).flatten(0, 1)
        moments += rows.T @ rows
        count += len(coefficients)
    scale = moments.diagonal().sqrt().clamp_min(1e-12)
    return Usage(
        cells=(squares / count).sqrt() * norms,
        instances=torch.cat(instances),
        active=active.mean(dim=0) / count,
        correlation=moments / (scale[:, None] * scale),
        likeness=_likeness(decoder, baseline.shape[1]),
    )


def average_coefficients(batches: Iterable[Tensor]) -> Float[Tensor, "cells layers bases"]:
    """Averages coefficients [B, cells, layers, M] over all instances."""
    sums = [(some.double().sum(dim=0), len(some)) for some in batches]
    total = torch.stack([part for part, _ in sums]).sum(dim=0)
    return (total / sum(count for _, count in sums)).float()


def basis_norms(decoder: MNIFModel, layers: int) -> Float[Tensor, "layers bases"]:
    """Computes the norm ‖B‖ of every basis's weights; with ``layers`` 1, that of all of its layers together."""
    norms = torch.stack([bases.detach().norm(dim=1) for bases in decoder.all_bases()])
    return norms if layers == len(norms) else norms.square().sum(dim=0, keepdim=True).sqrt()


def _likeness(decoder: MNIFModel, layers: int) -> Tensor:
    each = [bases.detach() for bases in decoder.all_bases()]
    whole = [torch.cat(each, dim=1)] if layers == 1 else each
    return torch.block_diag(*(rows @ rows.T for rows in (normalize(bases, dim=1) for bases in whole)))
