"""Minimum matching distance, coverage and the nearest-neighbour test, on matrices small enough to do by hand."""

import numpy as np
import pytest

from evals.metrics.shapes import coverage, distance_matrix, minimum_matching_distances, one_nn_accuracy, set_metrics
from mnif.utils.errors import UserError

# Drawn shapes are rows. Drawn 0 and 1 lie near real 0, drawn 2 lies near nothing; nothing lies near real 2.
TO_REAL = np.array([[1.0, 5.0, 9.0], [2.0, 6.0, 9.5], [7.0, 4.0, 8.0]])
AMONG_DRAWN = np.array([[0.0, 0.5, 9.0], [0.5, 0.0, 9.0], [9.0, 9.0, 0.0]])
AMONG_REAL = np.array([[0.0, 3.0, 3.5], [3.0, 0.0, 2.5], [3.5, 2.5, 0.0]])


def test_figures_by_hand() -> None:
    np.testing.assert_array_equal(minimum_matching_distances(TO_REAL), [1, 4, 8])
    np.testing.assert_array_equal(coverage(TO_REAL), [True, True, False])
    # Drawn 0 and 1 find each other, drawn 2 finds real 1; real 0 finds drawn 0, real 1 and 2 each other.
    np.testing.assert_array_equal(
        one_nn_accuracy(TO_REAL, AMONG_DRAWN, AMONG_REAL), [True, True, False, False, True, True]
    )
    metrics = set_metrics(TO_REAL, AMONG_DRAWN, AMONG_REAL)
    assert metrics["mmd"] == pytest.approx(13 / 3)
    assert metrics["cov"] == pytest.approx(2 / 3)
    assert metrics["nna"] == pytest.approx(4 / 6)
    assert metrics["cov_std"] == pytest.approx(np.sqrt(2 / 9 / 2))


def test_the_transposed_matrix_is_told_from_the_right_one() -> None:
    """A model that draws one good shape again and again: coverage must be low and matching must suffer."""
    to_real = np.array([[0.1, 5.0, 6.0], [0.1, 5.1, 6.1], [0.1, 5.2, 6.2]])
    assert minimum_matching_distances(to_real).mean() == pytest.approx((0.1 + 5 + 6) / 3)
    assert coverage(to_real).mean() == pytest.approx(1 / 3)
    assert minimum_matching_distances(to_real.T).mean() == pytest.approx(0.1)  # what the bug would report
    lopsided = np.array([[1.0, 2.0], [3.0, 0.5], [4.0, 5.0]])
    assert len(minimum_matching_distances(lopsided)) == len(coverage(lopsided)) == 2
    np.testing.assert_array_equal(minimum_matching_distances(lopsided), [1, 0.5])
    np.testing.assert_array_equal(coverage(np.array([[1.0, 2.0], [0.5, 3.0], [4.0, 5.0]])), [True, False])
    np.testing.assert_array_equal(coverage(np.array([[1.0, 2.0], [0.5, 3.0], [4.0, 5.0]]).T), [True, True, False])


def test_shapes_without_a_surface_cover_nothing_and_are_told_apart() -> None:
    to_real = np.array([[np.inf, np.inf], [2.0, 1.0]])
    among_drawn = np.full((2, 2), np.inf)
    np.testing.assert_array_equal(coverage(to_real), [False, True])
    np.testing.assert_array_equal(minimum_matching_distances(to_real), [2, 1])
    assert one_nn_accuracy(to_real, among_drawn, np.array([[0, 5.0], [5.0, 0]])).tolist() == [
        True,
        False,
        False,
        False,
    ]
    nothing = set_metrics(np.full((2, 2), np.inf), among_drawn, np.array([[0, 5.0], [5.0, 0]]))
    assert (nothing["mmd"], nothing["cov"], nothing["nna"]) == (np.inf, 0, 1)


def test_bounds_for_what_is_not_least_give_the_same_figures() -> None:
    generator = np.random.default_rng(0)
    drawn, real = (
        generator.standard_normal((20, 60, 3)) * 0.1 + generator.uniform(-0.6, 0.6, (20, 1, 3)) for _ in range(2)
    )
    matrices = [
        [
            distance_matrix(drawn, real, exact=exact),
            distance_matrix(drawn, exact=exact),
            distance_matrix(real, exact=exact),
        ]
        for exact in ("all", "minima")
    ]
    assert set_metrics(*matrices[0]) == set_metrics(*matrices[1])


def test_figures_worsen_with_noise_and_with_dropped_modes() -> None:
    """Shapes are points on shells of all sizes; both ways of drawing badly move each figure the way it should."""
    generator = np.random.default_rng(0)

    def shells(sizes: np.ndarray, noise: float = 0.0) -> np.ndarray:
        points = generator.standard_normal((len(sizes), 100, 3))
        points *= sizes[:, None, None] / np.linalg.norm(points, axis=-1, keepdims=True)
        return points + noise * generator.standard_normal(points.shape)

    def metrics(drawn: np.ndarray) -> dict[str, float]:
        matrices = (distance_matrix(*pair, exact="minima") for pair in ((drawn, real), (drawn,), (real,)))
        return set_metrics(*matrices)

    real = shells(generator.uniform(0.1, 0.9, 30))
    sizes = generator.uniform(0.1, 0.9, 30)
    as_real, noisy, noisier = (metrics(shells(sizes, noise)) for noise in (0.0, 0.1, 0.2))
    one_size = metrics(shells(np.full(30, 0.5)))
    assert as_real["mmd"] < noisy["mmd"] < noisier["mmd"]
    assert as_real["nna"] < noisy["nna"] <= noisier["nna"]
    assert one_size["cov"] < 0.5 < as_real["cov"]
    assert one_size["mmd"] > as_real["mmd"]
    assert one_size["nna"] > 0.9
    assert 0.3 < as_real["nna"] < 0.7


def test_the_standard_error_is_the_bootstraps() -> None:
    generator = np.random.default_rng(0)
    drawn, real = generator.uniform(size=(2, 40, 5, 3))
    to_real, *among = (distance_matrix(*pair) for pair in ((drawn, real), (drawn,), (real,)))
    scores = minimum_matching_distances(to_real)
    bootstrap = scores[generator.integers(0, 40, (20_000, 40))].mean(axis=1).std()
    assert set_metrics(to_real, *among)["mmd_std"] == pytest.approx(bootstrap, rel=0.03)


def test_matrices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="as many of each"):
        one_nn_accuracy(TO_REAL[:2], AMONG_DRAWN[:2, :2], AMONG_REAL)
    with pytest.raises(UserError, match=r"\[S, R\]"):
        one_nn_accuracy(TO_REAL, AMONG_DRAWN[:2, :2], AMONG_REAL)
    with pytest.raises(UserError, match="NaN"):
        coverage(np.array([[np.nan]]))
    with pytest.raises(UserError, match=r"\[0, 3\]"):
        minimum_matching_distances(np.empty((0, 3)))
