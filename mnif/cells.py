"""The coarse grid of cells over the domain: where each cell's field is asked, and how neighbours blend.

The domain is cut into ``cells`` equal intervals along every axis. Each cell has a tiny field in coordinates of its
own, [-1, 1] across the cell. A field reaches over its borders by ``overlap`` of a cell's width; there the two
neighbours are averaged with weights that run smoothly from one to the other, so the whole is continuous and has no
seams. The weights are the product of one weight per axis and sum to one (a partition of unity).

Pixels are areas: the centre of pixel r of n lies at (r + 1/2) / n of the axis, so pictures decoded at different
resolutions show the same thing at the same place.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from mnif.errors import UserError


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


def axis_cells(resolution: int, cells: int, overlap: float) -> AxisCells:
    """The points each cell is asked at along one axis, and for each pixel the one or two values that make it.

    Args:
        resolution: pixels along the axis, at least 1.
        cells: cells along the axis, at least 1.
        overlap: how far a cell's field reaches over its borders, as a fraction of its width, 0 to 0.5.

    Raises:
        UserError: the resolution is below 1.
    """
    if resolution < 1:
        raise UserError(f"resolution {resolution}: at least 1 pixel is needed")
    position = (np.arange(resolution) + 0.5) * cells / resolution  # in units of one cell
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
    left = np.where(blended, border - 1, inside)
    right = np.where(blended, border, inside)
    ramp = np.clip(distance / (2 * overlap) + 0.5, 0, 1) if overlap > 0 else np.zeros(resolution)
    weight = np.where(blended, ramp * ramp * (3 - 2 * ramp), 0.0)  # smoothstep: the slope is continuous too
    row = np.arange(resolution)
    return AxisCells(
        coordinates=coordinates,
        first=left * points + row - start[left],
        second=right * points + row - start[right],
        weight=weight,
    )


@dataclass(frozen=True)
class CellGrid:
    """A square grid of pixels over all cells, as tensors.

    Attributes:
        coordinates: [cells**d, points**d, d], or [1, points**d, d] where all cells have the same points.
        first, second: [resolution] int64; weight: [resolution], as in :class:`AxisCells`, the same for every axis.
    """

    coordinates: Tensor
    first: Tensor
    second: Tensor
    weight: Tensor

    def blend(self, values: Tensor) -> Tensor:
        """Puts the cells' values together to one grid.

        Args:
            values: [batch, cells**d, points**d, channels].

        Returns:
            [batch, resolution, ..., resolution, channels], d axes.
        """
        dimensions = self.coordinates.shape[-1]
        batch, cells, points, channels = values.shape
        cells_axis, points_axis = round(cells ** (1 / dimensions)), round(points ** (1 / dimensions))
        values = values.reshape(batch, *[cells_axis] * dimensions, *[points_axis] * dimensions, channels)
        interleaved = [axis + offset for axis in range(1, dimensions + 1) for offset in (0, dimensions)]
        values = values.permute(0, *interleaved, 2 * dimensions + 1)
        values = values.reshape(batch, *[cells_axis * points_axis] * dimensions, channels)
        for axis in range(1, dimensions + 1):
            weight = self.weight.view(-1, *[1] * (dimensions + 1 - axis))
            first, second = values.index_select(axis, self.first), values.index_select(axis, self.second)
            values = torch.lerp(first, second, weight.to(values.dtype))
        return values


@lru_cache(maxsize=16)
def cell_grid(
    resolution: int,
    cells: int,
    overlap: float,
    dimensions: int = 2,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> CellGrid:
    """The grid of ``resolution`` pixels along each of ``dimensions`` axes; arguments as in :func:`axis_cells`."""
    axis = axis_cells(resolution, cells, overlap)
    local = axis.coordinates
    if np.allclose(local, local[:1], atol=1e-12):
        local = local[:1]
    count, points = local.shape
    per_axis = torch.as_tensor(local)
    indices = torch.cartesian_prod(*[torch.arange(count)] * dimensions).view(-1, dimensions)
    offsets = torch.cartesian_prod(*[torch.arange(points)] * dimensions).view(-1, dimensions)
    coordinates = per_axis[indices[:, None, :], offsets[None, :, :]]
    return CellGrid(
        coordinates=coordinates.to(device, dtype),
        first=torch.as_tensor(axis.first, device=device),
        second=torch.as_tensor(axis.second, device=device),
        weight=torch.as_tensor(axis.weight).to(device, dtype),
    )
