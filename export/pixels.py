"""From the points fields are asked at to a picture: cells, blending, pixels, PNG.

This file stands by itself (Python 3.8, NumPy) and is copied into every bundle's ``device/``. What it does is what
``mnif.cells`` does, which needs torch.
"""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from export.bundle_folder import BundleError, check_least
from export.whole_files import write_whole


class AxisCells(NamedTuple):
    """One axis of pixels as its cells see it.

    Attributes:
        coordinates: [cells, points], in each cell's own [-1, 1]; may reach past it by the overlap.
        first: [resolution], index of each pixel's value among the flattened (cells, points).
        second: [resolution], its neighbour's value.
        weight: [resolution] in [0, 1], the share of ``second``.
    """

    coordinates: np.ndarray
    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray


def axis_cells(resolution: int, cells: int, overlap: float) -> AxisCells:
    """The points each cell is asked at along one axis, and for each pixel the one or two values that make it.

    Args:
        resolution: pixels along the axis, at least 1.
        cells: cells along the axis.
        overlap: how far a cell reaches over its borders, as a fraction of its width.
    """
    check_least("resolution", resolution, 1)
    position = (np.arange(resolution) + 0.5) * cells / resolution
    reach = max(overlap - 1e-9, 0.0) if cells > 1 else 0.0  # a pixel on the very rim has weight 0 and is left out
    start = np.ceil((np.arange(cells) - reach) * resolution / cells - 0.5).astype(np.int64)
    stop = np.floor((np.arange(cells) + 1 + reach) * resolution / cells - 0.5).astype(np.int64) + 1
    points = max(int((stop - start).max()), 1)
    pixel = start[:, None] + np.arange(points)
    coordinates = ((pixel + 0.5) * cells / resolution - np.arange(cells)[:, None]) * 2 - 1

    inside = np.minimum(position.astype(np.int64), cells - 1)
    border = np.rint(position).astype(np.int64)
    distance = position - border
    blended = (border >= 1) & (border < cells) & (np.abs(distance) < reach)
    left, right = np.where(blended, border - 1, inside), np.where(blended, border, inside)
    ramp = np.clip(distance / (2 * overlap) + 0.5, 0, 1) if overlap > 0 else np.zeros(resolution)
    weight = np.where(blended, ramp, 0.0)
    row = np.arange(resolution)
    return AxisCells(coordinates, left * points + row - start[left], right * points + row - start[right], weight)


def cell_points(axes: Sequence[AxisCells]) -> np.ndarray:
    """The points of all cells: [cells of all axes, points of all axes, dimensions] float32, the last axis fastest."""
    counts, points = zip(*[axis.coordinates.shape for axis in axes])
    cell = np.array(list(itertools.product(*map(range, counts))))
    point = np.array(list(itertools.product(*map(range, points))))
    coordinates = [axis.coordinates[cell[:, k, None], point[None, :, k]] for k, axis in enumerate(axes)]
    return np.stack(coordinates, axis=-1).astype(np.float32)


def blended(values: np.ndarray, axes: Sequence[AxisCells]) -> np.ndarray:
    """Values at :func:`cell_points`, [cells, points, channels], to [resolution, ..., resolution, channels]."""
    dimensions = len(axes)
    counts, points = zip(*[axis.coordinates.shape for axis in axes])
    values = values.reshape([*counts, *points, values.shape[-1]])
    order = [axis + offset for axis in range(dimensions) for offset in (0, dimensions)]
    values = values.transpose([*order, 2 * dimensions])
    values = values.reshape([count * each for count, each in zip(counts, points)] + [values.shape[-1]])
    for k, axis in enumerate(axes):
        share = axis.weight.astype(np.float32).reshape([-1] + [1] * (dimensions - k))
        ours, theirs = values.take(axis.first, k), values.take(axis.second, k)
        values = ours + share * (theirs - ours)
    return values


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Values in about [-1, 1] → uint8 of the same shape, clipped and rounded."""
    return np.round(np.clip(values, -1, 1) * 127.5 + 127.5).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes [height, width, 1 to 4] uint8: grey, grey and alpha, RGB, RGBA."""
    height, width, channels = pixels.shape
    if channels not in (1, 2, 3, 4):
        raise BundleError(f"values with {channels} channels are not a picture")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    write_whole(path, b"\x89PNG\r\n\x1a\n" + body, flush=False)
