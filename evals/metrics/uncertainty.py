"""How far a metric would move with other samples, and where it goes with ever more of them.

Samples are dealt to eight groups in turn. The spread of a metric is its standard deviation over eight halves of four
groups each: where a half is left out, the delete-d jackknife's factor (n − d)/d is 1, so this estimates the metric's
own standard error (Shao and Wu, Annals of Statistics 1989). The Fréchet distance falls like 1/n as samples are added;
the line through its values for a quarter, a half, three quarters and all of the groups is followed to 1/n = 0 (Chong
and Forsyth, Effectively Unbiased FID, CVPR 2020).
"""

from collections.abc import Callable, Sequence

import numpy as np

from evals.metrics.frechet import Moments, MomentSums, frechet_distance, moments_of

GROUPS = 8

_ROWS_AT_ONCE = 4096


class GroupedFeatures:
    """Features [N, D] in groups: as they are where there are fewer than D, else as sums, 8 (D + 1) D bytes a group."""

    def __init__(self, features: np.ndarray) -> None:
        self._few = features if len(features) < features.shape[1] else None
        self._sums = [] if self._few is not None else [_sums_of(features, group) for group in range(GROUPS)]

    def moments(self, groups: Sequence[int] = range(GROUPS)) -> Moments:
        """Computes the moments of the samples of some groups."""
        if self._few is not None:
            return moments_of(np.concatenate([self._few[group::GROUPS] for group in groups]))
        whole = MomentSums(len(self._sums[0].total))
        for group in groups:
            whole.merge(self._sums[group])
        return whole.moments()


def frechet_spread(features: GroupedFeatures, reference: Moments) -> float:
    """Estimates the standard error that the choice of samples gives the Fréchet distance to a given reference."""
    return float(np.std([frechet_distance(features.moments(half), reference) for half in halves()]))


def frechet_at_infinity(features: GroupedFeatures, reference: Moments, groups: Sequence[int] = range(GROUPS)) -> float:
    """Extrapolates the Fréchet distance to ever more samples, if those at hand number more than the features.

    Args:
        features: of the samples.
        reference: what they are compared with.
        groups: of the samples, those to look at.
    """
    reciprocals, distances = [], []
    for size in range(2, len(groups) + 1, len(groups) // 4):
        for some in _runs(groups, size)[:: 2 if size < len(groups) else len(groups)]:
            moments = features.moments(some)
            reciprocals.append(1 / moments.count)
            distances.append(frechet_distance(moments, reference))
    return float(np.polynomial.Polynomial.fit(reciprocals, distances, 1)(0.0))


def frechet_at_infinity_spread(features: GroupedFeatures, reference: Moments) -> float:
    """Estimates the standard error of :func:`frechet_at_infinity`; a third too large, as halves make noisier lines."""
    return float(np.std([frechet_at_infinity(features, reference, half) for half in halves()]))


def spread_over_halves(values: np.ndarray, metric: Callable[[np.ndarray], float]) -> float:
    """Estimates the standard error of a metric of ``values`` [N], such as their median."""
    groups = [values[group::GROUPS] for group in range(GROUPS)]
    return float(np.std([metric(np.concatenate([groups[g] for g in half])) for half in halves()]))


def standard_error(values: np.ndarray) -> float:
    """Computes the standard error of the mean of ``values`` [N]."""
    return float(np.std(values, dtype=np.float64) / np.sqrt(max(len(values) - 1, 1)))


def halves() -> list[list[int]]:
    """Returns eight choices of four groups; every group is in four of them."""
    return _runs(range(GROUPS), GROUPS // 2)


def _runs(groups: Sequence[int], size: int) -> list[list[int]]:
    """Returns every run of neighbours, the first after the last; all groups are in equally many."""
    return [[groups[(start + place) % len(groups)] for place in range(size)] for start in range(len(groups))]


def _sums_of(features: np.ndarray, group: int) -> MomentSums:
    sums = MomentSums(features.shape[1])
    rows = features[group::GROUPS]
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        sums.update(rows[start : start + _ROWS_AT_ONCE])
    return sums
