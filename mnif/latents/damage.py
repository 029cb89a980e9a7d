"""Kinds of damage, done to sound observations, so that a profile learns to tell them from sound ones."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import gaussian_filter

from mnif.latents.surprise import KINDS, variants_of

SHARES = {"sound": 10, "noise": 2, "blur": 2, "occlusion": 3, "shift": 8, "foreign": 7}
"""Of 32 pictures, how many stay sound, and how many are damaged in each way."""
_STEPS = (-3, -2, -1, 1, 2, 3)
_Damaged = tuple[np.ndarray, np.ndarray]
_Way = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def damaged(values: np.ndarray, dimensions: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Damages observations in each way of :data:`mnif.latents.surprise.KINDS`, by how much is drawn for each.

    Args:
        values: [B, (views,) pixels…, C]; each view is damaged by itself.
        dimensions: axes of pixels.
        seed: of the draws.

    Returns:
        For each kind values like those given; foreign ones are of several.
    """
    pictures = values.reshape(-1, *values.shape[values.ndim - 1 - dimensions :])
    draw = np.random.default_rng(seed)
    spoilt = {kind: _WAYS[kind](pictures, draw)[0] for kind in KINDS if kind != "foreign"}
    spoilt["foreign"] = _foreign(pictures, draw, (_of_two, _of_many))[0]
    return {kind: some.astype(values.dtype).reshape(values.shape) for kind, some in spoilt.items()}


def some_damaged(pictures: np.ndarray, draw: np.random.Generator) -> _Damaged:
    """Leaves the first of n pictures sound and damages the others, by :data:`SHARES`.

    Returns:
        Pictures [n, pixels…, C] float32, and the class of each, [n]: 0 for sound ones, then all variants of all kinds.
    """
    ends = np.cumsum(list(SHARES.values())) * len(pictures) // sum(SHARES.values())
    sound, *parts = np.split(pictures, ends[:-1])
    found, classes, first = [sound], [np.zeros(len(sound), int)], 1
    variants = variants_of(pictures.ndim - 2)
    for kind, part in zip(KINDS, parts, strict=True):
        if len(part):
            spoilt, which = _WAYS[kind](part, draw)
            found.append(spoilt)
            classes.append(first + which)
        first += variants[kind]
    return np.concatenate(found).astype(np.float32), np.concatenate(classes)


def _noisy(pictures: np.ndarray, draw: np.random.Generator) -> _Damaged:
    """Gaussian noise, of a standard deviation from 0.03 to 0.2 on values in [-1, 1]."""
    strength = draw.uniform(0.03, 0.2, (len(pictures), *[1] * (pictures.ndim - 1)))
    return pictures + strength * draw.standard_normal(pictures.shape), np.zeros(len(pictures), int)


def _blurred(pictures: np.ndarray, draw: np.random.Generator) -> _Damaged:
    """A Gaussian blur, of a standard deviation from 1/80 to 1/20 of each axis."""
    shares = np.exp(draw.uniform(np.log(1 / 80), np.log(1 / 20), len(pictures)))
    widths = [[share * pixels for pixels in pictures.shape[1:-1]] for share in shares]
    spoilt = [gaussian_filter(one, [*width, 0], mode="nearest") for one, width in zip(pictures, widths, strict=True)]
    return np.stack(spoilt), np.zeros(len(pictures), int)


def _occluded(pictures: np.ndarray, draw: np.random.Generator) -> _Damaged:
    """A box of 30 to 70 % of each axis anywhere, of a colour that occurs in another picture, or of any."""
    spoilt, grid = pictures.copy(), np.array(pictures.shape[1:-1])
    for one in spoilt:
        sides = np.maximum(1, np.round(grid * draw.uniform(0.3, 0.7, len(grid)))).astype(int)
        starts = draw.integers(0, grid - sides + 1)
        colour = pictures[(draw.integers(len(pictures)), *draw.integers(0, grid))]
        if draw.random() < 0.5:
            colour = draw.uniform(-1, 1, pictures.shape[-1])
        one[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))] = colour
    return spoilt, np.zeros(len(pictures), int)


def _shifted(pictures: np.ndarray, draw: np.random.Generator) -> _Damaged:
    """A shift by one to three pixels along one axis; what enters repeats the border, or is what left."""
    moved, dimensions = [], pictures.ndim - 2
    which = draw.integers(dimensions * len(_STEPS), size=len(pictures))
    for one, (axis, step) in zip(pictures, np.stack(np.divmod(which, len(_STEPS)), axis=1), strict=True):
        places = np.arange(one.shape[axis]) + _STEPS[step]
        wrapped, pixels = draw.random() < 0.5, one.shape[axis]
        moved.append(np.take(one, places % pixels if wrapped else np.clip(places, 0, pixels - 1), axis))
    return np.stack(moved), which


def _foreign(pictures: np.ndarray, draw: np.random.Generator, ways: Sequence[_Way] | None = None) -> _Damaged:
    """Parts of several pictures, or one at another size, in another order, or turned."""
    ways = ways or (_of_two, _of_many, _enlarged, _reduced, _mixed, _shuffled, _turned)
    which = draw.integers(len(ways), size=len(pictures))
    others = [pictures[draw.integers(len(pictures), size=8)] for _ in pictures]
    spoilt = [ways[way](one, some, draw) for one, some, way in zip(pictures, others, which, strict=True)]
    return np.stack(spoilt), which


_WAYS: dict[str, Callable[[np.ndarray, np.random.Generator], _Damaged]] = {
    "noise": _noisy,
    "blur": _blurred,
    "occlusion": _occluded,
    "shift": _shifted,
    "foreign": _foreign,
}


def _of_two(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """One half along an axis is another picture's."""
    spoilt, axis = one.copy(), draw.integers(one.ndim - 1)
    half = (*[slice(None)] * axis, slice(one.shape[axis] // 2, None))
    spoilt[half] = others[0][half]
    return spoilt


def _of_many(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Each corner is a picture at half its size, of which there is every second pixel."""
    spoilt, axes = np.empty_like(one), range(one.ndim - 1)
    small = others[(slice(None), *[slice(None, None, 2)] * len(axes))]
    for other, corner in zip(small, itertools.product((0, 1), repeat=len(axes)), strict=False):
        place = tuple(slice(at * half, (at + 1) * half) for at, half in zip(corner, small.shape[1:-1], strict=True))
        kept = tuple(slice(pixels) for pixels in spoilt[place].shape[:-1])  # of an odd axis one half is shorter
        spoilt[place] = other[kept]
    return spoilt


def _resampled(one: np.ndarray, draw: np.random.Generator, scale: float) -> np.ndarray:
    """A part of one picture at another size; beyond its ends an axis goes on as its last pixel."""
    for axis, pixels in enumerate(one.shape[:-1]):
        start = draw.random() * (pixels - pixels * scale)
        places = np.floor(start + np.arange(pixels) * scale).astype(int)
        one = np.take(one, places, axis, mode="clip")
    return one


def _enlarged(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return _resampled(one, draw, draw.uniform(0.4, 0.8))


def _reduced(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return _resampled(one, draw, draw.uniform(1.25, 2.2))


def _mixed(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return (one + others[0]) / 2


def _shuffled(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Blocks, two or four along each axis, in another order."""
    count = int(draw.choice([2, 4]))
    sides = [max(1, pixels // count) for pixels in one.shape[:-1]]
    corners = [np.arange(pixels // side) * side for pixels, side in zip(one.shape[:-1], sides, strict=True)]
    places = [
        tuple(slice(start, start + side) for start, side in zip(corner, sides, strict=True))
        for corner in itertools.product(*corners)
    ]
    spoilt = one.copy()
    for place, source in zip(places, draw.permutation(len(places)), strict=True):
        spoilt[place] = one[places[source]]
    return spoilt


def _turned(one: np.ndarray, others: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Turned by a quarter or more in the plane of two axes; by a half where they differ, or there is but one."""
    if one.ndim == 2:
        return one[::-1]
    first, second = draw.permutation(one.ndim - 1)[:2]
    quarters = int(draw.integers(1, 4)) if one.shape[first] == one.shape[second] else 2
    return np.rot90(one, quarters, (first, second))
