import numpy as np
import pytest
import torch
from torch import Tensor

from latent_prior.sampling import initial_noise
from mnif.data.batches import array_dataset, instance_keys
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.inference import infer_latents, initial_latents, optimize_latents
from mnif.latents.inner_loop import InnerLoop
from mnif.models.encoders import PatchEncoder, ViewsEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, psnr
from mnif.signals.image import Image
from mnif.training.methods import AutoDecoderMethod, EncoderMethod, MetaMethod
from mnif.utils.errors import UserError


@pytest.fixture
def signal() -> Image:
    return Image(16, 3)


@pytest.fixture
def observation(decoder: MNIFModel, signal: Image) -> Observation:
    """Pictures the decoder can draw exactly."""
    with torch.no_grad():
        decoder.coefficient_map.weight.normal_(std=0.5)
        return signal.on_grid(decoder(torch.randn(6, 12)))


def some(observation: Observation, index: slice) -> Observation:
    mask = None if observation.mask is None else observation.mask[index]
    return Observation(observation.values[index], observation.query, mask)


def quality(decoder: MNIFModel, latents: Tensor, observation: Observation) -> Tensor:
    with torch.no_grad():
        return psnr(decoder(latents), observation.values)


def test_refinement_finds_latents_that_draw_the_targets(
    decoder: MNIFModel, signal: Image, observation: Observation
) -> None:
    start = torch.zeros(6, 12)
    refined = optimize_latents(decoder, signal, observation, start, steps=100)
    assert (quality(decoder, refined, observation) > quality(decoder, start, observation) + 4).all()


def test_refined_latent_does_not_depend_on_its_batch_mates(
    decoder: MNIFModel, signal: Image, observation: Observation
) -> None:
    start = torch.zeros(6, 12)
    together = optimize_latents(decoder, signal, observation, start, steps=5)
    alone = optimize_latents(decoder, signal, some(observation, slice(2, 3)), start[:1], steps=5)
    torch.testing.assert_close(together[2:3], alone, atol=1e-5, rtol=0)


def test_inner_loop_latent_is_the_same_at_batch_1_and_32(decoder: MNIFModel, signal: Image) -> None:
    torch.manual_seed(0)
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    values = torch.rand(32, 16, 16, 3) * 2 - 1
    inner_loop = InnerLoop(12, steps=3, learning_rate=20.0)
    with torch.no_grad():
        together = inner_loop(decoder, signal, signal.on_grid(values))
        alone = torch.cat([inner_loop(decoder, signal, signal.on_grid(value[None])) for value in values])
    assert together.abs().mean() > 0.01
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_second_order_gradient_equals_finite_differences(decoder: MNIFModel, signal: Image) -> None:
    """Through three inner steps, in float64, against central differences along random directions."""
    decoder = decoder.double()
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    inner_loop = InnerLoop(12, steps=3, learning_rate=1.0).double()
    observation = signal.on_grid(torch.rand(2, 16, 16, 3, dtype=torch.float64) * 2 - 1)

    def loss() -> Tensor:
        latents = inner_loop(decoder, signal, observation, second_order=True)
        return signal.per_instance_loss(decoder, latents, observation).mean()

    parameters = [*decoder.parameters(), *inner_loop.parameters()]
    gradients = torch.autograd.grad(loss(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            parameter += 1e-5 * direction
            ahead = loss().item()
            parameter -= 2e-5 * direction
            behind = loss().item()
            parameter += 1e-5 * direction
        expected = (ahead - behind) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_first_order_ignores_how_a_step_depends_on_the_bases(decoder: MNIFModel, signal: Image) -> None:
    """Its gradient is that of the last loss with the latents held fixed, but for the rates."""
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    observation = signal.on_grid(torch.rand(3, 16, 16, 3) * 2 - 1)
    inner_loop = InnerLoop(12, steps=2, learning_rate=1.0)
    latents = inner_loop(decoder, signal, observation)
    through = torch.autograd.grad(signal.per_instance_loss(decoder, latents, observation).sum(), decoder.bases[0])[0]
    fixed = torch.autograd.grad(
        signal.per_instance_loss(decoder, latents.detach(), observation).sum(), decoder.bases[0]
    )[0]
    torch.testing.assert_close(through, fixed)
    assert inner_loop(decoder, signal, observation).requires_grad  # the rates learn


def test_meta_learning_where_training_is_compiled(decoder: MNIFModel, signal: Image) -> None:
    method = MetaMethod(decoder, signal, InnerLoop(12), second_order=True, start_noise=0.0)
    batch = {"row": torch.arange(2), "images": torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)}
    batch["key"] = torch.arange(2)
    plain = torch.autograd.grad(method(**batch), decoder.bases[0])
    method.compile(backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(method(**batch), decoder.bases[0]), plain)


def test_diverging_inner_loop_names_the_flag_to_lower(decoder: MNIFModel, signal: Image) -> None:
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=1e19)
    inner_loop, observation = InnerLoop(12, steps=5, learning_rate=1e30), signal.on_grid(torch.rand(2, 16, 16, 3))
    inner_loop(decoder, signal, observation)
    with pytest.raises(UserError, match=r"inner loop diverged at step \d of 5; lower --inner_learning_rate"):
        inner_loop.check()
    inner_loop.check()  # of the calls since
    rows = array_dataset({"images": torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)})
    with pytest.raises(UserError, match="inner loop diverged"):
        list(infer_latents(decoder, signal, rows, inner_loop, 0, batch_size=2))


def test_every_way_of_learning_lowers_its_loss(decoder: MNIFModel, signal: Image) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 1, 1, 3)).expand(-1, 16, 16, -1).to(torch.uint8)
    batch = {"images": images, "row": torch.arange(8)}
    state = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    rows = LatentEmbedding(8, 12, lanes=8, learning_rate=0.02, seed=0)
    for method in (
        EncoderMethod(
            decoder, signal, signal.encoder(12, 64), latent_noise=0.1, augmentations=[*signal.augmentations().values()]
        ),
        AutoDecoderMethod(decoder, signal, rows, latent_regularisation=1e-4),
        MetaMethod(decoder, signal, InnerLoop(12, learning_rate=2.0), second_order=True),
        MetaMethod(decoder, signal, InnerLoop(12, learning_rate=2.0), second_order=False),
    ):
        decoder.load_state_dict(state)
        optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
        losses = []
        for step in range(30):
            loss = method(key=instance_keys(0, step, batch["row"]), **batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(method, AutoDecoderMethod):
                method.rows.step()
            losses.append(loss.item())
        assert losses[-1] < 0.6 * losses[0], method


def test_learned_latents_do_not_start_from_the_noise_of_samples() -> None:
    rows = LatentEmbedding(8, 256, lanes=8, learning_rate=0.02, seed=5).read(torch.arange(8)).numpy()
    both = np.corrcoef(np.concatenate([rows, initial_noise(5, range(8), 256)]))
    assert np.abs(both[:8, 8:]).max() < 0.35  # 5.6 standard errors of what has nothing in common


def test_encoder_gives_normalised_latents_that_ignore_the_batch() -> None:
    encoder = PatchEncoder(resolution=16, latent_dim=12)
    values = torch.rand(5, 16, 16, 3) * 2 - 1
    latents = encoder(values)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents.square().mean(dim=1), torch.ones(5), atol=1e-2, rtol=0)
    torch.testing.assert_close(encoder(values[2:3]), latents[2:3], atol=1e-6, rtol=0)


@pytest.mark.parametrize(("dimensions", "resolution"), [(1, 50), (2, [18, 25]), (3, 10)])
def test_encoder_cuts_any_grid_into_patches(dimensions: int, resolution: int | list[int]) -> None:
    encoder = PatchEncoder(channels=2, resolution=resolution, latent_dim=6, dimensions=dimensions)
    sizes = [resolution] * dimensions if isinstance(resolution, int) else resolution
    values = torch.rand(2, *sizes, 2)
    patches = encoder.patch_network
    per_patch = torch.Size(patches.shape).numel()
    assert per_patch * patches.count >= torch.Size(sizes).numel()
    assert encoder(values).shape == (2, 6)
    # A change in one corner changes the features of one patch only.
    changed = values.clone()
    changed[(0, *[0] * dimensions)] += 1
    features = patches(values).view(2, patches.count, -1), patches(changed).view(2, patches.count, -1)
    assert (features[0] != features[1]).any(dim=2).nonzero().tolist() == [[0, 0]]


def test_views_may_come_in_any_order_and_unseen_ones_do_not_count() -> None:
    encoder = ViewsEncoder(resolution=16, latent_dim=6)
    values, poses = torch.rand(2, 4, 16, 16, 3), torch.randn(2, 4, 4, 4)
    latents = encoder(values, poses)
    torch.testing.assert_close(encoder(values.flip(1), poses.flip(1)), latents, atol=1e-5, rtol=0)
    mask = torch.ones(2, 4, 16, 16)
    mask[:, 2:] = 0
    torch.testing.assert_close(encoder(values, poses, mask), encoder(values[:, :2], poses[:, :2]), atol=1e-5, rtol=0)


def test_without_a_finder_the_search_starts_at_zero_and_is_longer(
    decoder: MNIFModel, signal: Image, observation: Observation
) -> None:
    images = ((observation.values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    rows = array_dataset({"images": images.numpy()})
    found = torch.cat([*infer_latents(decoder, signal, rows, None, refinement_steps=2, batch_size=4)])
    exact = signal.observe({"images": images})
    expected = optimize_latents(decoder, signal, exact, torch.zeros(6, 12), steps=10)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_what_was_not_seen_does_not_matter(decoder: MNIFModel, signal: Image, observation: Observation) -> None:
    mask = (torch.rand(6, 16, 16) < 0.5).float()
    hidden = observation.values * mask[..., None] + 7 * (1 - mask[..., None])
    start = torch.zeros(6, 12)
    seen = optimize_latents(decoder, signal, Observation(observation.values, (1, None), mask), start, steps=5)
    other = optimize_latents(decoder, signal, Observation(hidden, (1, None), mask), start, steps=5)
    torch.testing.assert_close(seen, other)
    encoder = signal.encoder(12, 64)
    torch.testing.assert_close(
        initial_latents(decoder, signal, encoder, Observation(observation.values, (1, None), mask)),
        initial_latents(decoder, signal, encoder, Observation(hidden, (1, None), mask)),
    )


def test_psnr_is_that_of_the_same_pictures_on_zero_to_one() -> None:
    torchmetrics = pytest.importorskip("torchmetrics.image")
    a, b = torch.rand(1, 8, 8, 3), torch.rand(1, 8, 8, 3)
    expected = torchmetrics.PeakSignalNoiseRatio(data_range=1.0)(a, b)
    torch.testing.assert_close(psnr(a * 2 - 1, b * 2 - 1)[0], expected)


@pytest.mark.parametrize(("noise", "bits"), [(1.0, 64.0), (0.3, 64 * 3.598259), (0.0, float("inf"))])
def test_noise_is_a_rate(decoder: MNIFModel, signal: Image, noise: float, bits: float) -> None:
    wide = MNIFModel(resolution=16, num_bases=2, width=8, depth=1, latent_dim=128)
    method = EncoderMethod(wide, signal, torch.nn.Identity(), noise)
    assert method.bits_per_instance() == pytest.approx(bits, rel=1e-6)
