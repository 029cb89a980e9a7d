import numpy as np
import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

import evals.metrics.kernel
from evals.metrics.kernel import kernel_distance, kernel_distance_of_subsets, kernel_distance_with_spread
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_distance_agrees_with_torchmetrics(generator: np.random.Generator) -> None:
    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double()

    x, y = generator.random((2, 40, 12))
    with pytest.warns(UserWarning, match="will save all extracted features"):
        metric = KernelInceptionDistance(feature=Flatten(), subsets=1, subset_size=40)
    metric.update(torch.from_numpy(x).reshape(-1, 3, 2, 2), real=False)
    metric.update(torch.from_numpy(y).reshape(-1, 3, 2, 2), real=True)
    expected = float(metric.compute()[0])
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert kernel_distance_with_spread(x, y)[0] == pytest.approx(expected, rel=1e-5)


def test_tiles_and_unequal_sets_change_nothing(
    generator: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = generator.standard_normal((50, 6)), generator.standard_normal((33, 6)) + 0.3

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / 6 + 1) ** 3

    own = [(kernel(z, z).sum() - np.trace(kernel(z, z))) / (len(z) * (len(z) - 1)) for z in (x, y)]
    expected = own[0] + own[1] - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr(evals.metrics.kernel, "_TILE", 7)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)


def test_equal_distributions_are_at_distance_zero_on_average(generator: np.random.Generator) -> None:
    distances = [kernel_distance(*generator.standard_normal((2, 20, 4))) for _ in range(300)]
    assert abs(np.mean(distances)) < 4 * np.std(distances) / 300**0.5
    assert min(distances) < 0


def test_the_spread_is_what_other_samples_would_show(generator: np.random.Generator) -> None:
    reference = generator.standard_normal((600, 5))
    found = [kernel_distance_with_spread(generator.standard_normal((80, 5)) + 0.4, reference) for _ in range(60)]
    distances, spreads = np.array(found).T
    assert np.mean(spreads) == pytest.approx(np.std(distances), rel=0.35)


def test_subsets_centre_on_the_distance(generator: np.random.Generator) -> None:
    x, y = generator.standard_normal((300, 5)), generator.standard_normal((300, 5)) + 0.5
    mean, spread = kernel_distance_of_subsets(x, y, subsets=60, size=100)
    assert mean == pytest.approx(kernel_distance(x, y), abs=4 * spread / 60**0.5)
    assert kernel_distance_of_subsets(x, y, subsets=60, size=100) == (mean, spread)


def test_too_few_samples_are_refused(generator: np.random.Generator) -> None:
    x = generator.standard_normal((7, 3))
    with pytest.raises(UserError, match="1 against 7 samples"):
        kernel_distance(x[:1], x)
    with pytest.raises(UserError, match="7 against 7 samples; at least 8"):
        kernel_distance_with_spread(x, x)
    with pytest.raises(UserError, match="NaN"):
        kernel_distance(np.full((3, 3), np.nan), x)
