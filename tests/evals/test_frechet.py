from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from evals.metrics.frechet import (
    Moments,
    MomentSums,
    frechet_distance,
    frechet_distance_from_features,
    load_moments,
    moments_of,
    save_moments,
)
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def correlated(generator: np.random.Generator, count: int, dimension: int, shift: float = 0.0) -> np.ndarray:
    return generator.standard_normal((count, dimension)) @ generator.standard_normal((dimension, dimension)) + shift


def test_commuting_gaussians_have_the_closed_form(generator: np.random.Generator) -> None:
    basis = np.linalg.qr(generator.standard_normal((12, 12)))[0]
    widths_a, widths_b = generator.uniform(0, 3, (2, 12))
    widths_a[:4] = 0  # a singular covariance is no exception
    mean_a, mean_b = generator.standard_normal((2, 12))
    a = Moments(mean_a, basis * widths_a**2 @ basis.T, 100)
    b = Moments(mean_b, basis * widths_b**2 @ basis.T, 100)
    expected = np.square(mean_a - mean_b).sum() + np.square(widths_a - widths_b).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_a_shift_costs_its_square(generator: np.random.Generator) -> None:
    features = correlated(generator, 200, 8)
    shift = np.arange(8.0)
    assert frechet_distance_from_features(features, features + shift) == pytest.approx(
        np.square(shift).sum(), rel=1e-9
    )


@pytest.mark.parametrize("count", [10, 300])
def test_a_set_is_at_no_distance_from_itself(generator: np.random.Generator, count: int) -> None:
    features = correlated(generator, count, 24)
    assert 0 <= frechet_distance_from_features(features, features) < 1e-5
    assert 0 <= frechet_distance(moments_of(features), moments_of(features)) < 1e-5


def test_distance_agrees_with_the_root_of_the_product(generator: np.random.Generator) -> None:
    x, y = correlated(generator, 300, 20), correlated(generator, 400, 20, shift=0.5)
    covariance_x, covariance_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(covariance_x @ covariance_y).real
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(covariance_x + covariance_y - 2 * root)
    assert frechet_distance_from_features(x, y) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(moments_of(y), moments_of(x)) == pytest.approx(expected, rel=1e-8)


def test_distance_agrees_with_torchmetrics(generator: np.random.Generator) -> None:
    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double()

    x, y = generator.random((2, 60, 12))
    metric = FrechetInceptionDistance(feature=Flatten(), input_img_size=(3, 2, 2)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x).reshape(-1, 3, 2, 2), real=True)
    metric.update(torch.from_numpy(y).reshape(-1, 3, 2, 2), real=False)
    assert frechet_distance_from_features(x, y) == pytest.approx(float(metric.compute()), rel=1e-6)


@pytest.mark.parametrize(("first", "second"), [(20, 30), (20, 200), (200, 20)])
def test_both_ways_agree_with_few_samples(generator: np.random.Generator, first: int, second: int) -> None:
    x, y = correlated(generator, first, 64), correlated(generator, second, 64, shift=1.0)
    expected = frechet_distance(moments_of(x), moments_of(y))
    assert frechet_distance_from_features(x, y) == pytest.approx(expected, rel=1e-6)


def test_sums_give_the_moments_in_any_order(generator: np.random.Generator) -> None:
    features = correlated(generator, 101, 6, shift=3.0)
    one, two = MomentSums(6), MomentSums(6)
    one.update(features[60:])
    two.update(features[:1])
    two.update(features[1:60])
    one.merge(two)
    moments = one.moments()
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, features.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(moments.covariance, np.cov(features.T), rtol=1e-10, atol=1e-10)


def test_float32_features_are_summed_in_float64(generator: np.random.Generator) -> None:
    features = (generator.standard_normal((5000, 3)) + 1000).astype(np.float32)
    expected = np.cov(features.astype(np.float64).T)
    np.testing.assert_allclose(moments_of(features).covariance, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "features",
    [np.ones((1, 4)), np.ones((0, 4)), np.ones(4), np.array(1.0), np.full((3, 4), np.nan), np.full((3, 4), np.inf)],
)
def test_features_without_moments_are_refused(features: np.ndarray) -> None:
    with pytest.raises(UserError):
        moments_of(features)
    with pytest.raises(UserError):
        frechet_distance_from_features(features, np.eye(4))
    with pytest.raises(UserError):
        frechet_distance_from_features(np.eye(4), features)


def test_distance_rises_with_noise_and_with_dropped_modes_and_falls_to_the_floor(
    generator: np.random.Generator,
) -> None:
    centres = generator.standard_normal((8, 6)) * 5

    def drawn(modes: int, noise: float) -> np.ndarray:
        return centres[generator.integers(0, modes, 4000)] + noise * generator.standard_normal((4000, 6))

    real = drawn(8, 1)
    floor = frechet_distance_from_features(drawn(8, 1), real)
    noisy = [frechet_distance_from_features(drawn(8, noise), real) for noise in (1.5, 2, 3)]
    dropped = [frechet_distance_from_features(drawn(modes, 1), real) for modes in (7, 4, 1)]
    assert floor < 0.3
    assert 5 * floor < noisy[0] < noisy[1] < noisy[2]
    assert 5 * floor < dropped[0] < dropped[1] < dropped[2]


def test_different_dimensions_are_refused() -> None:
    with pytest.raises(UserError, match="4"):
        frechet_distance_from_features(np.eye(4), np.eye(5))
    with pytest.raises(UserError, match="4 features against 5"):
        frechet_distance(moments_of(np.eye(4)), moments_of(np.eye(5)))


def test_broken_moments_are_refused() -> None:
    good = Moments(np.zeros(3), np.eye(3), 9)
    broken = Moments(good.mean, np.diag([1.0, 1.0, -0.1]), 3)
    for a, b in ((broken, good), (good, broken)):
        with pytest.raises(UserError, match="eigenvalue"):
            frechet_distance(a, b)
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(good, Moments(good.mean, np.full((3, 3), np.nan), 3))


def test_saved_moments_come_back_whole(generator: np.random.Generator, tmp_path: Path) -> None:
    moments = moments_of(correlated(generator, 30, 5))
    path = tmp_path / "statistics.npz"
    save_moments(path, moments, {"extractor": "lite0", "reference": "twemoji"})
    loaded = load_moments(path, {"extractor": "lite0"})
    np.testing.assert_array_equal(loaded.mean, moments.mean)
    np.testing.assert_array_equal(loaded.covariance, moments.covariance)
    assert loaded.count == 30
    assert [file.name for file in tmp_path.iterdir()] == ["statistics.npz"]
    with np.load(path, allow_pickle=False) as file:
        assert set(file) == {"mu", "sigma", "num", "protocol"}


def test_statistics_of_another_protocol_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    save_moments(path, moments_of(np.eye(3)), {"extractor": "lite0", "resize": "bilinear"})
    with pytest.raises(UserError, match="made with resize 'bilinear', not 'tf1-bilinear'"):
        load_moments(path, {"extractor": "lite0", "resize": "tf1-bilinear"})
    with pytest.raises(UserError, match="made with grey None"):
        load_moments(path, {"grey": "128"})


def test_broken_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    with pytest.raises(UserError, match="statistics"):
        load_moments(path, {})
    save_moments(path, moments_of(np.eye(3)), {})
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="statistics"):
        load_moments(path, {})
    path.write_bytes(b"")
    with pytest.raises(UserError, match="statistics"):
        load_moments(path, {})
    with path.open("wb") as file:
        np.save(file, np.eye(3))
    with pytest.raises(UserError, match="statistics"):
        load_moments(path, {})
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(UserError, match="protocol"):
        load_moments(path, {})
    np.savez(path, mu=np.array([object()]), sigma=np.eye(3), num=3, protocol="{}")
    with pytest.raises(UserError, match="statistics"):
        load_moments(path, {})
