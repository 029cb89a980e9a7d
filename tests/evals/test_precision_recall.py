import tracemalloc

import numpy as np
import pytest
from prdc import compute_prdc

import evals.metrics.precision_recall
from evals.metrics.precision_recall import precision_recall
from mnif.utils.errors import UserError

FIGURES = ("precision", "recall", "density", "coverage")


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("tile", [17, 1024])
def test_counts_are_exactly_those_of_prdc(
    generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch, neighbours: int, tile: int
) -> None:
    real, samples = generator.standard_normal((130, 6)), generator.standard_normal((90, 6)) * 0.7 + 0.4
    monkeypatch.setattr(evals.metrics.precision_recall, "_TILE", tile)
    found = precision_recall(samples, real, neighbours)
    expected = compute_prdc(real, samples, neighbours)
    for figure, count in zip(FIGURES, (90, 130, 90 * neighbours, 130), strict=True):
        scale = neighbours if figure == "density" else 1
        assert round(float(getattr(found, figure).sum() * scale)) == round(float(expected[figure] * count))


def test_precision_is_of_samples_and_recall_of_real_instances() -> None:
    real = np.array([[0.0], [1.0], [2.0], [100.0], [101.0], [102.0]])
    samples = np.array([[0.5], [0.6], [1.5], [500.0]])
    found = precision_recall(samples, real, 1)
    assert found.precision.tolist() == [True, True, True, False]
    assert found.coverage.tolist() == [True, True, True, False, False, False]
    assert found.density.tolist() == [2, 2, 2, 0]
    assert precision_recall(real, real, 1).recall.all()


def test_dropping_modes_costs_recall_and_noise_costs_precision(generator: np.random.Generator) -> None:
    centres = generator.standard_normal((8, 4)) * 10

    def drawn(modes: int, noise: float) -> np.ndarray:
        return centres[generator.integers(0, modes, 400)] + generator.standard_normal((400, 4)) * noise

    real = drawn(8, 1)
    fewer = [precision_recall(drawn(modes, 1), real, 5) for modes in (8, 4, 1)]
    coverage = [float(found.coverage.mean()) for found in fewer]
    recall = [float(found.recall.mean()) for found in fewer]
    assert coverage[0] > coverage[1] > coverage[2]
    assert recall[0] > recall[1] > recall[2]
    assert min(found.precision.mean() for found in fewer) > 0.8
    noisier = [float(precision_recall(drawn(8, noise), real, 5).precision.mean()) for noise in (1, 2, 4)]
    assert noisier[0] > noisier[1] > noisier[2]


def test_impossible_neighbours_are_refused(generator: np.random.Generator) -> None:
    x = generator.standard_normal((5, 3))
    for neighbours in (0, 5):
        with pytest.raises(UserError, match=f"--neighbours {neighbours}: .* 5 samples and 5 real instances"):
            precision_recall(x, x, neighbours)
    with pytest.raises(UserError, match="NaN"):
        precision_recall(np.full((5, 3), np.nan), x, 3)


@pytest.mark.slow
def test_memory_stays_flat_up_to_20_000_against_20_000(generator: np.random.Generator) -> None:
    def peak(count: int) -> int:
        samples, real = generator.standard_normal((2, count, 8))
        tracemalloc.start()
        precision_recall(samples, real, 3)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small, large = peak(2_000), peak(20_000)
    assert large < small + 20_000 * 100  # a hundred bytes an instance; all pairs would be 3.2 GB
