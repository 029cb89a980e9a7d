"""How surprising an instance is beside held-out ones: five scores, and one verdict, in NumPy alone.

What is scored is a latent, what the field misses of each patch, and how the observed values look; no search is needed,
so a board can do the same. Everything that was learned is in the arrays of a profile, which
:mod:`mnif.latents.calibration` makes (P patches, F mean squares of :func:`boxes_of`, K kinds of damage):

====================  ================  =========================================================================
array                 shape             meaning
====================  ================  =========================================================================
``log_mean``          [F]               of the mean squares' logarithms, of training instances
``log_whitening``     [F, F]            makes distances from it Mahalanobis distances
``root_mean``         [2·P]             of the square roots of the patches' slopes and curvatures, likewise
``root_whitening``    [2·P, 2·P]        likewise
``look_mean``         [7]               of :data:`LOOK`, of other training instances
``look_std``          [7]               likewise
``kind_weights``      [K, 14]           of :func:`kind_features` in each kind's log-odds against sound instances
``kind_offsets``      [K]               likewise
``latent_mean``       [D]               of held-out latents
``latent_whitening``  [D, D] or [D]     likewise (a factor for each number where D is large)
``residual_mean``     [P]               of each patch's residual, of held-out instances
``residual_std``      [P]               likewise
``ranks``             [5, n]            each score of n held-out instances, ascending
``tail_start``        [5]               the score from which on its tail is taken as exponential
``tail_scale``        [5]               mean excess over it
``shares``            [5]               of the false alarms that each score may cause; they sum to 1
``alarms``            [m]               the alarm of m other held-out instances, ascending
====================  ================  =========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

LOOK = {
    "layout": "log of the Mahalanobis distance of all mean squares' logarithms",
    "strength": "log of that of the square roots of slopes and curvatures",
    "better moved": "log of the first distance over the least of those of copies moved by two pixels",
    "worse here": "their difference, for each mean square",
    "sharpness": "log of curvature over slope",
    "grain": "log of the curvature of the smoothest patches",
    "slope": "its log",
}
"""What a look is known by, in order."""

KINDS = {
    "noise": "it is noisy",
    "blur": "it is softer than it should be",
    "occlusion": "something flat hides part of it",
    "shift": "it would look more usual two pixels further",
    "foreign": "it looks like parts of several",
}
"""The kinds of damage that a look is tested for, in order, and what each means."""

SCORES = {
    "look": "it looks damaged or foreign",
    "strength": "the contrast of its patches is unusual together",
    "residual": "the field misses much of it",
    "patch": "the field misses much of one patch",
    "latent": "its latent lies far from those of held-out instances",
}
"""Every score by name, and what a high one means."""

REASONS = {**KINDS, **{name: meaning for name, meaning in SCORES.items() if name != "look"}}
"""What may be the reason of a verdict: a kind of damage in the place of ``look``, or another score."""

VERDICTS = ("in", "doubtful", "out")

TAIL = 0.2
"""The share of held-out instances that a score's tail is made from."""

_FLOOR = 1e-4  # a mean square that counts as none
_GRAIN = 0.05  # the share of patches that are the smoothest
_STEPS = (-2, 2)  # pixels by which copies are moved along each axis
_MOST_LINES = 32  # along an axis
_OUT = 0.2  # of the false-alarm rate is that of "out"
_MOST_SQUARED = 25.0  # a standardised number of a look squared: five standard deviations


def boxes_of(values: np.ndarray, patches: Sequence[int], moved: bool = True) -> np.ndarray:
    """Computes mean squares of the differences of observed values in boxes: patches, and layers across each axis.

    Slopes (squares of first differences along one axis, 0 at its end) and the curvature (the square of the sum of
    second differences; beyond its ends an axis goes on as its last pixel) are means over channels, and over views. Of
    each patch there are the d slopes and the curvature; of at most 32 layers across each axis the d slopes.

    Args:
        values: [B, (views,) pixels…, C].
        patches: along each of d axes.
        moved: whether copies that are moved by two pixels, to either side of each axis, are measured too; what leaves
            does not count then.

    Returns:
        [B, 1 + 2·d or 1, F] float64: the values as they are, and the copies.
    """
    maps = _squares(values.astype(np.float32), len(patches))
    grid = maps.shape[2:]
    places = [(0, 0)] + [(axis, step) for axis in range(len(grid)) for step in _STEPS if moved]
    found = []
    for axis, step in places:
        steps = [step if each == axis else 0 for each in range(len(grid))]
        owners = [_owners(*row) for row in zip(grid, patches, steps)]  # noqa: B905
        parts = [_meant(maps, owners).reshape(len(values), -1)]
        for across, pixels in enumerate(grid):
            counts = [min(_MOST_LINES, pixels) if each == across else 1 for each in range(len(grid))]
            owners = [_owners(*row) for row in zip(grid, counts, steps)]  # noqa: B905
            parts.append(_meant(maps[:, :-1], owners).reshape(len(values), -1))
        found.append(np.concatenate(parts, axis=1))
    return np.stack(found, axis=1).astype(np.float64)


def count_boxes(grid: Sequence[int], patches: Sequence[int]) -> int:
    """Counts the mean squares F of instances of a grid."""
    patch_count = int(np.prod([int(count) for count in patches], dtype=object))
    return patch_count * (len(grid) + 1) + sum(min(_MOST_LINES, pixels) for pixels in grid) * len(grid)


def _squares(values: np.ndarray, dimensions: int) -> np.ndarray:
    """Squares of first differences along each axis, and of the sum of second ones, [B, d + 1, pixels…]."""
    axes = range(values.ndim - 1 - dimensions, values.ndim - 1)
    slopes, bend = [], np.zeros_like(values)
    for axis in axes:
        last = values.shape[axis] - 1
        places = np.arange(last + 1)
        ahead = np.take(values, np.minimum(places + 1, last), axis) - values
        bend += ahead + np.take(values, np.maximum(places - 1, 0), axis) - values
        slopes.append(ahead)
    squares = np.stack([np.square(each).mean(axis=-1) for each in (*slopes, bend)], axis=1)
    return squares.mean(axis=2) if squares.ndim > dimensions + 2 else squares


def _owners(pixels: int, count: int, step: int) -> np.ndarray:
    """The share that each pixel, moved by a step, has in the mean of each of ``count`` boxes, [pixels, count]."""
    owner = np.arange(pixels) * count // pixels
    inside = (owner[:, None] == np.arange(count)).astype(np.float32)
    places = np.arange(pixels) + step
    moved = inside[np.clip(places, 0, pixels - 1)] / inside.sum(axis=0)
    return moved * ((places >= 0) & (places < pixels))[:, None]


def _meant(maps: np.ndarray, owners: Sequence[np.ndarray]) -> np.ndarray:
    """Means of maps [B, n, pixels…] over boxes, [B, n, boxes…]."""
    for axis in reversed(range(len(owners))):
        maps = np.moveaxis(np.moveaxis(maps, axis + 2, -1) @ owners[axis], -1, axis + 2)
    return maps


def log_features(boxes: np.ndarray) -> np.ndarray:
    """Logarithms of mean squares."""
    return np.log(np.maximum(boxes, 0) + _FLOOR)


def root_features(boxes: np.ndarray, patches: Sequence[int]) -> np.ndarray:
    """Square roots of all patches' slopes (summed over the axes) and curvatures, [B, 2·P], of [B, F]."""
    return np.sqrt(np.concatenate(_slope_and_curvature(boxes, patches), axis=1))


def look_of(arrays: Mapping[str, np.ndarray], boxes: np.ndarray, patches: Sequence[int]) -> np.ndarray:
    """Computes the look of instances, [B, 7] in the order of :data:`LOOK`, from [B, 1 + 2·d, F]."""
    distances = _distances(log_features(boxes), arrays["log_mean"], arrays["log_whitening"])
    here, elsewhere = distances[:, 0], distances[:, 1:].min(axis=1)
    strength = _distances(root_features(boxes[:, 0], patches), arrays["root_mean"], arrays["root_whitening"])
    slope, curvature = _slope_and_curvature(boxes[:, 0], patches)
    look = {
        "layout": np.log(here),
        "strength": np.log(strength),
        "better moved": np.log(here) - np.log(elsewhere),
        "worse here": (here - elsewhere) / boxes.shape[-1],
        "sharpness": log_features(curvature.mean(axis=1)) - log_features(slope.mean(axis=1)),
        "grain": log_features(np.quantile(curvature, _GRAIN, axis=1)),
        "slope": log_features(slope.mean(axis=1)),
    }
    # Rounded, so that the last bits, in which matrix products differ now and then, do not show.
    return np.stack([look[name] for name in LOOK], axis=1).astype(np.float32)


def _slope_and_curvature(boxes: np.ndarray, patches: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Slope and curvature of each patch, [B, P] both, of [B, F]."""
    count = int(np.prod(patches))
    of_patches = np.maximum(boxes[:, : (len(patches) + 1) * count], 0).reshape(len(boxes), -1, count)
    return of_patches[:, :-1].sum(axis=1), of_patches[:, -1]


def log_odds_of(arrays: Mapping[str, np.ndarray], look: np.ndarray) -> np.ndarray:
    """Computes the log-odds of each kind of damage against none, [B, K], of looks [B, 7]."""
    return kind_features(arrays, look) @ arrays["kind_weights"].T + arrays["kind_offsets"]


def kind_features(arrays: Mapping[str, np.ndarray], look: np.ndarray) -> np.ndarray:
    """Standardises looks [B, 7], and adds their squares, 25 at most: what is unusual to either side, [B, 14]."""
    standard = (look - arrays["look_mean"]) / arrays["look_std"]
    return np.concatenate([standard, np.minimum(np.square(standard), _MOST_SQUARED)], axis=1)


def scores_of(
    arrays: Mapping[str, np.ndarray], latents: np.ndarray, residual: np.ndarray, look: np.ndarray
) -> np.ndarray:
    """Computes the scores of instances, each the higher the less it is like held-out ones.

    Args:
        arrays: of the profile.
        latents: [B, D].
        residual: mean squares of what the field misses of each patch, [B, P].
        look: [B, 7].

    Returns:
        [B, 5] float64 in the order of :data:`SCORES`.
    """
    distances = _distances(latents, arrays["latent_mean"], arrays["latent_whitening"])
    scores = {
        "look": np.logaddexp.reduce(log_odds_of(arrays, look), axis=1),
        "strength": look[:, list(LOOK).index("strength")],
        "residual": residual_score(residual),
        "patch": np.log1p(np.maximum(patch_deviations(arrays, residual).max(axis=1), 0)),
        "latent": np.log(distances),
    }
    return np.stack([scores[name] for name in SCORES], axis=1)


def residual_score(residual: np.ndarray) -> np.ndarray:
    """Computes ``residual`` of [B, P], [B]."""
    return np.log(np.maximum(residual.astype(np.float64).mean(axis=1), 0) + 1e-6)


def surprises_of(arrays: Mapping[str, np.ndarray], scores: np.ndarray) -> np.ndarray:
    """Computes how rare scores are among held-out instances: −log of the share that scores as high, [B, 5].

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


def reasons_of(arrays: Mapping[str, np.ndarray], surprises: np.ndarray, look: np.ndarray) -> list[str]:
    """Names what made each instance's alarm, of :data:`REASONS`."""
    kinds = log_odds_of(arrays, look).argmax(axis=1)
    scores = (surprises + np.log(arrays["shares"])).argmax(axis=1)
    names = [list(SCORES)[score] for score in scores]
    return [list(KINDS)[kind] if name == "look" else name for name, kind in zip(names, kinds)]  # noqa: B905


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


def wrong_array(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Says what of arrays of the right shapes cannot be, if anything."""
    for name in ("look_std", "residual_std", "tail_scale", "shares"):
        if not (arrays[name] > 0).all():
            return f"{name} holds numbers that are not positive"
    for name in ("ranks", "alarms"):
        if (np.diff(arrays[name]) < 0).any():
            return f"{name} is not in order"
    return None


def patch_deviations(arrays: Mapping[str, np.ndarray], residual: np.ndarray) -> np.ndarray:
    """Measures each patch's residual in standard deviations of its own among held-out instances, [B, P]."""
    return (residual - arrays["residual_mean"]) / arrays["residual_std"]


def _distances(rows: np.ndarray, mean: np.ndarray, whitening: np.ndarray) -> np.ndarray:
    """Squared Mahalanobis distances [...] of rows [..., n]."""
    apart = rows.astype(np.float64) - mean
    white = apart @ whitening if whitening.ndim == 2 else apart * whitening
    return np.square(white).sum(axis=-1) + 1e-12
