"""The coarse grid of cells over the domain: where each cell's field is asked, and how neighbours blend.

The domain is cut into ``cells`` equal intervals along every axis. Each cell has a tiny field in coordinates of its
own, [-1, 1] across the cell. A field reaches over its borders by ``overlap`` of a cell's width; there the two
neighbours are averaged with weights that run in a line from one to the other, so the whole is continuous and has no
seams. The weights are the product of one weight per axis and sum to one (a partition of unity).

Pixels are areas: the centre of pixel r of n lies at (r + 1/2) / n of the axis, so pictures decoded at different
resolutions show the same thing at the same place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mnif.utils.errors import UserError
from mnif.utils.pixels import as_axes


@dataclass(frozen=True)
class AxisCells:
    """One axis of ``resolution`` pixels as seen by its cells.

    Attributes:
        coordinates: [cells, points] float64, in the cell's own coordinates; may reach past [-1, 1] by the overlap.
        first: [resolution] int64, index into the flattened (cells, points) of each pixel's first value.
        second: [resolution] int64, the neighbour's value of the same pixel; equals ``first`` where nothing blends.
        weight: [resolution] float64 in [0, 1], the share of ``second``.
    """

    coordinates: np.ndarray
    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray

    def pixels_and_weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Finds every point's pixel, [cells, points] int64, and how much of it that value makes, float64 in [0, 1].

        A point outside the domain has a weight of 0.
        """
        pixels, weights = np.zeros(self.coordinates.shape, np.int64), np.zeros(self.coordinates.shape)
        number = np.arange(len(self.first))
        pixels.flat[self.first], pixels.flat[self.second] = number, number
        np.add.at(weights.reshape(-1), self.first, 1 - self.weight)
        np.add.at(weights.reshape(-1), self.second, self.weight)
        return pixels, weights


def axis_cells(resolution: int, cells: int, overlap: float, stride: int = 1, phase: int = 0) -> AxisCells:
    """Finds the points each cell is asked at along one axis, and for each pixel the one or two values that make it.

    Args:
        resolution: pixels along the axis, at least 1.
        cells: cells along the axis, at least 1.
        overlap: how far a cell's field reaches over its borders, as a fraction of its width, 0 to 0.5.
        stride: only every ``stride``-th pixel is taken, from pixel ``phase`` on; a divisor of the resolution.
        phase: 0 to ``stride`` - 1.

    Raises:
        UserError: the resolution is below 1.
    """
    if resolution < 1:
        raise UserError(f"resolution {resolution}: at least 1 pixel is needed")
    # From here on a pixel is one of those taken, number r at (r + centre) / resolution of the axis.
    resolution, centre = resolution // stride, (phase + 0.5) / stride
    position = (np.arange(resolution) + centre) * cells / resolution  # in units of one cell
    reach = max(overlap - 1e-9, 0.0) if cells > 1 else 0.0  # a pixel on the very rim has weight 0 and is left out
    start = np.ceil((np.arange(cells) - reach) * resolution / cells - centre).astype(np.int64)
    stop = np.floor((np.arange(cells) + 1 + reach) * resolution / cells - centre).astype(np.int64) + 1
    points = max(int((stop - start).max()), 1)
    pixel = start[:, None] + np.arange(points)
    coordinates = ((pixel + centre) * cells / resolution - np.arange(cells)[:, None]) * 2 - 1

    inside = np.minimum(position.astype(np.int64), cells - 1)
    border = np.rint(position).astype(np.int64)
    distance = position - border
    blended = (border >= 1) & (border < cells) & (np.abs(distance) < reach)
    left = np.where(blended, border - 1, inside)
    right = np.where(blended, border, inside)
    ramp = np.clip(distance / (2 * overlap) + 0.5, 0, 1) if overlap > 0 else np.zeros(resolution)
    weight = np.where(blended, ramp, 0.0)
    row = np.arange(resolution)
    return AxisCells(
        coordinates=coordinates,
        first=left * points + row - start[left],
        second=right * points + row - start[right],
        weight=weight,
    )


@dataclass(frozen=True)
class CellGrid:
    """A grid of pixels over all cells, as tensors.

    Attributes:
        coordinates: [cells**d, points, d], or [1, points, d] where all cells have the same points; ``points`` is the
            product of ``points_per_axis``.
        cells: cells per axis.
        points_per_axis: d numbers.
        axes: for each axis ``first`` and ``second``, [resolution] int64, and ``weight``, [resolution], as in
            :class:`AxisCells`.
        pixels: [cells**d · points] int64, the pixel that each point shows, as an index into the flattened grid.
        weights: [cells**d, points], how much of that pixel the point's value makes; they sum to the number of pixels.
    """

    coordinates: Float[Tensor, "sets points d"]
    cells: int
    points_per_axis: tuple[int, ...]
    axes: tuple[tuple[Tensor, Tensor, Tensor], ...]
    pixels: Int64[Tensor, " cells_points"]
    weights: Float[Tensor, "cells points"]

    @property
    def bytes(self) -> int:
        """What its tensors take."""
        tensors = (self.coordinates, self.pixels, self.weights, *(part for axis in self.axes for part in axis))
        return sum(tensor.nbytes for tensor in tensors)

    def gather_points(
        self, values: Shaped[Tensor, "batch *grid channels"]
    ) -> Shaped[Tensor, "batch cells points channels"]:
        """Gathers the pixels that the cells' points show; a point outside the domain gets some pixel.

        Args:
            values: [batch, resolution of axis 1, ..., resolution of axis d, channels].

        Returns:
            [batch, cells**d, points, channels]; :meth:`blend` gives the grid back.
        """
        seen = values.flatten(1, -2).index_select(1, self.pixels)
        return seen.view(len(values), *self.weights.shape, -1)

    def blend(self, values: Float[Tensor, "batch cells points channels"]) -> Float[Tensor, "batch *grid channels"]:
        """Puts the cells' values together to one grid.

        Args:
            values: [batch, cells**d, points, channels].

        Returns:
            [batch, resolution of axis 1, ..., resolution of axis d, channels].
        """
        dimensions = len(self.axes)
        batch, channels = len(values), values.shape[-1]
        values = values.reshape(batch, *[self.cells] * dimensions, *self.points_per_axis, channels)
        interleaved = [axis + offset for axis in range(1, dimensions + 1) for offset in (0, dimensions)]
        values = values.permute(0, *interleaved, 2 * dimensions + 1)
        values = values.reshape(batch, *[self.cells * points for points in self.points_per_axis], channels)
        if self.cells == 1:
            return values
        for axis, (first, second, weight) in enumerate(self.axes, start=1):
            weight = weight.view(-1, *[1] * (dimensions + 1 - axis))
            values = torch.lerp(
                values.index_select(axis, first), values.index_select(axis, second), weight.to(values.dtype)
            )
        return values


CACHED_BYTES = 2**28
"""What the grids that are kept for the next call may take together, unless one alone takes more."""

_cached_bytes = 0


def _make_room(grid: CellGrid) -> None:
    """Forgets the grids that are kept, before another one would make them too large together."""
    global _cached_bytes
    if _cached_bytes + grid.bytes > CACHED_BYTES:
        cell_grid.cache_clear()
        _cached_bytes = 0
    _cached_bytes += grid.bytes


@lru_cache(maxsize=64)
def cell_grid(
    resolution: int | tuple[int, ...],
    cells: int,
    overlap: float,
    dimensions: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    stride: int = 1,
    phase: tuple[int, ...] | None = None,
) -> CellGrid:
    """Lays out the pixels of a grid, or every ``stride``-th of them along each axis.

    Args:
        resolution: pixels along each of ``dimensions`` axes; one number stands for all.
        cells: cells along each axis, at least 1.
        overlap: as in :func:`axis_cells`.
        dimensions: d.
        device: of the tensors.
        dtype: of coordinates and weights.
        stride: distance of the pixels taken, a divisor of the resolution; 1 takes all.
        phase: the first pixel taken along each axis, below ``stride``; default 0.
    """
    resolutions, phases = as_axes(resolution, dimensions), phase or (0,) * dimensions
    axes = [axis_cells(n, cells, overlap, stride, start) for n, start in zip(resolutions, phases, strict=True)]
    local = [axis.coordinates for axis in axes]
    if all(np.allclose(rows, rows[:1], atol=1e-12) for rows in local):
        local = [rows[:1] for rows in local]
    count, points = len(local[0]), [rows.shape[1] for rows in local]
    cell = torch.cartesian_prod(*[torch.arange(count)] * dimensions).view(-1, dimensions)
    point = torch.cartesian_prod(*[torch.arange(n) for n in points]).view(-1, dimensions)
    pixels, weights = _pixels_and_weights(axes)
    coordinates = torch.stack(
        [torch.as_tensor(rows)[cell[:, None, axis], point[None, :, axis]] for axis, rows in enumerate(local)], dim=-1
    )
    grid = CellGrid(
        coordinates=coordinates.to(device, dtype),
        cells=cells,
        points_per_axis=tuple(points),
        axes=tuple(
            (
                torch.as_tensor(axis.first, device=device),
                torch.as_tensor(axis.second, device=device),
                torch.as_tensor(axis.weight).to(device, dtype),
            )
            for axis in axes
        ),
        pixels=torch.from_numpy(pixels).to(device),
        weights=torch.from_numpy(weights).to(device, dtype),
    )
    if not torch.compiler.is_compiling():  # what is traced is not kept
        _make_room(grid)
    return grid


def _pixels_and_weights(axes: Sequence[AxisCells]) -> tuple[np.ndarray, np.ndarray]:
    """Multiplies the axes' own pixels and weights to those of a :class:`CellGrid`."""
    pixels, weights = np.zeros((1, 1), np.int64), np.ones((1, 1))
    for axis in axes:
        pixel, share = axis.pixels_and_weights()
        pixels = (pixels[:, None, :, None] * len(axis.first) + pixel[None, :, None, :]).reshape(
            len(pixels) * len(pixel), -1
        )
        weights = (weights[:, None, :, None] * share[None, :, None, :]).reshape(len(pixels), -1)
    return pixels.reshape(-1), weights


@dataclass(frozen=True)
class PointAssignment:
    """Points sorted by the field they are put to; a point near a border is put to several.

    Attributes:
        coordinates: [B · cells**d, slots, d], each field's points in its own coordinates; unused slots are zero.
        slot: [n], index into the flattened (field, slot) of each of n questions.
        point: [n], index into the flattened (B, points) of the point a question is about.
        weight: [n], its share; the shares of one point sum to 1.
        shape: (B, points).
    """

    coordinates: Float[Tensor, "fields slots d"]
    slot: Int64[Tensor, " n"]
    point: Int64[Tensor, " n"]
    weight: Float[Tensor, " n"]
    shape: tuple[int, int]

    def gather(self, values: Float[Tensor, "fields slots channels"]) -> Float[Tensor, "batch points channels"]:
        """Sums the fields' values [B · cells**d, slots, channels] to the points' values [B, points, channels]."""
        answers = values.flatten(0, 1).index_select(0, self.slot) * self.weight[:, None]
        gathered = answers.new_zeros(self.shape[0] * self.shape[1], answers.shape[1])
        return gathered.index_add(0, self.point, answers).view(*self.shape, -1)


@torch.no_grad()
def assign_points(coordinates: Float[Tensor, "batch points d"], cells: int, overlap: float) -> PointAssignment:
    """Finds the cells of points, by the same partition of unity as :func:`mnif.models.cell_grid.axis_cells`.

    Args:
        coordinates: [B, points, d] in [-1, 1]; points outside belong to the nearest cell, without a limit.
        cells: cells per axis.
        overlap: how far a cell's field reaches over its borders, as a fraction of its width, 0 to 0.5.
    """
    batch, points, dimensions = coordinates.shape
    position = (coordinates + 1) * (cells / 2)
    inside = position.floor().clamp(0, cells - 1)
    border = position.round()
    distance = position - border
    blended = (border >= 1) & (border < cells) & (distance.abs() < overlap)
    ramp = (distance / max(2 * overlap, 1e-12) + 0.5).clamp(0, 1)
    share = torch.where(blended, ramp, 0.0)
    left, right = torch.where(blended, border - 1, inside), torch.where(blended, border, inside)

    # A corner is right of the border where its number has the axis' bit.
    shares = [(1 - share[..., axis], share[..., axis]) for axis in range(dimensions)]
    corners = ([of_axis[n >> axis & 1] for axis, of_axis in enumerate(shares)] for n in range(2**dimensions))
    weight = torch.stack([torch.stack(corner).prod(dim=0) for corner in corners]).flatten()
    asked = weight.nonzero()[:, 0]  # of all corners at once, for an accelerator is waited for here
    corner, point = asked // (batch * points), asked % (batch * points)
    is_right = (corner[:, None] >> torch.arange(dimensions, device=asked.device) & 1).bool()
    cell = torch.where(is_right, right.view(-1, dimensions)[point], left.view(-1, dimensions)[point])
    field = point // points  # the instance's
    for axis in range(dimensions):
        field = field * cells + cell[:, axis].long()
    order = field.argsort(stable=True)
    field, point, asked = field[order], point[order], asked[order]
    first = torch.searchsorted(field, torch.arange(batch * cells**dimensions + 1, device=field.device))
    counts = first.diff()
    slots = max(int(counts.max()), 1)
    slot = field * slots + torch.arange(len(field), device=field.device) - first[field]
    padded = coordinates.new_zeros(len(counts) * slots, dimensions)
    padded[slot] = (position.view(-1, dimensions)[point] - cell[order]) * 2 - 1
    return PointAssignment(
        coordinates=padded.view(len(counts), slots, dimensions),
        slot=slot,
        point=point,
        weight=weight[asked],
        shape=(batch, points),
    )
