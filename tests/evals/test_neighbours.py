import numpy as np
import pytest
import torch

from evals.metrics.neighbours import (
    are_copies,
    copying_verdict,
    memorisation_metrics,
    nearest_neighbour_distances,
    novelty_ratio,
    unit_of_novelty,
)
from mnif.latents.table import LatentTable
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def ratio(samples: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> float:
    distances, _ = nearest_neighbour_distances(samples, train)
    return novelty_ratio(distances, unit_of_novelty(held_out, train))[0]


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
    assert ratio(fresh, held_out, train) == pytest.approx(1, abs=0.2)
    assert ratio(train + 0.01 * fresh, held_out, train) < 0.1
    assert ratio(fresh + 5, held_out, train) > 2
    assert ratio(train, held_out, train) == 0


def test_the_ratio_is_one_of_medians_with_its_standard_error() -> None:
    train = np.array([[0.0]])
    held_out = np.array([[2.0], [-2.0]])
    distances, _ = nearest_neighbour_distances(np.array([[1.0], [3.0], [100.0]] * 8), train)
    assert unit_of_novelty(held_out, train) == 2
    assert novelty_ratio(distances, 2)[0] == 1.5
    assert novelty_ratio(np.full(16, 3.0), 2) == (1.5, 0.0)
    assert novelty_ratio(distances, 2)[1] == pytest.approx(novelty_ratio(distances, 1)[1] / 2)


def test_a_leaking_split_is_refused(generator: np.random.Generator) -> None:
    train = generator.standard_normal((20, 3))
    with pytest.raises(UserError, match="split"):
        ratio(train + 1, train[:5], train)


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


def test_a_ratio_without_held_out_instances_is_refused() -> None:
    with pytest.raises(UserError, match="nn_ratio: 0 held-out instances"):
        unit_of_novelty(np.ones((0, 3)), np.zeros((2, 3)))


def test_the_share_of_copies_sees_what_the_median_hides() -> None:
    generator = np.random.default_rng(0)
    train, held_out, fresh = (generator.standard_normal((400, 8)) for _ in range(3))

    def share(samples: np.ndarray) -> float:
        return are_copies(nearest_neighbour_distances(samples, train)[0], held_out, train).mean()

    assert share(fresh) == pytest.approx(0.05, abs=0.04)
    a_third_copied = np.concatenate([fresh[:200], train[:100] + 0.01])
    assert ratio(a_third_copied, held_out, train) > 0.7
    assert share(a_third_copied) == pytest.approx(0.36, abs=0.05)


def test_memorisation_is_measured_in_standardised_latents() -> None:
    """Two dimensions of very different size count alike, so that copies in the small one alone are not close."""
    generator = np.random.default_rng(0)
    scale = torch.tensor([1000.0, 1.0])
    latents = torch.from_numpy(generator.standard_normal((600, 2)).astype(np.float32)) * scale + 5
    held_out = torch.arange(600) >= 400
    table = LatentTable(latents, [str(row) for row in range(600)], held_out, "f" * 64, "test")
    fresh = generator.standard_normal((200, 2)).astype(np.float32) * scale.numpy() + 5
    metrics = memorisation_metrics(fresh, table)
    assert metrics["nn_ratio_latents"] == pytest.approx(1, abs=0.25)
    assert 0 < metrics["nn_ratio_latents_std"] < 0.3
    assert metrics["copied_share_latents"] < 0.15
    copies = memorisation_metrics(table.train[:200].numpy(), table)
    assert (copies["nn_ratio_latents"], copies["copied_share_latents"]) == (0, 1)


def test_verdict_follows_the_smaller_ratio_and_the_share() -> None:
    assert copying_verdict({"fd_lite0": 1.0}) is None
    assert (copying_verdict({"nn_ratio": 1.6, "nn_ratio_latents": 0.5}) or "").startswith("copies: ")
    at_times = copying_verdict({"nn_ratio": 1.0, "nn_ratio_latents": 1.0, "copied_share_latents": 0.3})
    assert "30%" in (at_times or "")
    assert (copying_verdict({"nn_ratio": 1.0, "copied_share_latents": 0.05}) or "").startswith("does not copy more")
