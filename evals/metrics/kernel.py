"""The kernel distance between two sets of features: the squared maximum mean discrepancy under a cubic kernel.

    k(x, y) = (x·y / D + 1)³

(Bińkowski et al., Demystifying MMD GANs, ICLR 2018, who call it KID on Inception's features.) Unlike the Fréchet
distance it has no bias from small samples; it may therefore come out slightly negative.
"""

import numpy as np

from evals.metrics.frechet import checked_features
from evals.metrics.uncertainty import GROUPS, halves
from mnif.utils.errors import UserError

_TILE = 2048


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Estimates it without bias from all pairs of ``x`` [N, D] and ``y`` [M, D] but those of a sample with itself.

    Memory does not grow with N or M: kernels are summed up in tiles.

    Raises:
        UserError: not two-dimensional, different dimensions, fewer than two samples, or values that are not finite.
    """
    if min(np.shape(x)[0], np.shape(y)[0]) < 2:
        raise UserError(f"kernel distance: {len(x)} against {len(y)} samples; at least 2 of each are needed")
    own = [_sum_of_kernels(z, z, without_self=True) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return own[0] + own[1] - 2 * _sum_of_kernels(x, y) / (len(x) * len(y))


def kernel_distance_with_spread(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Computes the distance and the standard error that the choice of ``x`` gives it.

    Raises:
        UserError: as :func:`kernel_distance`, or fewer than two samples in a half of ``x``.
    """
    groups = [x[group::GROUPS] for group in range(GROUPS)]
    if len(x) < GROUPS or len(y) < 2:
        raise UserError(f"kernel distance: {len(x)} against {len(y)} samples; at least {GROUPS} against 2 are needed")
    own = np.array([[_sum_of_kernels(a, b, without_self=a is b) for b in groups] for a in groups])
    cross = np.array([_sum_of_kernels(a, y) for a in groups])
    counts = np.array([len(group) for group in groups])
    of_y = _sum_of_kernels(y, y, without_self=True) / (len(y) * (len(y) - 1))

    def distance(chosen: list[int]) -> float:
        count = counts[chosen].sum()
        of_x = own[np.ix_(chosen, chosen)].sum() / (count * (count - 1))
        return float(of_x + of_y - 2 * cross[chosen].sum() / (count * len(y)))

    return distance(list(range(GROUPS))), float(np.std([distance(half) for half in halves()]))


def kernel_distance_of_subsets(
    x: np.ndarray, y: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Computes mean and standard deviation over random subsets of both sets, as is usually published.

    Args:
        x: [N, D].
        y: [M, D].
        subsets: how many.
        size: samples of each side in a subset; at most half of a side.
        seed: of the choice.

    Raises:
        UserError: as :func:`kernel_distance`.
    """
    generator, size = np.random.default_rng(seed), max(min(size, len(x) // 2, len(y) // 2), 2)
    values = []
    for _ in range(subsets):
        rows = [np.sort(generator.choice(len(z), size, replace=False)) for z in (x, y)]
        values.append(kernel_distance(x[rows[0]], y[rows[1]]))
    return float(np.mean(values)), float(np.std(values))


def _sum_of_kernels(x: np.ndarray, y: np.ndarray, without_self: bool = False) -> float:
    total = 0.0
    for i in range(0, len(x), _TILE):
        rows = checked_features(x[i : i + _TILE])
        for j in range(0, len(y), _TILE):
            kernels = (rows @ checked_features(y[j : j + _TILE], rows.shape[1]).T / rows.shape[1] + 1) ** 3
            total += kernels.sum() - (np.trace(kernels) if without_self and i == j else 0.0)
    return float(total)
