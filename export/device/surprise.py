"""How surprising an instance is beside held-out ones: seven scores, and one verdict, in NumPy alone.

What is scored is a latent, and four numbers for each patch of the instance (:data:`STATISTICS`); no search is needed,
so a board can do the same. Everything that was learned from held-out instances is in the arrays of a profile, which
:mod:`mnif.latents.calibration` makes:

====================  ================  =========================================================================
array                 shape             meaning
====================  ================  =========================================================================
``latent_mean``       [D]               of held-out latents
``latent_whitening``  [D, D] or [D]     makes distances from it Mahalanobis distances (a factor for each number
                                        where D is large)
``log_mean``          [4·P]             of the patches' logarithms, statistic by statistic in their order
``log_whitening``     [4·P, 4·P]        likewise
``root_mean``         [4·P]             of the patches' square roots
``root_whitening``    [4·P, 4·P]        likewise
``residual_mean``     [P]               of each patch's residual
``residual_std``      [P]               likewise
``sharpness``         [1]               the median of log(curvature / slope) of whole instances
``ranks``             [7, n]            each score of n held-out instances, ascending
``tail_start``        [7]               the score from which on its tail is taken as exponential
``tail_scale``        [7]               mean excess over it
``shares``            [7]               of the false alarms that each score may cause; they sum to 1
``alarms``            [m]               the alarm of m other held-out instances, ascending
====================  ================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

STATISTICS = ("residual", "residual_curvature", "slope", "curvature")
"""Of each patch: mean squares of what the field misses, of that's second differences, and of the first and second
differences of the observed values, summed over the axes and meant over the channels."""

SCORES = {
    "residual": "the field misses much of it",
    "patch": "the field misses much of one patch",
    "latent": "its latent lies far from those of held-out instances",
    "sharpness": "it is softer or rougher than held-out instances",
    "grain": "its smoothest patches are rough",
    "strength": "contrast and residuals of its patches are unusual together",
    "layout": "its patches are rough or smooth, and missed, in an unusual arrangement",
}
"""Every score by name, and what a high one means."""

VERDICTS = ("in", "doubtful", "out")

TAIL = 0.2
"""The share of held-out instances that a score's tail is made from."""

_FLOOR = 1e-6  # below which a mean square counts as none
_GRAIN = 0.05  # the share of patches that are the smoothest
_OUT = 0.2  # of the false-alarm rate is that of "out"


def scores_of(
    arrays: Mapping[str, np.ndarray], latents: np.ndarray, statistics: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Computes the scores of instances, each the higher the less it is like held-out ones.

    Args:
        arrays: of the profile.
        latents: [B, D].
        statistics: for each of :data:`STATISTICS` [B, P].

    Returns:
        [B, 7] float64 in the order of :data:`SCORES`.
    """
    residual, curvature = statistics["residual"], statistics["curvature"]
    scores = {
        "residual": _log(residual.mean(axis=1)),
        "patch": np.log1p(np.maximum(patch_deviations(arrays, residual).max(axis=1), 0)),
        "latent": _log_distance(latents, arrays["latent_mean"], arrays["latent_whitening"]),
        "sharpness": np.abs(sharpness_of(statistics) - arrays["sharpness"]),
        # No logarithm: what is smooth has none to speak of, so that all noise would lie in one order of magnitude.
        "grain": np.sqrt(np.maximum(np.quantile(curvature, _GRAIN, axis=1), 0)),
        "strength": _log_distance(root_features(statistics), arrays["root_mean"], arrays["root_whitening"]),
        "layout": _log_distance(log_features(statistics), arrays["log_mean"], arrays["log_whitening"]),
    }
    return np.stack([scores[name] for name in SCORES], axis=1)


def surprises_of(arrays: Mapping[str, np.ndarray], scores: np.ndarray) -> np.ndarray:
    """Computes how rare scores are among held-out instances: −log of the share that scores as high, [B, 7].

    The share is counted, and beyond ``tail_start`` that of an exponential tail, so that nothing saturates.
    """
    ranks, start = arrays["ranks"], arrays["tail_start"]
    counted = len(ranks[0]) + 1
    below = [np.searchsorted(known, column) for known, column in zip(ranks, scores.T)]  # noqa: B905
    body = -np.log1p(-np.stack(below, axis=1) / counted)
    beyond = (ranks > start[:, None]).sum(axis=1) + 1  # fewer than TAIL says where many scores are the same
    excess = (scores - start) / arrays["tail_scale"]
    return np.where(excess > 0, np.maximum(excess, 0) - np.log(beyond / counted), body)


def alarms_of(arrays: Mapping[str, np.ndarray], surprises: np.ndarray) -> np.ndarray:
    """Takes the most surprising score of each instance, where scores share the false alarms out: [B]."""
    return (surprises + np.log(arrays["shares"])).max(axis=1)


def p_values_of(arrays: Mapping[str, np.ndarray], alarms: np.ndarray) -> np.ndarray:
    """Computes conformal p-values, [B] in (0, 1].

    For an instance exchangeable with the m held-out ones of ``alarms``, P(p ≤ a) is at most a, and at least
    a − 1/(m + 1) where no two alarms are equal (Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*,
    2005). That is over the drawing of these held-out instances too: given them, the share of false alarms at level a
    follows Beta(k, m + 1 − k), k = ⌊a (m + 1)⌋.
    """
    m = len(arrays["alarms"])
    return (1 + m - np.searchsorted(arrays["alarms"], alarms)) / (m + 1)


def verdicts_of(arrays: Mapping[str, np.ndarray], p_values: np.ndarray, rate: float) -> np.ndarray:
    """Judges instances: 0 in, 1 doubtful (p ≤ ``rate``), 2 out (p ≤ a fifth of it, or none of m so surprising)."""
    out = max(rate * _OUT, 1 / (len(arrays["alarms"]) + 1))
    return np.where(p_values <= out, 2, np.where(p_values <= rate, 1, 0))


def least_rate(instances: int) -> float:
    """The smallest false-alarm rate that m calibration instances can tell: 1/(m + 1)."""
    return 1 / (instances + 1)


def patch_deviations(arrays: Mapping[str, np.ndarray], residual: np.ndarray) -> np.ndarray:
    """Measures each patch's residual in standard deviations of its own among held-out instances, [B, P]."""
    return (residual - arrays["residual_mean"]) / arrays["residual_std"]


def sharpness_of(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """The logarithm of curvature over slope of whole instances, [B]: low where blurred, high where noisy."""
    return _log(statistics["curvature"].mean(axis=1)) - _log(statistics["slope"].mean(axis=1))


def log_features(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Logarithms of all patches' statistics, [B, 4·P]."""
    return np.concatenate([_log(statistics[name]) for name in STATISTICS], axis=1)


def root_features(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """Square roots of all patches' statistics, [B, 4·P]."""
    return np.concatenate([np.sqrt(np.maximum(statistics[name], 0)) for name in STATISTICS], axis=1)


def _log(squares: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(squares.astype(np.float64), 0) + _FLOOR)


def _log_distance(rows: np.ndarray, mean: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    """The logarithm of the squared Mahalanobis distance, [B]."""
    apart = rows.astype(np.float64) - mean
    white = apart @ whitening if whitening.ndim == 2 else apart * whitening
    return np.log(np.square(white).sum(axis=1) + 1e-12)
