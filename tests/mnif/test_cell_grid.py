import weakref

import numpy as np
import pytest
import torch

from mnif.models.cell_grid import axis_cells, cell_grid
from mnif.utils.errors import UserError


@pytest.mark.parametrize("resolution", [1, 2, 7, 16, 31, 32, 50, 64])
@pytest.mark.parametrize("cells", [1, 2, 3, 4])
@pytest.mark.parametrize("overlap", [0.0, 0.125, 0.1875, 0.5])
def test_blending_a_global_function_gives_it_back(resolution: int, cells: int, overlap: float) -> None:
    axis = axis_cells(resolution, cells, overlap)
    position = (axis.coordinates + 1) / 2 + np.arange(cells)[:, None]  # where each cell's points lie, in cells
    values = position.ravel()
    blended = values[axis.first] * (1 - axis.weight) + values[axis.second] * axis.weight
    np.testing.assert_allclose(blended, (np.arange(resolution) + 0.5) * cells / resolution, atol=1e-12)


def test_points_stay_within_the_reach_of_their_cell() -> None:
    axis = axis_cells(64, 4, 0.25)
    used = np.unique(np.concatenate([axis.first, axis.second]))
    assert np.abs(axis.coordinates.ravel()[used]).max() <= 1 + 2 * 0.25


def test_a_jump_between_cells_is_crossed_in_small_steps() -> None:
    """Two constant fields, 0 and 1: without overlap the step is 1, with it the largest step is a fraction."""

    def largest_step(overlap: float) -> float:
        grid = cell_grid(64, 2, overlap, dimensions=2)
        values = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 4, 1, 1).expand(-1, -1, grid.coordinates.shape[1], -1)
        return grid.blend(values)[0, 32, :, 0].diff().abs().max().item()

    assert largest_step(0.0) == 1.0
    assert largest_step(0.1875) < 0.15


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_blend_puts_every_axis_in_its_place(dimensions: int) -> None:
    grid = cell_grid(10, 2, 0.25, dimensions=dimensions, dtype=torch.float64)
    centres = torch.cartesian_prod(*[torch.arange(2.0)] * dimensions).view(-1, 1, dimensions)
    positions = (grid.coordinates + 1) / 2 + centres  # each channel is one coordinate, so blending returns the grid
    blended = grid.blend(positions[None])[0]
    axis = (torch.arange(10, dtype=torch.float64) + 0.5) / 5
    expected = torch.stack(torch.meshgrid(*[axis] * dimensions, indexing="ij"), dim=-1)
    torch.testing.assert_close(blended, expected)


@pytest.mark.parametrize(
    ("resolution", "cells", "overlap"), [(10, 2, 0.25), (12, 4, 0.1875), (9, 1, 0.2), (7, 3, 0.5)]
)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_what_cells_see_apart_blends_to_the_grid(dimensions: int, resolution: int, cells: int, overlap: float) -> None:
    grid = cell_grid(resolution, cells, overlap, dimensions=dimensions, dtype=torch.float64)
    values = torch.rand(2, *[resolution] * dimensions, 3, dtype=torch.float64)
    seen = grid.gather_points(values)
    torch.testing.assert_close(grid.blend(seen), values)
    of_pixel = torch.zeros(resolution**dimensions, dtype=torch.float64)
    of_pixel.index_add_(0, grid.pixels, grid.weights.flatten())
    torch.testing.assert_close(of_pixel, torch.ones_like(of_pixel))
    # Blending is linear, and its derivative by a point's value is that point's share of its pixel.
    points = torch.zeros_like(seen[:1, ..., :1]).requires_grad_()
    (gradient,) = torch.autograd.grad(grid.blend(points).sum(), points)
    torch.testing.assert_close(gradient[0, ..., 0], grid.weights)


def test_resolution_zero_is_refused() -> None:
    with pytest.raises(UserError, match="resolution 0"):
        axis_cells(0, 4, 0.1)


def test_grids_that_are_kept_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    cell_grid.cache_clear()
    monkeypatch.setattr("mnif.models.cell_grid._cached_bytes", 0)
    monkeypatch.setattr("mnif.models.cell_grid.CACHED_BYTES", 10**6)
    kept: weakref.WeakSet = weakref.WeakSet()
    for resolution in range(60, 120):  # of about 90 to 350 kB each
        grid = cell_grid(resolution, 4, 0.1875)
        tensors = [grid.coordinates, grid.pixels, grid.weights, *(part for axis in grid.axes for part in axis)]
        assert grid.bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert grid is cell_grid(resolution, 4, 0.1875)
        kept.add(grid)
        assert sum(each.bytes for each in kept) <= 10**6
    assert cell_grid(400, 4, 0.1875).bytes > 10**6  # one that is larger by itself is kept alone
    assert cell_grid.cache_info().currsize == 1
