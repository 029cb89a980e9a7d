"""How much worse an instance fits without a basis: measured, for every basis in every cell, or estimated.

What an explanation claims is tested by :func:`removal_test`: without the bases that an instance names as its strongest
it must fit worse than without as many others.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from evals.atlas.mixture import AT_ONCE, Mixture, Subject
from mnif.signals.base import GridSignal

_LOOKS = 4  # at different rays, where a step of learning looks at few of them
_PROBES = 16
_UNSEEN = 1000  # the look of a test: other rays than those that scores were measured on


def error_rises(mixture: Mixture, subject: Subject) -> Float[Tensor, "cells layers bases"]:
    """Computes how much the squared error rises when one basis is taken away in one cell, for each of them.

    On grids every cell answers for its own pixels: a basis is taken away in all cells at once, and all rises are
    measured exactly by layers · M decodings. Other signals are measured so if they have one cell; with several, whose
    values meet on every ray, rises are estimated.
    """
    on_grid = isinstance(mixture.signal, GridSignal)
    rises = measured_rises if on_grid or mixture.decoder.num_cells == 1 else estimated_rises
    return torch.stack([rises(mixture, subject, look) for look in _looks(mixture)]).mean(dim=0)


def mean_errors(
    mixture: Mixture, subject: Subject, coefficients: Float[Tensor, "mixtures cells layers bases"]
) -> Float[Tensor, " mixtures"]:
    """Computes the squared errors of other coefficients where :func:`error_rises` looks."""
    return torch.stack([mixture.errors(subject, coefficients, look) for look in _looks(mixture)]).mean(dim=0)


def _looks(mixture: Mixture) -> range:
    return range(1 if isinstance(mixture.signal, GridSignal) else _LOOKS)


def measured_rises(mixture: Mixture, subject: Subject, look: int = 0) -> Float[Tensor, "cells layers bases"]:
    """Takes every basis away and measures (leave one out); signals on grids, or models of one cell."""
    whole = subject.coefficients
    _, layers, bases = whole.shape
    before = mixture.errors_of_cells(subject, whole[None], look)
    rises = torch.empty(whole.shape, device=whole.device)
    for some in torch.arange(layers * bases).split(AT_ONCE):
        chosen = torch.zeros(len(some), 1, layers * bases, dtype=torch.bool)
        chosen[torch.arange(len(some)), 0, some] = True
        mixtures = mixture.without(whole, chosen.view(-1, 1, layers, bases).to(whole.device))
        after = mixture.errors_of_cells(subject, mixtures, look)
        rises.flatten(1)[:, some] = (after - before).T
    return rises


def estimated_rises(mixture: Mixture, subject: Subject, look: int = 0) -> Float[Tensor, "cells layers bases"]:
    """Estimates all rises at once from derivatives: the gradient's part and, of the second order, Gauss and Newton's.

    With d what is taken away of a coefficient, the error rises by about -g d + h d², where h is the mean square of the
    values' derivatives; it is found by reverse mode from random signs (Hutchinson, 1990).
    """
    seen = mixture.observed(subject, 1, look)
    taken = subject.coefficients - mixture.baseline
    generator = torch.Generator().manual_seed(look)
    with torch.enable_grad():
        coefficients = subject.coefficients[None].clone().requires_grad_()
        values = mixture.signal.predict(mixture.by_coefficients, mixture.of_all_layers(coefficients), seen)
        (gradient,) = torch.autograd.grad(seen.errors(values).sum(), coefficients, retain_graph=True)
        squares = torch.zeros_like(taken)
        for _ in range(_PROBES):
            signs = torch.randint(0, 2, values.shape, generator=generator).to(values) * 2 - 1
            (along,) = torch.autograd.grad((signs * values).sum(), coefficients, retain_graph=True)
            squares += along[0].square() / (_PROBES * values.numel())
    return -gradient[0] * taken + squares * taken.square()


@dataclass(frozen=True)
class RemovalTest:
    """What taking bases away does to subjects, by how they were chosen; all lists have one entry for each count.

    Attributes:
        of: how many there are to choose from (:attr:`Mixture.held`).
        counts: how many are taken away.
        before: the mean squared error of the subjects with all of them.
        strongest: its rise without those that score highest.
        random: without as many others.
        same_sum: without others, until their coefficients (less the baseline) sum up to as much in absolute value.
        lowest: the smallest ratio of the strongest to random among the subjects.
    """

    of: int
    counts: list[int]
    before: float
    strongest: list[float]
    random: list[float]
    same_sum: list[float]
    lowest: list[float]

    def ratios(self, count: int) -> tuple[float, float]:
        """Divides the strongest's rise by that of as many others and by that of as large others; infinite if those
        leave the error as it is or lower it."""
        place = self.counts.index(count)
        others = (self.random[place], self.same_sum[place])
        first, second = (_ratio(self.strongest[place], rise) for rise in others)
        return first, second


def removal_test(
    mixture: Mixture,
    subjects: Sequence[Subject],
    scores: Sequence[Tensor],
    counts: Sequence[int],
    draws: int = 8,
) -> RemovalTest:
    """Takes away the bases that score highest, and others.

    Args:
        mixture: the model.
        subjects: instances or samples.
        scores: for each subject [cells, layers, M], to take bases away in single cells, or [layers, M] in all cells.
        counts: how many are taken away, each below half of those that are held (:attr:`Mixture.held`).
        draws: how often others are drawn, of each kind; their mean counts.
    """
    curves, before = [], []
    held = mixture.held if scores[0].ndim == 3 else mixture.held.any(dim=0)
    for number, (subject, score) in enumerate(zip(subjects, scores, strict=True)):
        score = score.where(held.to(score.device), -torch.inf)
        generator = np.random.default_rng([_UNSEEN, number])
        masks = torch.cat([_masks(mixture, subject, score, count, draws, generator) for count in counts])
        whole = subject.coefficients
        none = torch.zeros(1, *score.shape, dtype=torch.bool)
        removed = mixture.without(whole, _over_cells(torch.cat([none, masks]), whole).to(whole.device))
        errors = mixture.errors(subject, removed, _UNSEEN).cpu()
        rises = (errors[1:] - errors[0]).view(len(counts), 1 + 2 * draws)
        curves.append(torch.stack([rises[:, 0], rises[:, 1 : 1 + draws].mean(1), rises[:, 1 + draws :].mean(1)]))
        before.append(errors[0])
    each = torch.stack(curves)
    strongest, random, same_sum = each.mean(dim=0).tolist()
    lowest = [min(_ratio(*pair) for pair in each[:, :2, place].tolist()) for place in range(len(counts))]
    mean = float(torch.stack(before).mean())
    return RemovalTest(int(held.sum()), list(counts), mean, strongest, random, same_sum, lowest)


def strongest(scores: Tensor, count: int) -> Tensor:
    """Marks the ``count`` highest scores: a mask of the scores' shape."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    chosen[scores.flatten().topk(count).indices] = True
    return chosen.view(scores.shape)


def some_at_random(marked: Tensor, count: int, generator: np.random.Generator) -> Tensor:
    """Marks ``count`` of those that are ``marked``, in a mask of any shape."""
    places = marked.flatten().nonzero()[:, 0].cpu().numpy()
    some = torch.zeros(marked.numel(), dtype=torch.bool)
    some[torch.from_numpy(generator.permutation(places)[:count])] = True
    return some.view(marked.shape)


def _masks(
    mixture: Mixture, subject: Subject, score: Tensor, count: int, draws: int, generator: np.random.Generator
) -> Tensor:
    """Marks the strongest, then ``draws`` times as many others, then ``draws`` times as large others."""
    top = strongest(score, count).cpu()
    others = score.isfinite().cpu() & ~top
    sizes = (subject.coefficients - mixture.baseline).abs().cpu()
    sizes = (sizes if sizes.shape == score.shape else sizes.sum(dim=0)).flatten()
    total, masks = sizes[top.flatten()].sum(), [top]
    masks += [some_at_random(others, count, generator) for _ in range(draws)]
    for _ in range(draws):
        left = torch.from_numpy(generator.permutation(others.flatten().nonzero()[:, 0].numpy()))
        enough = int((sizes[left].cumsum(0) < total).sum()) + 1
        mask = torch.zeros(top.numel(), dtype=torch.bool)
        mask[left[:enough]] = True
        masks.append(mask.view(top.shape))
    return torch.stack(masks)


def _over_cells(masks: Tensor, coefficients: Tensor) -> Tensor:
    """Broadcasts masks [n, layers, M] of all cells to [n, 1, layers, M]; those of single cells stay."""
    return masks if masks.ndim == coefficients.ndim + 1 else masks[:, None]


def _ratio(rise: float, other: float) -> float:
    return rise / other if other > 0 else math.inf
