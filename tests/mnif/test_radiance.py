"""Radiance fields: which rays are looked at, what they show, and that objects are learned from their pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mnif.data.batches import array_dataset
from mnif.data.views import load_views
from mnif.latents.embedding import LatentEmbedding
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import psnr
from mnif.signals.radiance import Cameras, RadianceField, Rays, ViewWriter
from mnif.signals.volume_rendering import camera_rays, turntable_poses
from mnif.training.methods import AutoDecoderMethod
from mnif.utils.errors import UserError

SIZE = (6, 8)


def decoder_of(signal: RadianceField, cells: int = 1, latent_dim: int = 5) -> MNIFModel:
    torch.manual_seed(0)
    decoder = MNIFModel(
        channels=4,
        dimensions=3,
        resolution=8,
        num_bases=4,
        width=8,
        depth=1,
        latent_dim=latent_dim,
        cells=cells,
        signal="radiance",
        signal_settings=signal.settings(),
    )
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    return decoder


def constant_decoder(signal: RadianceField, values: list[float], cells: int = 1) -> MNIFModel:
    """Whatever the latents, every point has the same colour and density."""
    decoder = decoder_of(signal, cells)
    with torch.no_grad():
        decoder.bases[-1].zero_()
        decoder.means[-1].zero_()
        decoder.means[-1][:, -4:] = torch.tensor(values)
    return decoder


class Drawn:
    """In place of a model: a field given as a function of the place [..., 3] → [..., 4]."""

    def __init__(self, field):
        self.field = field

    def coefficients(self, latents: Tensor) -> Tensor:
        return latents

    def values_at(self, coefficients: Tensor, coordinates: Tensor) -> Tensor:
        return self.field(coordinates)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Three objects, five views of each from cameras of their own, every pixel another value."""
    generator = np.random.default_rng(0)
    poses = torch.stack([turntable_poses(5, 2.0 + n, 10.0 * n + 5) for n in range(3)])
    return {
        "images": torch.from_numpy(generator.integers(0, 256, (3, 5, *SIZE, 3), dtype=np.uint8)),
        "poses": poses,
        "intrinsics": torch.tensor([[9.0, 8.0, 3.7, 3.2], [12.0, 12.0, 4.0, 3.0], [7.0, 9.0, 4.5, 2.5]]),
    }


def test_rays_of_a_part_are_those_of_its_pixels(batch: dict[str, Tensor]) -> None:
    signal = RadianceField(list(SIZE), rays=200, samples=4)
    whole = signal.observe(batch)
    part = signal.subsample(whole, torch.Generator().manual_seed(0))
    rays = part.query
    assert isinstance(rays, Rays)
    assert part.values.shape == rays.origins.shape == rays.directions.shape == (3, 200, 3)
    assert rays.jitter.shape == (200, 4)
    assert 0 <= rays.jitter.min() < rays.jitter.max() < 1
    numbers = set()
    for instance in range(3):
        intrinsics = batch["intrinsics"][instance].expand(5, 4)
        origins, directions = (t.reshape(-1, 3) for t in camera_rays(batch["poses"][instance], intrinsics, *SIZE))
        pixels = (batch["images"][instance].reshape(-1, 3) / 127.5 - 1).numpy()
        # Which pixel of which view each ray is, by its value: they are all different.
        distance = np.abs(pixels[None] - part.values[instance].numpy()[:, None]).max(axis=-1)
        place = distance.argmin(axis=1)
        assert distance[np.arange(200), place].max() < 1e-6
        torch.testing.assert_close(rays.origins[instance], origins[place])
        torch.testing.assert_close(rays.directions[instance], directions[place], atol=1e-6, rtol=0)
        numbers.add(tuple(place.tolist()))
    assert len(numbers) == 1  # the same of every instance
    assert len(set(*numbers)) > 100
    again = signal.subsample(whole, torch.Generator().manual_seed(0))
    assert torch.equal(again.values, part.values)
    assert not torch.equal(signal.subsample(whole, torch.Generator().manual_seed(1)).values, part.values)


def test_a_mask_goes_with_its_rays(batch: dict[str, Tensor]) -> None:
    signal = RadianceField(list(SIZE), rays=100, samples=4)
    whole = signal.observe(batch)
    bright = (whole.values[..., 0] > 0).float()
    part = signal.subsample(type(whole)(whole.values, whole.query, bright), torch.Generator().manual_seed(0))
    assert torch.equal(part.mask, (part.values[..., 0] > 0).float())


@pytest.mark.parametrize("background", ["white", "black"])
@pytest.mark.parametrize("bound", [1.0, 0.4])
@pytest.mark.parametrize("cells", [1, 2])
@torch.no_grad()
def test_a_constant_field_absorbs_as_beer_and_lambert_say(background: str, bound: float, cells: int) -> None:
    """Against the length of each ray in the cube, counted on many points along it."""
    samples = 8
    signal = RadianceField(list(SIZE), bound=bound, background=background, samples=samples, far=20.0)
    colour, number = np.array([0.3, -0.6, 0.9]), 0.25
    decoder = constant_decoder(signal, [*colour, number], cells)
    poses = turntable_poses(3, 2.5, 25.0)[None]
    intrinsics = torch.tensor([[5.0, 5.0, 4.0, 3.0]])
    origins, directions = (t.double().numpy() for t in camera_rays(poses, intrinsics[:, None].expand(1, 3, 4), *SIZE))
    steps = (np.arange(10_000) + 0.5) * (5 / 10_000)
    length = np.zeros(origins.shape[:-1])
    for place in np.ndindex(length.shape):
        points = origins[place] + steps[:, None] * directions[place]
        length[place] = (np.abs(points) <= bound).all(axis=1).mean() * 5
    density = np.log1p(np.exp(10 * number - 3)) * 2 / bound
    # The first depth lies in the middle of its interval, so half an interval in front of it is empty.
    passing = np.exp(-density * length * (1 - 0.5 / samples))[..., None]
    expected = colour * (1 - passing) + (1 if background == "white" else -1) * passing
    assert (length == 0).any()
    assert (length > 0.8 * bound).any()
    found = signal.render_views(decoder, decoder.coefficients(torch.zeros(1, 5)), Cameras(poses, intrinsics, *SIZE))
    np.testing.assert_allclose(found, expected, atol=3e-3)


@torch.no_grad()
def test_nothing_lies_before_near_or_behind_far() -> None:
    signal = RadianceField(5, near=2.0, far=2.5, samples=50)
    decoder = constant_decoder(signal, [-1.0, -1.0, -1.0, 0.2])
    rays = Rays(torch.tensor([[[0.0, 0.0, 2.4]]]), torch.tensor([[[0.0, 0.0, -1.0]]]))  # in the cube from 1.4 to 3.4
    density = np.log1p(np.exp(2 - 3)) * 2
    expected = 2 * np.exp(-density * 0.5 * (1 - 0.5 / 50)) - 1
    found = signal.render(decoder, decoder.coefficients(torch.zeros(1, 5)), rays)
    np.testing.assert_allclose(found, np.full((1, 1, 3), expected), atol=1e-5)


@torch.no_grad()
def test_whole_views_do_not_depend_on_the_pieces_they_are_rendered_in(
    batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    signal = RadianceField(list(SIZE), samples=6)
    decoder = decoder_of(signal, cells=2)
    coefficients = decoder.coefficients(torch.randn(3, 5))
    observation = signal.observe(batch)
    whole = signal.predict(decoder, coefficients, observation)
    assert whole.shape == observation.values.shape
    for rays in (1, 100, 3 * 7):
        monkeypatch.setattr("mnif.signals.radiance._RAYS_AT_ONCE", rays)
        torch.testing.assert_close(signal.predict(decoder, coefficients, observation), whole, atol=1e-5, rtol=0)
    alone = signal.predict(decoder, coefficients[1:2], signal.observe({k: v[1:2] for k, v in batch.items()}))
    torch.testing.assert_close(alone, whole[1:2], atol=1e-5, rtol=0)
    part = signal.subsample(observation, torch.Generator().manual_seed(0))
    middles = Rays(part.query.origins, part.query.directions)
    rendered = signal.render(decoder, coefficients, middles)
    pixel = torch.randint(5 * 6 * 8, (signal.rays,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rendered, whole.flatten(1, 3)[:, pixel], atol=1e-5, rtol=0)


@torch.no_grad()
def test_held_out_views_are_measured_on_and_never_observed(batch: dict[str, Tensor]) -> None:
    signal = RadianceField(list(SIZE), samples=4, held_out_views=2)
    decoder = decoder_of(signal)
    changed = batch | {"images": batch["images"].clone(), "poses": batch["poses"].clone()}
    changed["images"][:, 3:] = 255 - changed["images"][:, 3:]
    changed["poses"][:, 3:] = turntable_poses(2, 3.0, -40.0)
    seen, still = signal.observe(batch), signal.observe(changed)
    assert seen.values.shape[:2] == (3, 3)
    assert torch.equal(seen.values, still.values)
    assert torch.equal(seen.query.poses, still.query.poses)
    novel = signal.novel_views(batch)
    np.testing.assert_allclose(novel.values, batch["images"][:, 3:].numpy() / 127.5 - 1, atol=1e-6)
    assert torch.equal(novel.query.poses, batch["poses"][:, 3:])

    latents = torch.randn(3, 5)
    before, after = signal.metrics(decoder, latents, batch), signal.metrics(decoder, latents, changed)
    assert torch.equal(before["psnr"], after["psnr"])
    assert not torch.equal(before["psnr_novel_views"], after["psnr_novel_views"])
    coefficients = decoder.coefficients(latents)
    for name, observation in (("psnr", seen), ("psnr_novel_views", novel)):
        shown = signal.render_views(decoder, coefficients, observation.query).clamp(-1, 1).numpy()
        errors = np.square(shown - observation.values.numpy()).mean(axis=(1, 2, 3, 4))
        np.testing.assert_allclose(before[name], 10 * np.log10(4 / errors), rtol=1e-5)
    assert "psnr_novel_views" not in RadianceField(list(SIZE), samples=4).metrics(decoder, latents, batch)


def test_reconstructions_are_shown_from_the_cameras_of_their_originals(batch: dict[str, Tensor]) -> None:
    signal = RadianceField(list(SIZE), samples=4, held_out_views=2)
    decoder, latents = decoder_of(signal), torch.randn(3, 5)
    original = signal.original_images(batch)
    assert np.array_equal(original, batch["images"][:, 4].numpy())
    shown = signal.reconstruction_images(decoder, latents, batch)
    assert shown.shape == original.shape
    expected = signal.render_views(decoder, decoder.coefficients(latents), signal.novel_views(batch).query)[:, 1]
    np.testing.assert_allclose(shown / 127.5 - 1, expected.detach().clamp(-1, 1).numpy(), atol=1 / 127)


def test_figures_look_at_four_of_many_views(batch: dict[str, Tensor]) -> None:
    signal = RadianceField(list(SIZE), samples=4)
    decoder, latents = decoder_of(signal), torch.zeros(3, 5)
    metrics = signal.metrics(decoder, latents, batch)["psnr"]
    chosen = signal.observe_views(batch, [0, 1, 3, 4])
    shown = signal.render_views(decoder, decoder.coefficients(latents), chosen.query)
    torch.testing.assert_close(metrics, psnr(shown, chosen.values))


def ball(points: Tensor, centre: list[float]) -> Tensor:
    """A soft orange ball; its density number falls off far inside the cube."""
    distance = (points - torch.tensor(centre)).norm(dim=-1, keepdim=True)
    return torch.cat([torch.tensor([1.0, 0.0, -1.0]).expand(points.shape), 2 - 8 * distance], dim=-1)


def test_turntable_shows_a_symmetric_field_alike_from_everywhere() -> None:
    signal = RadianceField([16, 24], samples=200, camera_distance=2.5)
    middle = Drawn(lambda points: ball(points, [0.0, 0.0, 0.0]))
    frames = signal.turntable(middle, torch.zeros(2, 5), frames=7)
    assert frames.shape == (2, 7, 16, 24, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - frames[:, :1]).max() <= 2
    assert frames[0, 0, 8, 12, 2] < 40 < 250 < frames[0, 0, 0, 0].min()  # the ball is in the middle, on white
    aside = Drawn(lambda points: ball(points, [0.5, 0.0, 0.0]))
    frames = signal.turntable(aside, torch.zeros(1, 5), frames=4, elevation=0.0)[0]
    column = [np.average(np.arange(24), weights=255.0 - frame[8, :, 2]) for frame in frames]
    assert column[0] > 14  # the first camera stands over +z: +x is on its right
    assert column[2] == pytest.approx(23 - column[0], abs=0.1)
    assert column[1] == pytest.approx(11.5, abs=0.1)
    assert (255 - frames[1, ..., 2].astype(int)).sum() > (255 - frames[3, ..., 2].astype(int)).sum()  # nearer: larger


def test_a_world_in_another_unit_looks_the_same() -> None:
    field = Drawn(lambda points: ball(points, [0.3, 0.2, 0.1]))
    pictures = [
        RadianceField(16, bound=unit, far=4 * unit, samples=40, camera_distance=2.5 * unit).turntable(
            field, torch.zeros(1, 5), frames=3
        )
        for unit in (1.0, 0.2, 30.0)
    ]
    assert pictures[0].std() > 20
    for others in pictures[1:]:
        np.testing.assert_allclose(others.astype(int), pictures[0], atol=1)


def test_turntable_at_another_size_shows_the_same() -> None:
    signal = RadianceField([16, 24], samples=40)
    field = Drawn(lambda points: ball(points, [0.3, 0.3, 0.0]))
    small = signal.turntable(field, torch.zeros(1, 5), frames=1)
    large = signal.turntable(field, torch.zeros(1, 5), frames=1, resolution=48)
    assert large.shape == (1, 1, 48, 72, 3)
    np.testing.assert_allclose(large[:, :, 1::3, 1::3].astype(int), small, atol=1)


def test_one_of_eight_views_is_drawn_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    signal, latents = RadianceField([16, 24], samples=40), torch.zeros(2, 5)
    field = Drawn(lambda points: ball(points, [0.3, 0.3, 0.0]))
    circle = signal.turntable(field, latents, frames=8)
    low = ViewWriter(resolution=[24], elevation=-30.0)
    from_below = signal.turntable(field, latents, frames=8, elevation=-30.0, resolution=24)
    rendered = []
    render_views = RadianceField.render_views

    def counted(self: RadianceField, decoder: Any, coefficients: Tensor, cameras: Cameras) -> Tensor:
        rendered.append(cameras.poses.shape[1])
        return render_views(self, decoder, coefficients, cameras)

    monkeypatch.setattr(RadianceField, "render_views", counted)
    np.testing.assert_array_equal(signal.images(field, latents), circle[:, 1])
    np.testing.assert_array_equal(ViewWriter().images(field, signal, latents), circle[:, 1])
    np.testing.assert_array_equal(low.images(field, signal, latents), from_below[:, 1])
    assert rendered == [1, 1, 1]


@pytest.mark.parametrize("cells", [1, 2])
def test_gradients_reach_latents_and_bases(batch: dict[str, Tensor], cells: int) -> None:
    """In float64, against central differences along random directions."""
    signal = RadianceField(list(SIZE), samples=5, rays=40)
    decoder = decoder_of(signal, cells).double()
    part = signal.subsample(signal.observe(batch), torch.Generator().manual_seed(0))
    rays = Rays(part.query.origins.double(), part.query.directions.double(), part.query.jitter.double())
    part = type(part)(part.values.double(), rays)
    latents = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    wanted = [latents, decoder.bases[0], decoder.means[-1]]
    gradients = torch.autograd.grad(signal.per_instance_loss(decoder, latents, part).sum(), wanted)
    for tensor, gradient in zip(wanted, gradients, strict=True):
        direction = torch.randn_like(tensor)
        found = []
        with torch.no_grad():
            for step in (1e-5, -2e-5):
                tensor += step * direction
                found.append(signal.per_instance_loss(decoder, latents, part).sum().item())
            tensor += 1e-5 * direction
        expected = (found[0] - found[1]) / 2e-5
        assert abs(expected) > 1e-6
        assert (gradient * direction).sum().item() == pytest.approx(expected, rel=1e-4)


def test_settings_follow_the_data_and_the_flags(ball_views: Path) -> None:
    options = {"bound": None, "samples_per_ray": 7, "rays_per_step": 9, "held_out_views": 1}
    data = load_views(str(ball_views))
    signal = RadianceField.from_data(data, options)
    assert (signal.samples, signal.rays, signal.held_out_views, signal.resolution) == (7, 9, 1, 16)
    assert signal.camera_distance == pytest.approx(2.5)
    assert signal.bound == pytest.approx(1.0)  # near and far are the distance and the half diagonal of that cube
    assert signal.intrinsics == pytest.approx([16 / 2 / np.tan(0.45)] * 2 + [8, 8])
    assert RadianceField.from_data(data, options | {"bound": 0.7}).bound == 0.7
    with pytest.raises(UserError, match="--held_out_views 6: each object has 6 views"):
        RadianceField.from_data(data, options | {"held_out_views": 6})
    with pytest.raises(UserError, match="--bound -1: must be above 0"):
        RadianceField.from_data(data, options | {"bound": -1.0})
    more = RadianceField(16, near=0.8, held_out_views=5).load_like(str(ball_views))
    assert more.images.shape == (12, 6, 16, 16, 3)
    with pytest.raises(UserError, match="has 6 views; the model keeps 6 of each object for measuring"):
        RadianceField(16, near=0.8, held_out_views=6).load_like(str(ball_views))


def test_balls_are_learned_from_their_pictures(ball_run: Path, ball_views: Path) -> None:
    """Better than the best picture that is the same for all objects, also in views that were never learned from."""
    metrics = json.loads((ball_run / "metrics.json").read_text())
    images = load_views(str(ball_views)).images / 255.0
    for name, views in (("psnr_train", slice(0, 5)), ("psnr_novel_views_train", slice(5, 6))):
        shown = images[:, views]
        errors = np.square(shown - shown.mean(axis=0)).mean(axis=(1, 2, 3, 4))
        assert metrics[name] > np.mean(10 * np.log10(1 / errors)) + 2
    losses = [json.loads(line).get("loss") for line in (ball_run / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow
def test_furniture_is_learned_from_few_views() -> None:
    data = load_views("furniture-views", 16, max_views=4).rows(np.arange(8))
    options = {"bound": None, "samples_per_ray": 16, "rays_per_step": 128, "held_out_views": 1}
    signal = RadianceField.from_data(data, options)
    method = AutoDecoderMethod(
        decoder_of(signal, cells=2, latent_dim=16), signal, LatentEmbedding(8, 16, 8, 0.02, 0), 1e-4
    )
    optimizer = torch.optim.Adam(method.parameters(), lr=5e-3)
    (batch,) = array_dataset(data.arrays()).batches(8)
    for _ in range(250):
        loss = method(**batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.rows.step()
    with torch.no_grad():
        found = signal.metrics(method.decoder, method.rows.read(torch.arange(8)), batch)["psnr"].mean().item()
    seen = data.images[:, :3] / 255.0
    errors = np.square(seen - seen.mean(axis=0)).mean(axis=(1, 2, 3, 4))
    assert found > np.mean(10 * np.log10(1 / errors)) + 1
