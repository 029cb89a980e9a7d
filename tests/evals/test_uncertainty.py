import numpy as np
import pytest

from evals.metrics.frechet import frechet_distance, moments_of
from evals.metrics.uncertainty import (
    GroupedFeatures,
    frechet_at_infinity,
    frechet_at_infinity_spread,
    frechet_spread,
    spread_over_halves,
    standard_error,
)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(("count", "dimension"), [(300, 12), (10, 12)])
def test_groups_together_are_all_samples(generator: np.random.Generator, count: int, dimension: int) -> None:
    features = generator.standard_normal((count, dimension)) + 2
    moments = GroupedFeatures(features).moments()
    assert moments.count == count
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), atol=1e-12)
    part = GroupedFeatures(features).moments([1, 4])
    np.testing.assert_allclose(part.mean, np.concatenate([features[1::8], features[4::8]]).mean(axis=0), atol=1e-12)


def test_the_spread_is_what_other_samples_would_show_and_infinity_has_no_bias(generator: np.random.Generator) -> None:
    reference = moments_of(generator.standard_normal((100_000, 16)))
    distances, spreads, limits, spreads_of_limits = [], [], [], []
    for _ in range(40):
        features = GroupedFeatures(generator.standard_normal((800, 16)) + 0.1)
        distances.append(frechet_distance(features.moments(), reference))
        spreads.append(frechet_spread(features, reference))
        limits.append(frechet_at_infinity(features, reference))
        spreads_of_limits.append(frechet_at_infinity_spread(features, reference))
    truth = 16 * 0.1**2
    assert np.mean(spreads) == pytest.approx(np.std(distances), rel=0.25)
    assert np.mean(distances) > truth + 0.08  # the bias
    assert np.mean(limits) == pytest.approx(truth, abs=0.02)
    assert (
        1 < np.mean(spreads_of_limits) / np.std(limits) < 1.7
    )  # halves are followed farther, so it is an upper bound


def test_spread_of_a_median_and_of_a_mean(generator: np.random.Generator) -> None:
    values = generator.standard_normal((200, 100))
    medians = [spread_over_halves(row, lambda some: float(np.median(some))) for row in values]
    assert np.mean(medians) == pytest.approx(np.std(np.median(values, axis=1)), rel=0.25)
    assert standard_error(values[0]) == pytest.approx(values[0].std(ddof=1) / 10)
