"""FID's network, and the search for its weights; the standard weights themselves are not in the repository."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evals.features.inception
from evals.features import extractor_by_name
from evals.features.extractor import PublishedWeights, extract_features, found_weights
from evals.features.inception import INCEPTION, Inception, InceptionV3
from evals.features.resize import bilinear
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file


def seeded(network: InceptionV3) -> InceptionV3:
    """Weights that NumPy's seeded generators make, the same with every version of PyTorch."""
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        generator = np.random.default_rng([7, number])
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("conv.weight"):
            values = generator.standard_normal(tensor.shape) * (2 / tensor[0].numel()) ** 0.5
        elif name.endswith(("running_var", "bn.weight")):
            values = generator.uniform(0.8, 1.2, tensor.shape)
        else:
            values = generator.standard_normal(tensor.shape) * 0.1
        tensor.copy_(torch.from_numpy(values))
    return network.eval()


@pytest.fixture(scope="module")
def network() -> InceptionV3:
    return seeded(InceptionV3())


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, network: InceptionV3) -> Path:
    path = tmp_path_factory.mktemp("weights") / "published.pth"
    state = network.state_dict()
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    return path


@pytest.fixture
def published(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedWeights:
    """Seeded weights in the place of the standard ones, published under a file:// address; nothing is cached."""
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(INCEPTION.variable, raising=False)
    weights = replace(INCEPTION, digest=sha256_of_file(path), size=path.stat().st_size, url=path.as_uri())
    monkeypatch.setattr(evals.features.inception, "INCEPTION", weights)
    return weights


def test_network_is_the_published_one_in_size_and_names(network: InceptionV3) -> None:
    # torchvision's Inception-v3 without its second classifier has 23,834,568 parameters for 1000 classes.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    assert len(names) == 94 * 5 + 2
    for name in (
        "Conv2d_4a_3x3.bn.running_var",
        "Mixed_6e.branch7x7dbl_5.conv.weight",
        "Mixed_7c.branch_pool.bn.bias",
    ):
        assert name in names
    assert network.Mixed_6b.branch7x7_2.conv.weight.shape == (128, 128, 1, 7)
    assert network.Mixed_7b.branch3x3dbl_3b.conv.weight.shape == (384, 384, 3, 1)


def test_features_of_seeded_weights_are_frozen(network: InceptionV3) -> None:
    pixels = np.random.default_rng(1).uniform(-1, 1, (1, 3, 299, 299)).astype(np.float32)
    with torch.inference_mode():
        (features,) = network(torch.from_numpy(pixels))
    assert features.shape == (2048,)
    assert float(features.mean()) == pytest.approx(0.81458418, rel=1e-4)
    assert float(features.std()) == pytest.approx(1.12405839, rel=1e-4)
    expected = [0.02256928, 0.20625500, 1.56477087, 2.43966803, 0.12512133, 0.23031284, 1.78141250]
    np.testing.assert_allclose(features[::300], expected, rtol=1e-3)


def test_pools_leave_the_padding_out_and_the_last_one_takes_the_maximum(network: InceptionV3) -> None:
    with torch.inference_mode():
        flat = network.Mixed_5b(torch.ones(1, 192, 9, 9))[:, -32:]  # channels after the average pool
        torch.testing.assert_close(flat, flat[..., 4:5, 4:5].expand_as(flat))
        peak = torch.zeros(1, 2048, 5, 5)
        peak[..., 2, 2] = 1
        spread = network.Mixed_7c(peak)[0, -192:, 1:4, 1:4]
        whole = network.Mixed_7c.branch_pool(torch.ones(1, 2048, 1, 1))[0]
        torch.testing.assert_close(spread, whole.expand_as(spread), rtol=1e-4, atol=1e-5)


def test_weights_are_looked_for_in_the_order_flag_environment_cache_download(
    published: PublishedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cache/weights" / published.name
    assert found_weights(published) == cached  # downloaded
    assert sha256_of_file(cached) == published.digest
    gone = replace(published, url=(tmp_path / "gone").as_uri())
    assert found_weights(gone) == cached
    named = tmp_path / "named.pth"
    named.write_bytes(cached.read_bytes())
    monkeypatch.setenv(published.variable, str(named))
    assert found_weights(gone) == named
    assert found_weights(gone, cached) == cached
    named.unlink()
    with pytest.raises(UserError, match=r"named\.pth: no such file"):
        found_weights(gone)


def test_offline_the_message_says_all_that_is_needed(published: PublishedWeights, tmp_path: Path) -> None:
    offline = replace(INCEPTION, url=(tmp_path / "gone").as_uri())
    with pytest.raises(UserError) as caught:
        found_weights(offline)
    message = str(caught.value)
    assert "\n" not in message
    for part in (INCEPTION.name, "95,628,359 bytes", INCEPTION.digest, str(tmp_path / "cache/weights"), "fd_lite0"):
        assert part in message
    assert not list((tmp_path / "cache").rglob("*.pth*"))


def test_other_weights_are_refused_and_not_kept(published: PublishedWeights, tmp_path: Path) -> None:
    other = tmp_path / "other.pth"
    other.write_bytes(b"something else")
    with pytest.raises(UserError, match=rf"other\.pth: sha256 [0-9a-f]+; .* has {published.digest}"):
        Inception(other)
    with pytest.raises(UserError, match="sha256"):
        found_weights(replace(published, url=other.as_uri()))
    assert not list((tmp_path / "cache").rglob("*.pth*"))


def test_extractor_gives_the_networks_features_of_resized_pictures(
    published: PublishedWeights, network: InceptionV3
) -> None:
    images = np.random.default_rng(2).integers(0, 256, (2, 20, 20, 3), dtype=np.uint8)
    extractor = extractor_by_name("inception", grey=127.5)
    assert (extractor.frechet, extractor.kernel) == ("fid", "kid")
    found = extract_features(images, extractor, bilinear, progress=False)
    pixels = torch.from_numpy(bilinear(images, 299)).permute(0, 3, 1, 2) / 255
    with torch.inference_mode():
        expected = network(2 * pixels - 1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_standard_weights() -> None:
    try:
        path = found_weights(replace(INCEPTION, url="file:///nowhere"))
    except UserError:
        pytest.skip(f"{INCEPTION.name} is not on this machine; set {INCEPTION.variable} to test with it")
    extractor = Inception(path)
    images = np.zeros((1, 299, 299, 3), dtype=np.uint8)
    (features,) = extract_features(images, extractor, bilinear, progress=False)
    assert features.shape == (2048,)
    assert features.min() >= 0
    assert 0.1 < features.mean() < 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_a_gpu_gives_the_features_of_the_cpu(published: PublishedWeights) -> None:
    images = np.random.default_rng(3).integers(0, 256, (3, 20, 20, 3), dtype=np.uint8)
    found, expected = (
        extract_features(images, extractor_by_name("inception", device=device), bilinear, progress=False)
        for device in ("cuda", "cpu")
    )
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
