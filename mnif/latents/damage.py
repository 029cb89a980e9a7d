"""Kinds of damage, done to sound observations, so that a profile learns to tell them from sound ones."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.ndimage import gaussian_filter

from mnif.latents.surprise import KINDS


def damaged(values: np.ndarray, dimensions: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Damages observations in each way of :data:`mnif.latents.surprise.KINDS`, by how much is drawn for each.

    Args:
        values: [B, (views,) pixels…, C]; each view is damaged by itself.
        dimensions: axes of pixels.
        seed: of the draws.

    Returns:
        For each kind values like those given.
    """
    pictures = values.reshape(-1, *values.shape[values.ndim - 1 - dimensions :])
    draw = np.random.default_rng(seed)
    ways = {"noise": _noisy, "blur": _blurred, "occlusion": _occluded, "shift": _shifted, "foreign": _of_several}
    return {kind: ways[kind](pictures, draw).astype(values.dtype).reshape(values.shape) for kind in KINDS}


def _noisy(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Gaussian noise, of a standard deviation from 0.03 to 0.2 on values in [-1, 1]."""
    strength = draw.uniform(0.03, 0.2, (len(pictures), *[1] * (pictures.ndim - 1)))
    return pictures + strength * draw.standard_normal(pictures.shape)


def _blurred(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A Gaussian blur, of a standard deviation from 1/80 to 1/20 of each axis."""
    shares = np.exp(draw.uniform(np.log(1 / 80), np.log(1 / 20), len(pictures)))
    widths = [[share * pixels for pixels in pictures.shape[1:-1]] for share in shares]
    return np.stack(
        [gaussian_filter(one, [*width, 0], mode="nearest") for one, width in zip(pictures, widths, strict=True)]
    )


def _occluded(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A box of 30 to 70 % of each axis anywhere, of a colour that occurs in another instance."""
    spoilt, grid = pictures.copy(), np.array(pictures.shape[1:-1])
    for one in spoilt:
        sides = np.maximum(1, np.round(grid * draw.uniform(0.3, 0.7, len(grid)))).astype(int)
        starts = draw.integers(0, grid - sides + 1)
        colour = pictures[(draw.integers(len(pictures)), *draw.integers(0, grid))]
        one[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))] = colour
    return spoilt


def _shifted(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """A shift by one to three pixels along one axis; what enters repeats the border."""
    moved = []
    for one in pictures:
        axis, step = draw.integers(one.ndim - 1), draw.choice([-3, -2, -1, 1, 2, 3])
        places = np.arange(one.shape[axis]) + step
        moved.append(np.take(one, np.clip(places, 0, one.shape[axis] - 1), axis))
    return np.stack(moved)


def _of_several(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Two halves, or all corners, are other instances': by the toss of a coin."""
    tossed = draw.random(len(pictures)) < 0.5
    return np.where(tossed.reshape(-1, *[1] * (pictures.ndim - 1)), _of_two(pictures, draw), _of_many(pictures, draw))


def _of_many(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Each corner is an instance at half its size, of which there is every second pixel."""
    spoilt, axes = np.empty_like(pictures), range(pictures.ndim - 2)
    small = pictures[(slice(None), *[slice(None, None, 2)] * len(axes))]
    halves = small.shape[1:-1]
    for one in spoilt:
        for corner in itertools.product((0, 1), repeat=len(axes)):
            place = tuple(slice(at * half, (at + 1) * half) for at, half in zip(corner, halves, strict=True))
            kept = tuple(slice(pixels) for pixels in one[place].shape[:-1])  # of an odd axis one half is shorter
            one[place] = small[draw.integers(len(small))][kept]
    return spoilt


def _of_two(pictures: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """One half along an axis is another instance's."""
    spoilt, others = pictures.copy(), pictures[draw.permutation(len(pictures))]
    for one, other in zip(spoilt, others, strict=True):
        axis = draw.integers(one.ndim - 1)
        half = (*[slice(None)] * axis, slice(one.shape[axis] // 2, None))
        one[half] = other[half]
    return spoilt
