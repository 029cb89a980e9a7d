"""How surprising an instance is beside held-out ones: five scores, and one verdict, in NumPy alone.

What is scored is a latent, what the field misses of each patch, and how the observed values look; no search is needed,
so a board can do the same. Everything that was learned is in the arrays of a profile, which
:mod:`mnif.latents.calibration` makes (P patches, F mean squares of :func:`boxes_of`, d axes, K kinds of damage in V
variants). Damage of pictures is told by a network, that of shapes and views, and where there are few pictures to learn
from, by a regression on seven numbers; a profile has the arrays of one of them:

====================  ==================  =======================================================================
array                 shape               meaning
====================  ==================  =======================================================================
``conv_i``            [3^d, C_i, C_i+1]   of the network: its convolutions, offset by offset
``conv_i_bias``       [C_i+1]             likewise
``hidden``            [n, 64]             of its hidden layer
``hidden_bias``       [64]                likewise
``logits``            [64, 1 + V]         of sound instances and of each variant of each kind
``logits_bias``       [1 + V]             likewise
--------------------  ------------------  -----------------------------------------------------------------------
``log_mean``          [F]                 of the mean squares' logarithms, of training instances
``log_whitening``     [F, F]              makes distances from it Mahalanobis distances
``number_mean``       [7]                 of :data:`NUMBERS`, of other training instances
``number_std``        [7]                 likewise
``kind_weights``      [K, 14]             of :func:`kind_features` in each kind's log-odds against sound instances
``kind_offsets``      [K]                 likewise
--------------------  ------------------  -----------------------------------------------------------------------
``root_mean``         [2·P]               of the square roots of the patches' slopes and curvatures, likewise
``root_whitening``    [2·P, 2·P]          likewise
``latent_mean``       [D]                 of held-out latents
``latent_whitening``  [D, D] or [D]       likewise (a factor for each number where D is large)
``residual_mean``     [P]                 of each patch's residual, of held-out instances
``residual_std``      [P]                 likewise
``ranks``             [5, n]              each score of n held-out instances, ascending
``tail_start``        [5]                 the score from which on its tail is taken as exponential
``tail_scale``        [5]                 mean excess over it
``weights``           [5]                 of each score's surprise in the alarm
``alarms``            [m]                 the alarm of m other held-out instances, ascending
====================  ==================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

NUMBERS = {
    "layout": "log of the Mahalanobis distance of all mean squares' logarithms",
    "strength": "log of that of the square roots of slopes and curvatures",
    "better moved": "log of the first distance over the least of those of copies moved by two pixels",
    "worse here": "their difference, for each mean square",
    "sharpness": "log of curvature over slope",
    "grain": "log of the curvature of the smoothest patches",
    "slope": "its log",
}
"""What shapes and views, and few pictures, are known by, in order."""

KINDS = {
    "noise": "it is noisy",
    "blur": "it is softer than it should be",
    "occlusion": "something flat hides part of it",
    "shift": "it lies a few pixels aside",
    "foreign": "it looks like parts, or parts of several",
}
"""The kinds of damage that are told, in order, and what each means."""

SCORES = {
    "damage": "it looks damaged or foreign",
    "strength": "the contrast of its patches is unusual together",
    "residual": "the field misses much of it",
    "patch": "the field misses much of one patch",
    "latent": "its latent lies far from those of held-out instances",
}
"""Every score by name, and what a high one means."""

REASONS = {**KINDS, **{name: meaning for name, meaning in SCORES.items() if name != "damage"}}
"""What may be the reason of a verdict: a kind of damage in the place of ``damage``, or another score."""

VERDICTS = ("in", "doubtful", "out")

TAIL = 0.2
"""The share of held-out instances that a score's tail is made from."""

_FLOOR = 1e-4  # a mean square that counts as none
_GRAIN = 0.05  # the share of patches that are the smoothest
_STEPS = (-2, 2)  # pixels by which copies are moved along each axis
_MOST_LINES = 32  # along an axis
_OUT = 0.2  # of the false-alarm rate is that of "out"
_MOST_SQUARED = 25.0  # a standardised number squared: five standard deviations
_WIDTHS = (16, 32, 32, 48, 64)  # channels after each convolution, and after any more
_HIDDEN = 64
_LARGE = 2048  # pixels from which on the first convolution already halves each axis


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


def look_of(arrays: Mapping[str, np.ndarray], values: np.ndarray, patches: Sequence[int]) -> np.ndarray:
    """Computes how values [B, (views,) pixels…, C] look: the log-odds of each kind, and the strength, [B, K + 1]."""
    network = "conv_0" in arrays
    boxes = boxes_of(values, patches, moved=not network)
    odds = log_odds_of(arrays, values) if network else log_odds_by(arrays, numbers_of(arrays, boxes, patches))
    # Rounded, so that the last bits, in which matrix products differ now and then, do not show.
    return np.concatenate([odds, _strength(arrays, boxes, patches)[:, None]], axis=1).astype(np.float32)


def _strength(arrays: Mapping[str, np.ndarray], boxes: np.ndarray, patches: Sequence[int]) -> np.ndarray:
    roots = root_features(boxes[:, 0], patches)
    return np.log(_distances(roots, arrays["root_mean"], arrays["root_whitening"]))


def numbers_of(arrays: Mapping[str, np.ndarray], boxes: np.ndarray, patches: Sequence[int]) -> np.ndarray:
    """Computes the :data:`NUMBERS` of instances, [B, 7] in their order, from [B, 1 + 2·d, F]."""
    distances = _distances(log_features(boxes), arrays["log_mean"], arrays["log_whitening"])
    here, elsewhere = distances[:, 0], distances[:, 1:].min(axis=1)
    slope, curvature = _slope_and_curvature(boxes[:, 0], patches)
    numbers = {
        "layout": np.log(here),
        "strength": _strength(arrays, boxes, patches),
        "better moved": np.log(here) - np.log(elsewhere),
        "worse here": (here - elsewhere) / boxes.shape[-1],
        "sharpness": log_features(curvature.mean(axis=1)) - log_features(slope.mean(axis=1)),
        "grain": log_features(np.quantile(curvature, _GRAIN, axis=1)),
        "slope": log_features(slope.mean(axis=1)),
    }
    return np.stack([numbers[name] for name in NUMBERS], axis=1).astype(np.float32)


def _slope_and_curvature(boxes: np.ndarray, patches: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Slope and curvature of each patch, [B, P] both, of [B, F]."""
    count = int(np.prod(patches))
    of_patches = np.maximum(boxes[:, : (len(patches) + 1) * count], 0).reshape(len(boxes), -1, count)
    return of_patches[:, :-1].sum(axis=1), of_patches[:, -1]


def log_odds_by(arrays: Mapping[str, np.ndarray], numbers: np.ndarray) -> np.ndarray:
    """Computes the log-odds of each kind of damage against none, [B, K], by the regression on numbers [B, 7]."""
    return kind_features(arrays, numbers) @ arrays["kind_weights"].T + arrays["kind_offsets"]


def kind_features(arrays: Mapping[str, np.ndarray], numbers: np.ndarray) -> np.ndarray:
    """Standardises numbers [B, 7], and adds their squares, 25 at most: what is unusual to either side, [B, 14]."""
    standard = (numbers - arrays["number_mean"]) / arrays["number_std"]
    return np.concatenate([standard, np.minimum(np.square(standard), _MOST_SQUARED)], axis=1)


def variants_of(dimensions: int) -> dict[str, int]:
    """Counts the variants of each kind of damage: shifts differ by axis and step, foreign ones by making."""
    return {"noise": 1, "blur": 1, "occlusion": 1, "shift": 6 * dimensions, "foreign": 7}


def strides_of(grid: Sequence[int]) -> list[int]:
    """Plans the network's convolutions: the stride of each, until 4 pixels (of shapes, 2) are left of each axis."""
    left, strides = max(grid), []
    if int(np.prod(grid)) <= _LARGE:
        strides.append(1)
    while left > (4 if len(grid) < 3 else 2):
        left = -(-left // 2)
        strides.append(2)
        if len(strides) == 2:
            strides.append(1)
    return strides


def network_shapes(grid: Sequence[int], channels: int) -> dict[str, tuple[int, ...]]:
    """Computes the shapes of the network's arrays, for values [pixels…, C]."""
    dimensions, incoming, left = len(grid), channels + len(grid), list(grid)
    shapes: dict[str, tuple[int, ...]] = {}
    for number, stride in enumerate(strides_of(grid)):
        outgoing = _WIDTHS[min(number, len(_WIDTHS) - 1)]
        shapes[f"conv_{number}"] = (3**dimensions, incoming, outgoing)
        shapes[f"conv_{number}_bias"] = (outgoing,)
        incoming, left = outgoing, [-(-pixels // stride) for pixels in left]
    classes = 1 + sum(variants_of(dimensions).values())
    shapes["hidden"], shapes["hidden_bias"] = (incoming * int(np.prod(left)), _HIDDEN), (_HIDDEN,)
    shapes["logits"], shapes["logits_bias"] = (_HIDDEN, classes), (classes,)
    return shapes


def log_odds_of(arrays: Mapping[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """Computes the log-odds of each kind of damage against none by the network, [B, K], of values [B, pixels…, C].

    A small convolutional network: 3 pixels along each axis and rectifiers, then one hidden layer. Beside the values it
    sees where each pixel lies.
    """
    grid = values.shape[1:-1]
    seen = with_places(values).astype(np.float64)
    for number, stride in enumerate(strides_of(grid)):
        seen = _convolved(seen, arrays[f"conv_{number}"], stride) + arrays[f"conv_{number}_bias"]
        seen = np.maximum(seen, 0)
    hidden = seen.reshape(len(seen), -1) @ arrays["hidden"] + arrays["hidden_bias"]
    return kinds_of_logits(np.maximum(hidden, 0) @ arrays["logits"] + arrays["logits_bias"], len(grid))


def with_places(values: np.ndarray) -> np.ndarray:
    """Adds where each pixel lies along each axis, from -1 to 1, as channels: [B, pixels…, C + d]."""
    places = np.meshgrid(
        *[np.linspace(-1, 1, pixels, dtype=np.float32) for pixels in values.shape[1:-1]], indexing="ij"
    )
    spread = np.broadcast_to(np.stack(places, axis=-1), (*values.shape[:-1], len(places)))
    return np.concatenate([values, spread], axis=-1)


def _convolved(seen: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Convolves [B, pixels…, C] by a kernel [3^d, C, C'] with zeros around the border."""
    grid = seen.shape[1:-1]
    padded = np.pad(seen, [(0, 0), *[(1, 1)] * len(grid), (0, 0)])
    total = np.zeros(())
    for offset, weights in zip(np.ndindex(*[3] * len(grid)), kernel.astype(np.float64)):  # noqa: B905
        place = tuple(slice(start, start + pixels, stride) for start, pixels in zip(offset, grid))  # noqa: B905
        total = total + padded[(slice(None), *place)] @ weights
    return total


def kinds_of_logits(logits: np.ndarray, dimensions: int) -> np.ndarray:
    """Sums up the probabilities of each kind's variants, in logits [B, 1 + V]: log-odds against sound, [B, K]."""
    sums, begin = [], 1
    for count in variants_of(dimensions).values():
        sums.append(np.logaddexp.reduce(logits[:, begin : begin + count], axis=1))
        begin += count
    return np.stack(sums, axis=1) - logits[:, :1]


def scores_of(
    arrays: Mapping[str, np.ndarray], latents: np.ndarray, residual: np.ndarray, look: np.ndarray
) -> np.ndarray:
    """Computes the scores of instances, each the higher the less it is like held-out ones.

    Args:
        arrays: of the profile.
        latents: [B, D].
        residual: mean squares of what the field misses of each patch, [B, P].
        look: [B, K + 1].

    Returns:
        [B, 5] float64 in the order of :data:`SCORES`.
    """
    distances = _distances(latents, arrays["latent_mean"], arrays["latent_whitening"])
    scores = {
        "damage": np.logaddexp.reduce(look[:, :-1].astype(np.float64), axis=1),
        "strength": look[:, -1],
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
    """Sums up the surprises of each instance by their weights, [B].

    For independent scores of one weight that would be Fisher's way to combine p-values (*Statistical Methods for
    Research Workers*, 1925). They are neither, so how large is unusual is told by held-out instances' alarms.
    """
    return surprises @ arrays["weights"]


def reasons_of(arrays: Mapping[str, np.ndarray], surprises: np.ndarray, look: np.ndarray) -> list[str]:
    """Names what adds most to each instance's alarm, of :data:`REASONS`."""
    kinds = look[:, :-1].argmax(axis=1)
    names = [list(SCORES)[score] for score in (surprises * arrays["weights"]).argmax(axis=1)]
    return [list(KINDS)[kind] if name == "damage" else name for name, kind in zip(names, kinds)]  # noqa: B905


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


def look_shapes(
    grid: Sequence[int], patches: Sequence[int], channels: int, network: bool
) -> dict[str, tuple[int, ...]]:
    """Computes the shapes of the arrays that looks are computed with, as a profile with or without a network has them.

    Args:
        grid: pixels along each axis.
        patches: likewise.
        channels: of a pixel.
        network: whether a network tells damage.
    """
    roots, numbers, boxes = 2 * int(np.prod(patches)), len(NUMBERS), count_boxes(grid, patches)
    by_numbers: dict[str, tuple[int, ...]] = {
        "log_mean": (boxes,),
        "log_whitening": (boxes, boxes),
        "number_mean": (numbers,),
        "number_std": (numbers,),
        "kind_weights": (len(KINDS), 2 * numbers),
        "kind_offsets": (len(KINDS),),
    }
    told = network_shapes(grid, channels) if network else by_numbers
    return {**told, "root_mean": (roots,), "root_whitening": (roots, roots)}


def wrong_array(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Says what of arrays of the right shapes cannot be, if anything."""
    for name in ("number_std", "residual_std", "tail_scale", "weights"):
        if name in arrays and not (arrays[name] > 0).all():
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
