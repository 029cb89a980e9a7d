import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from evals.features.resize import RESIZES, bicubic_antialias, bilinear, pillow_bicubic, tf1_bilinear


@pytest.fixture
def images() -> np.ndarray:
    """Without extremes, because filters differ in when they cut off what overshoots."""
    return np.random.default_rng(0).integers(90, 160, (2, 9, 12, 3), dtype=np.uint8)


def test_each_filter_is_the_one_its_name_says(images: np.ndarray) -> None:
    first = Image.fromarray(images[0])
    pillow = np.asarray(first.resize((30, 30), Image.Resampling.BICUBIC), dtype=np.float32)
    assert np.abs(bicubic_antialias(images, 30)[0] - pillow).max() < 1.1
    assert np.abs(pillow_bicubic(images, 30)[0] - pillow).max() < 1.1
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double() / 255
    expected = interpolate(pixels, size=(30, 30), mode="bilinear", align_corners=False) * 255
    np.testing.assert_allclose(bilinear(images, 30), expected.permute(0, 2, 3, 1), atol=1e-3)


def test_tensorflow_looks_at_multiples_of_the_step(images: np.ndarray) -> None:
    found = tf1_bilinear(images, 6)
    expected = np.empty((6, 6, 3))
    for row in range(6):
        for column in range(6):
            y, x = row * 9 / 6, column * 12 / 6
            top, left = int(y), int(x)
            square = images[0, top : top + 2, left : left + 2].astype(float)
            upper, lower = (square[i, 0] + (square[i, -1] - square[i, 0]) * (x - left) for i in (0, -1))
            expected[row, column] = upper + (lower - upper) * (y - top)
    np.testing.assert_allclose(found[0], expected, atol=1e-3)


def test_floats_are_resized_as_bytes_are_and_only_the_default_rounds(images: np.ndarray) -> None:
    for name, resize in RESIZES.items():
        found = resize(images, 20)
        assert found.shape == (2, 20, 20, 3)
        assert found.dtype == np.float32
        np.testing.assert_allclose(resize(images.astype(np.float32), 20), found, atol=1.01)
        assert (found == found.round()).all() == (name == "bicubic-antialias")


def test_pictures_of_the_right_size_stay_as_they_are(images: np.ndarray) -> None:
    square = images[:, :, :9]
    for resize in RESIZES.values():
        np.testing.assert_allclose(resize(square, 9), square, atol=1e-3)
