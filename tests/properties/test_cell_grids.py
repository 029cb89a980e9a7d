"""The partition of unity, for any cells, overlap and resolution, on grids and at points."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mnif.models.cell_grid import CellGrid, assign_points, cell_grid

overlaps = st.one_of(st.just(0.0), st.floats(0.01, 0.5))


resolutions = st.integers(1, 3).flatmap(
    lambda dimensions: st.tuples(*[st.integers(1, (40, 14, 7)[dimensions - 1])] * dimensions)
)


def grid_of(sizes: tuple[int, ...], cells: int, overlap: float) -> CellGrid:
    return cell_grid(sizes, cells, overlap, len(sizes), dtype=torch.float64)


@settings(max_examples=60)
@given(resolutions, st.integers(1, 4), overlaps)
def test_weights_of_a_pixel_sum_to_one(sizes: tuple[int, ...], cells: int, overlap: float) -> None:
    grid = grid_of(sizes, cells, overlap)
    sums = torch.zeros(torch.Size(sizes).numel(), dtype=torch.float64)
    sums.index_add_(0, grid.pixels, grid.weights.flatten())
    torch.testing.assert_close(sums, torch.ones_like(sums))
    assert ((grid.weights >= 0) & (grid.weights <= 1)).all()


@settings(max_examples=60)
@given(resolutions, st.integers(1, 4), overlaps, st.integers(0, 2**31))
def test_blending_what_was_gathered_gives_the_grid_back(
    sizes: tuple[int, ...], cells: int, overlap: float, seed: int
) -> None:
    grid = grid_of(sizes, cells, overlap)
    values = torch.randn(2, *sizes, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(grid.blend(grid.gather_points(values)), values)


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), overlaps, st.integers(0, 2**31))
def test_weights_of_a_point_sum_to_one_and_its_cells_hold_it(
    dimensions: int, cells: int, overlap: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(2, 9, dimensions, generator=generator, dtype=torch.float64) * 2 - 1
    assigned = assign_points(points, cells, overlap)
    ones = torch.ones(*assigned.coordinates.shape[:2], 1, dtype=torch.float64)
    torch.testing.assert_close(assigned.gather(ones), torch.ones(2, 9, 1, dtype=torch.float64))
    assert assigned.coordinates.abs().max() <= 1 + 2 * overlap + 1e-9


@settings(max_examples=30)
@given(st.integers(1, 24), st.integers(1, 4), overlaps)
def test_grids_and_points_are_one_partition(resolution: int, cells: int, overlap: float) -> None:
    """A field that gives its own coordinate shows the same blended values on a grid and at the pixels' centres."""
    grid = cell_grid(resolution, cells, overlap, 1, dtype=torch.float64)
    on_grid = grid.blend(grid.coordinates.expand(cells, -1, -1)[None])[0]
    centres = (torch.arange(resolution, dtype=torch.float64) + 0.5) / resolution * 2 - 1
    assigned = assign_points(centres.view(1, -1, 1), cells, overlap)
    torch.testing.assert_close(assigned.gather(assigned.coordinates)[0], on_grid, rtol=0, atol=1e-6)
