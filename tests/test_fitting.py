import pytest
import torch

from mnif.encoder import PatchEncoder
from mnif.fitting import AutoDecoding, encoded_latents, in_batches, psnr, refined_latents
from mnif.modeling import MNIFModel


@pytest.fixture
def targets(decoder: MNIFModel) -> torch.Tensor:
    """Pictures the decoder can draw exactly."""
    with torch.no_grad():
        decoder.coefficient_map.weight.normal_(std=0.5)
        return decoder(torch.randn(6, 12))


def test_refinement_finds_latents_that_draw_the_targets(decoder: MNIFModel, targets: torch.Tensor) -> None:
    start = torch.zeros(6, 12)
    before = psnr(in_batches(decoder, start), targets)
    refined = refined_latents(decoder, targets, start, steps=100)
    after = psnr(in_batches(decoder, refined), targets)
    assert (after > before + 4).all()
    assert all(p.requires_grad for p in decoder.parameters())


def test_refined_latent_does_not_depend_on_its_batch_mates(decoder: MNIFModel, targets: torch.Tensor) -> None:
    start = torch.zeros(6, 12)
    together = refined_latents(decoder, targets, start, steps=5)
    alone = refined_latents(decoder, targets, start, steps=5, batch_size=1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_encoder_gives_normalised_latents_that_ignore_the_batch() -> None:
    encoder = PatchEncoder(resolution=16, patch_size=4, latent_dim=12)
    values = torch.rand(5, 16, 16, 3) * 2 - 1
    latents = encoder(values)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents.square().mean(dim=1), torch.ones(5), atol=1e-2, rtol=0)
    torch.testing.assert_close(encoder(values[2:3]), latents[2:3], atol=1e-6, rtol=0)


def test_without_an_encoder_the_search_starts_at_zero_and_is_longer(decoder: MNIFModel, targets: torch.Tensor) -> None:
    found = encoded_latents(decoder, None, targets, refinement_steps=2)
    expected = refined_latents(decoder, targets, torch.zeros(6, 12), steps=10)
    torch.testing.assert_close(found, expected)


def test_auto_decoding_touches_only_the_rows_of_the_batch(decoder: MNIFModel, targets: torch.Tensor) -> None:
    module = AutoDecoding(decoder, instances=6, latent_regularisation=0.0)
    before = module.latents.weight.detach().clone()
    optimizer = torch.optim.SparseAdam(module.latents.parameters(), lr=0.1)
    module(targets[[1, 4]], torch.tensor([1, 4])).backward()
    optimizer.step()
    changed = (module.latents.weight != before).any(dim=1)
    assert changed.tolist() == [False, True, False, False, True, False]


def test_psnr_is_that_of_the_same_pictures_on_zero_to_one() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.image")
    a, b = torch.rand(1, 8, 8, 3), torch.rand(1, 8, 8, 3)
    expected = torchmetrics.PeakSignalNoiseRatio(data_range=1.0)(a, b)
    torch.testing.assert_close(psnr(a * 2 - 1, b * 2 - 1)[0], expected)
