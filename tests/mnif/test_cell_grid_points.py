import pytest
import torch

from mnif.models.cell_grid import assign_points
from mnif.models.mnif_model import MNIFModel


@pytest.mark.parametrize(("dimensions", "cells", "overlap"), [(1, 3, 0.25), (2, 4, 0.1875), (3, 2, 0.5), (3, 3, 0.0)])
def test_points_of_the_grid_have_the_grids_values(dimensions: int, cells: int, overlap: float) -> None:
    torch.manual_seed(0)
    model = MNIFModel(dimensions=dimensions, cells=cells, overlap=overlap, num_bases=4, width=8, depth=1, latent_dim=6)
    model.double()
    torch.nn.init.normal_(model.coefficient_map.weight, std=0.5)
    coefficients = model.coefficients(torch.randn(2, 6, dtype=torch.float64))
    axis = (torch.arange(11, dtype=torch.float64) + 0.5) / 5.5 - 1
    points = torch.cartesian_prod(*[axis] * dimensions).view(-1, dimensions)
    order = torch.randperm(len(points))
    expected = model.decode_coefficients(coefficients, model.grid(11)).view(2, -1, 3)
    found = model.values_at(coefficients, points[order][None])
    torch.testing.assert_close(found, expected[:, order], atol=1e-10, rtol=0)


def test_instances_have_points_of_their_own() -> None:
    torch.manual_seed(0)
    model = MNIFModel(num_bases=4, width=8, depth=1, latent_dim=6, cells=3)
    torch.nn.init.normal_(model.coefficient_map.weight, std=0.5)
    coefficients = model.coefficients(torch.randn(2, 6))
    points = torch.rand(2, 50, 2) * 2 - 1
    together = model.values_at(coefficients, points)
    for index in range(2):
        alone = model.values_at(coefficients[index : index + 1], points[index : index + 1])
        torch.testing.assert_close(alone[0], together[index], atol=1e-6, rtol=0)


def test_shares_sum_to_one_and_points_outside_go_to_the_nearest_cell() -> None:
    points = torch.rand(2, 300, 3) * 3 - 1.5
    routes = assign_points(points, cells=3, overlap=0.2)
    weights = torch.zeros(600).index_add(0, routes.point, routes.weight)
    torch.testing.assert_close(weights, torch.ones(600))
    inside = (points.abs() <= 1).all(dim=-1).flatten()[routes.point]
    arguments = routes.coordinates.flatten(0, 1)[routes.slot]
    assert arguments[inside].abs().max() <= 1 + 2 * 0.2 + 1e-5


def test_crowded_cells_and_empty_ones() -> None:
    routes = assign_points(torch.full((1, 40, 2), 0.9), cells=2, overlap=0.1)
    assert routes.coordinates.shape == (4, 40, 2)
    assert (routes.slot >= 120).all()
    assert (routes.coordinates[:3] == 0).all()
