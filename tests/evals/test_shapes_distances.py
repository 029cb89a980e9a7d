from itertools import permutations

import numpy as np
import pytest
import torch

from evals.metrics import shapes
from evals.metrics.shapes import chamfer_distance, distance_matrix, earth_movers_distance
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def brute_force(a: np.ndarray, b: np.ndarray) -> float:
    squares = np.square(a[:, None] - b[None]).sum(axis=-1)
    return squares.min(axis=1).mean() + squares.min(axis=0).mean()


def shells(generator: np.random.Generator, count: int, points: int = 150) -> np.ndarray:
    """Ellipsoids of many sizes and places: some alike, most far from each other."""
    directions = generator.standard_normal((count, points, 3))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    radii, middles = generator.uniform(0.1, 0.6, (count, 1, 3)), generator.uniform(-0.4, 0.4, (count, 1, 3))
    return directions * radii + middles


def test_a_distance_by_hand() -> None:
    """Of (0, 0, 0) and (1, 0, 0) to (0, 2, 0): 4 and 5 on average there, 4 back."""
    a, b = np.array([[0.0, 0, 0], [1, 0, 0]]), np.array([[0.0, 2, 0]])
    assert chamfer_distance(a, b) == pytest.approx(4.5 + 4)
    assert chamfer_distance(b, a) == pytest.approx(4 + 4.5)


def test_trees_agree_with_brute_force(generator: np.random.Generator) -> None:
    for a, b in zip(shells(generator, 5, 300), shells(generator, 5, 200), strict=True):
        assert chamfer_distance(a, b) == pytest.approx(brute_force(a, b), abs=1e-6, rel=1e-6)
    assert chamfer_distance(a, a) == 0


def test_a_matrix_has_drawn_shapes_in_rows(generator: np.random.Generator) -> None:
    a, b = shells(generator, 4), shells(generator, 6)
    expected = [[brute_force(first, second) for second in b] for first in a]
    np.testing.assert_allclose(distance_matrix(a, b), expected, rtol=1e-9)
    among = distance_matrix(a)
    assert np.isinf(among.diagonal()).all()
    np.testing.assert_array_equal(among, among.T)
    assert among[0, 3] == pytest.approx(brute_force(a[0], a[3]))


def test_the_best_matching_is_found(generator: np.random.Generator) -> None:
    a, b = generator.standard_normal((2, 6, 3))
    matchings = (np.linalg.norm(a - b[list(order)], axis=1).mean() for order in permutations(range(6)))
    assert earth_movers_distance(a, b) == pytest.approx(min(matchings))
    assert earth_movers_distance(a, a[::-1]) == 0
    assert distance_matrix(a[None], b[None], "emd")[0, 0] == earth_movers_distance(a, b)
    with pytest.raises(UserError, match="6 points against 5"):
        earth_movers_distance(a, b[:5])


@pytest.mark.parametrize("metric", ["chamfer", "emd"])
@pytest.mark.parametrize("place", [0.0, 3.0])  # within the map of distances, and far outside it
def test_minima_are_exact_and_all_else_is_bounded(
    generator: np.random.Generator, place: float, metric: shapes.Metric
) -> None:
    a, b = shells(generator, 20, 60) + place, shells(generator, 15, 60) + place
    b[3] = a[7] + 1e-3  # nearly a copy
    full, found = distance_matrix(a, b, metric), distance_matrix(a, b, metric, "minima")
    assert (found <= full).all()
    for axis in (0, 1):
        np.testing.assert_array_equal(found.min(axis=axis), full.min(axis=axis))
        np.testing.assert_array_equal(found.argmin(axis=axis), full.argmin(axis=axis))
    rows = distance_matrix(a, b, metric, "row minima")
    np.testing.assert_array_equal(rows.min(axis=1), full.min(axis=1))
    np.testing.assert_array_equal(rows.argmin(axis=1), full.argmin(axis=1))
    among, least = distance_matrix(a, metric=metric), distance_matrix(a, metric=metric, exact="minima")
    np.testing.assert_array_equal(least.min(axis=1), among.min(axis=1))
    np.testing.assert_array_equal(least, least.T)


def test_most_distances_need_not_be_known(generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = shells(generator, 40), shells(generator, 40)
    measured = []
    distance = shapes._Shape.chamfer
    monkeypatch.setattr(shapes._Shape, "chamfer", lambda *pair: measured.append(1) or distance(*pair))
    distance_matrix(a, b, exact="minima")
    assert 40 <= len(measured) < 40 * 40 / 3


def test_threads_and_company_change_nothing(generator: np.random.Generator) -> None:
    a, b = shells(generator, 8), shells(generator, 9)
    alone = distance_matrix(a, b)
    torch.set_num_threads(3)
    try:
        np.testing.assert_array_equal(distance_matrix(a, b), alone)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_array_equal(distance_matrix(a[2:4], b[5:6]), alone[2:4, 5:6])


@pytest.mark.parametrize("exact", ["all", "minima", "row minima"])
def test_shapes_without_a_surface_are_infinitely_far(generator: np.random.Generator, exact: shapes.Exact) -> None:
    a, b = shells(generator, 6), shells(generator, 5)
    full = distance_matrix(a, b)
    a[2], b[4] = np.nan, np.nan
    found = distance_matrix(a, b, exact=exact)
    assert np.isinf(found[2]).all()
    assert np.isinf(found[:, 4]).all()
    np.testing.assert_array_equal(np.delete(found, 2, 0)[:, :4].min(axis=1), np.delete(full, 2, 0)[:, :4].min(axis=1))
    assert np.isinf(distance_matrix(np.full((3, 10, 3), np.nan), b, exact=exact)).all()
    assert distance_matrix(a[:0], b, exact=exact).shape == (0, 5)


def test_bad_points_are_refused(generator: np.random.Generator) -> None:
    shape = shells(generator, 2)
    broken = shape.copy()
    broken[1, 4, 0] = np.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        distance_matrix(shape, broken)
    with pytest.raises(UserError, match=r"\[150, 2\]"):
        distance_matrix(shape[..., :2])
    with pytest.raises(UserError, match=r"\[0, 3\]"):
        chamfer_distance(shape[0], np.empty((0, 3)))
