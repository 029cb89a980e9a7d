import numpy as np
import pytest

from evals.metrics.neighbours import copied_share, nearest_neighbour_distances, nearest_neighbour_ratio
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_neighbours_are_those_of_brute_force(generator: np.random.Generator, chunk: int, offset: float) -> None:
    queries, references = generator.standard_normal((30, 9)) + offset, generator.standard_normal((50, 9)) + offset
    pairs = np.linalg.norm(queries[:, None] - references[None], axis=2)
    distances, indices = nearest_neighbour_distances(queries, references, chunk)
    np.testing.assert_array_equal(indices, pairs.argmin(axis=1))
    np.testing.assert_allclose(distances, pairs.min(axis=1), rtol=1e-8)


def test_the_direction_is_from_queries_to_references() -> None:
    distances, indices = nearest_neighbour_distances(np.array([[0.0], [9.0]]), np.array([[1.0], [2.0], [7.0]]))
    assert distances.tolist() == [1.0, 2.0]
    assert indices.tolist() == [0, 2]


def test_a_copy_is_at_distance_zero(generator: np.random.Generator) -> None:
    references = (generator.standard_normal((40, 300)) * 100).astype(np.float32)
    distances, indices = nearest_neighbour_distances(references[::-1], references)
    assert distances.max() == 0
    assert indices.tolist() == list(range(39, -1, -1))


def test_the_ratio_tells_copies_from_new_samples(generator: np.random.Generator) -> None:
    train, held_out, fresh = generator.standard_normal((3, 200, 5))
    assert nearest_neighbour_ratio(fresh, held_out, train) == pytest.approx(1, abs=0.2)
    assert nearest_neighbour_ratio(train + 0.01 * fresh, held_out, train) < 0.1
    assert nearest_neighbour_ratio(fresh + 5, held_out, train) > 2
    assert nearest_neighbour_ratio(train, held_out, train) == 0


def test_the_ratio_is_one_of_medians() -> None:
    train = np.array([[0.0]])
    samples, held_out = np.array([[1.0], [3.0], [100.0]]), np.array([[2.0], [-2.0]])
    assert nearest_neighbour_ratio(samples, held_out, train) == 1.5


def test_a_leaking_split_is_refused(generator: np.random.Generator) -> None:
    train = generator.standard_normal((20, 3))
    with pytest.raises(UserError, match="split"):
        nearest_neighbour_ratio(train + 1, train[:5], train)


@pytest.mark.parametrize(
    ("queries", "references"),
    [
        (np.ones((2, 3)), np.ones((2, 4))),
        (np.ones((2, 3)), np.ones((0, 3))),
        (np.ones(3), np.ones((2, 3))),
        (np.full((2, 3), np.nan), np.ones((2, 3))),
        (np.ones((2, 3)), np.full((2, 3), np.inf)),
    ],
)
def test_impossible_questions_are_refused(queries: np.ndarray, references: np.ndarray) -> None:
    with pytest.raises(UserError, match="neighbours"):
        nearest_neighbour_distances(queries, references)


def test_an_impossible_chunk_is_refused() -> None:
    with pytest.raises(UserError, match="chunk"):
        nearest_neighbour_distances(np.ones((2, 3)), np.ones((2, 3)), chunk=0)


def test_a_ratio_of_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="nn_ratio"):
        nearest_neighbour_ratio(np.ones((0, 3)), np.ones((2, 3)), np.zeros((2, 3)))


def test_copied_share_sees_copies_that_the_median_hides() -> None:
    generator = np.random.default_rng(0)
    train, held_out, fresh = (generator.standard_normal((400, 8)) for _ in range(3))
    assert copied_share(fresh, held_out, train) == pytest.approx(0.05, abs=0.04)
    a_third_copied = np.concatenate([fresh[:200], train[:100] + 0.01])
    assert nearest_neighbour_ratio(a_third_copied, held_out, train) > 0.7
    assert copied_share(a_third_copied, held_out, train) == pytest.approx(0.36, abs=0.05)
