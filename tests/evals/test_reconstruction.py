import numpy as np
import pytest
import sklearn.decomposition
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.image import PeakSignalNoiseRatio

from evals.metrics.reconstruction import border_step_ratio, psnr_per_image, ssim_per_image
from mnif.latents.pca import fit_pca, pca_warnings
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def test_psnr_agrees_with_torchmetrics(generator: np.random.Generator) -> None:
    images, references = generator.uniform(-0.2, 1.2, (2, 4, 6, 5, 3)).astype(np.float32)
    metric = PeakSignalNoiseRatio(data_range=(0.0, 1.0))
    for found, image, reference in zip(psnr_per_image(images, references), images, references, strict=True):
        expected = metric(torch.from_numpy(image), torch.from_numpy(reference).clamp(0, 1))
        assert found == pytest.approx(float(expected), abs=1e-4)


def test_psnr_of_known_errors() -> None:
    references = np.full((4, 2, 2, 3), 0.5)
    images = references + np.array([0.1, 0.01, 0.0, 9.0])[:, None, None, None]
    np.testing.assert_allclose(psnr_per_image(images, references), [20, 40, 100, 20 * np.log10(2)])


def test_ssim_is_the_formula_over_the_whole_picture_mirrored_at_its_rim(generator: np.random.Generator) -> None:
    """Scikit-image leaves the rim out; torchmetrics, whose numbers are published most, does not."""
    references = generator.uniform(0, 1, (3, 24, 20, 3))
    noise = generator.standard_normal(references.shape) * np.array([0, 0.1, 0.4])[:, None, None, None]
    images = (references + noise).clip(0, 1)

    def mean(values: np.ndarray) -> np.ndarray:
        settings = {"sigma": 1.5, "truncate": 3.5, "mode": "mirror", "axes": (1, 2)}
        return gaussian_filter(values, **settings)

    a, b = mean(images), mean(references)
    variances = mean(images**2) - a**2 + mean(references**2) - b**2
    covariance = mean(images * references) - a * b
    formula = (2 * a * b + 0.01**2) * (2 * covariance + 0.03**2)
    formula /= (a**2 + b**2 + 0.01**2) * (variances + 0.03**2)
    np.testing.assert_allclose(ssim_per_image(images, references), formula.mean(axis=(1, 2, 3)), atol=1e-5)


def test_ssim_of_pictures_smaller_than_its_window_is_refused() -> None:
    with pytest.raises(UserError, match="11 pixels"):
        ssim_per_image(np.zeros((1, 10, 16, 3)), np.zeros((1, 10, 16, 3)))


def test_psnr_of_bytes_or_of_other_shapes_is_refused() -> None:
    with pytest.raises(UserError, match="uint8"):
        psnr_per_image(np.zeros((1, 2, 2, 3), np.uint8), np.zeros((1, 2, 2, 3)))
    with pytest.raises(UserError, match="shape"):
        psnr_per_image(np.zeros((1, 2, 2, 3)), np.zeros((2, 2, 2, 3)))


@pytest.mark.parametrize("count", [40, 200])
def test_pca_is_the_reference_pca(generator: np.random.Generator, count: int) -> None:
    widths = np.geomspace(1, 0.01, 75)
    images = (generator.standard_normal((count, 75)) * widths @ generator.standard_normal((75, 75))).reshape(
        -1, 5, 5, 3
    )
    train, held_out = images[:-10], images[-10:]
    pca = fit_pca(train, 12)
    reference = sklearn.decomposition.PCA(12, svd_solver="full").fit(train.reshape(len(train), -1))
    expected = reference.inverse_transform(reference.transform(held_out.reshape(10, -1))).reshape(held_out.shape)
    found = pca.reconstruct(held_out)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(images).max())
    np.testing.assert_allclose(np.abs(np.sum(pca.components * reference.components_, axis=1)), 1, atol=1e-3)
    np.testing.assert_allclose(pca.components @ pca.components.T, np.eye(12), atol=1e-5)


@pytest.mark.parametrize("shape", [(9, 2, 2, 3), (60, 2, 2, 3)])
def test_all_components_reconstruct_what_they_were_fitted_to(
    generator: np.random.Generator, shape: tuple[int, ...]
) -> None:
    images = generator.random(shape)
    pca = fit_pca(images, min(shape[0], 12))
    np.testing.assert_allclose(pca.reconstruct(images), images, atol=1e-5)


def test_more_components_than_the_data_have_do_no_harm(generator: np.random.Generator) -> None:
    images = np.outer(generator.random(8), generator.random(12)).reshape(8, 2, 2, 3)
    pca = fit_pca(images, 6)
    np.testing.assert_allclose(pca.reconstruct(images), images, atol=1e-5)


@pytest.mark.parametrize("components", [0, 5])
def test_impossible_numbers_of_components_are_refused(components: int) -> None:
    with pytest.raises(UserError, match="components"):
        fit_pca(np.zeros((4, 12)), components)


@pytest.mark.parametrize("components", [4, 5, 6, 7])
def test_pca_that_holds_its_training_set_by_heart_is_said_to_mean_nothing(
    generator: np.random.Generator, components: int
) -> None:
    train = generator.random((7, 4, 4, 3))
    holds_all = np.abs(fit_pca(train, components).reconstruct(train) - train).max() < 1e-5
    assert bool(pca_warnings(components, len(train))) == holds_all == (components >= 6)


def test_the_mean_image_is_the_floor(generator: np.random.Generator) -> None:
    train = generator.random((30, 4, 4, 3))
    mean = np.broadcast_to(fit_pca(train, 1).mean.reshape(4, 4, 3), train.shape)
    expected = [-10 * np.log10(np.mean((image - train.mean(axis=0)) ** 2)) for image in train]
    np.testing.assert_allclose(psnr_per_image(mean, train), expected, rtol=1e-5)
    assert psnr_per_image(fit_pca(train, 20).reconstruct(train), train).mean() > np.mean(expected)


def test_border_steps_are_counted_by_hand() -> None:
    originals = np.zeros((1, 4, 6, 1))
    originals[:, :, 3:] = 1  # the border between columns 2 and 3: four steps of 1; between rows 1 and 2: six of 0
    reconstructions = np.zeros((1, 4, 6, 1))
    reconstructions[:, 2:] = 1  # the border between rows: six steps of 1
    assert border_step_ratio(reconstructions, originals, cells=2) == pytest.approx(6 / 4)


def test_steps_inside_a_cell_do_not_count() -> None:
    originals = np.zeros((1, 8, 8, 1))
    originals[:, :, 4:] = 1
    inside = np.zeros((1, 8, 8, 1))
    inside[:, 3:5, 3:5] = 1  # lies across the borders of two cells per axis and ends within the cells
    assert border_step_ratio(inside, originals, cells=2) == 0
    assert border_step_ratio(originals / 2, originals, cells=4) == 0.5


def test_seams_raise_the_ratio(generator: np.random.Generator) -> None:
    originals = generator.random((3, 16, 16, 3)).cumsum(axis=1).cumsum(axis=2) / 300
    seams = originals.copy()
    seams[:, 4:8] += 0.5
    assert border_step_ratio(originals, originals, cells=4) == 1
    assert border_step_ratio(seams, originals, cells=4) > 1.5


def test_borders_that_are_not_there() -> None:
    flat = np.zeros((1, 4, 4, 3))
    stepped = flat.copy()
    stepped[:, 2:] = 1
    assert np.isnan(border_step_ratio(flat, flat, cells=1))
    assert np.isnan(border_step_ratio(flat, flat, cells=2))
    assert np.isinf(border_step_ratio(stepped, flat, cells=2))


@pytest.mark.parametrize("cells", [0, 3])
def test_cells_that_do_not_divide_the_picture_are_refused(cells: int) -> None:
    with pytest.raises(UserError, match="cells"):
        border_step_ratio(np.zeros((1, 4, 4, 3)), np.zeros((1, 4, 4, 3)), cells=cells)
