"""Signals on grids: what they observe, which part a step looks at, and how errors and figures are counted."""

import json
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from PIL import Image as Picture
from torch import Tensor

from mnif.commands.fit import main as fit
from mnif.data.batches import InstanceGenerator, instance_keys
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals import registry
from mnif.signals.base import GridSignal, Observation, Signal, intersection_over_union, psnr
from mnif.signals.image import Image, ImageWriter
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import register_signal, signal_class, signal_of_model
from mnif.signals.voxels import MeshWriter, Voxels
from mnif.training.methods import EncoderMethod
from mnif.utils.errors import UserError
from mnif.utils.meshes import occupancy_preview

SIZE = [12, 8]


def decoder_of(signal: Signal, **settings: object) -> MNIFModel:
    """A small model of a signal whose latents matter."""
    torch.manual_seed(0)
    small = {"num_bases": 4, "width": 8, "depth": 1, "latent_dim": 6, "cells": 2}
    decoder = MNIFModel(
        channels=signal.channels,
        dimensions=signal.dimensions,
        resolution=signal.grid_resolution,
        signal=signal.name,
        signal_settings=signal.settings(),
        **small | settings,
    )
    if decoder.coefficient_map is not None:
        torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    return decoder


def test_shapes_in_annotations_are_checked_here() -> None:
    with pytest.raises(TypeCheckError, match="targets"):
        psnr(torch.zeros(2, 5, 3), torch.zeros(2, 6, 3))


def bytes_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """What Pillow makes of a picture of 1, 3 or 4 channels on a white ground."""
    picture = Picture.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).convert("RGBA")
    return np.asarray(Picture.alpha_composite(Picture.new("RGBA", picture.size, "white"), picture).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_channels(channels: int) -> None:
    signal = Image(SIZE, channels)
    decoder = decoder_of(signal)
    images = bytes_of(3, *SIZE, channels)
    batch = {"images": torch.from_numpy(images)}
    observation = signal.observe(batch)
    assert observation.mask is None
    np.testing.assert_allclose(observation.values.numpy(), images / 127.5 - 1, atol=1e-6)
    expected = np.stack([on_white(pixels) for pixels in images])
    np.testing.assert_allclose(signal.original_images(batch).astype(int), expected, atol=1 if channels == 4 else 0)
    with torch.no_grad():
        latents = torch.randn(3, 6)
        shown = signal.images(decoder, latents)
        drawn = ((decoder(latents).numpy().clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    assert drawn.shape == (3, *SIZE, channels)
    assert shown.shape == (3, *SIZE, 3)
    assert shown.dtype == np.uint8
    expected = np.stack([on_white(pixels) for pixels in drawn])
    np.testing.assert_allclose(shown.astype(int), expected, atol=2 if channels == 4 else 0)
    writer = ImageWriter(resolution=[24, 15])
    with torch.no_grad():
        large, written = writer.images(decoder, signal, latents), writer.to_array(decoder, signal, latents, 3, 2)
    expected = np.stack([on_white(pixels) for pixels in written])
    np.testing.assert_allclose(large.astype(int), expected, atol=2 if channels == 4 else 0)
    assert large.shape == (3, 24, 15, 3)


@torch.no_grad()
def test_shapes_are_shaded_at_the_resolution_asked_for() -> None:
    signal = Voxels(8)
    decoder, latents = decoder_of(signal), torch.randn(2, 6, generator=torch.Generator().manual_seed(1))
    shaded = MeshWriter(resolution=[20]).images(decoder, signal, latents)
    expected = [occupancy_preview(shape, 96) for shape in (decoder(latents, 20)[..., 0] > 0).numpy()]
    np.testing.assert_array_equal(shaded, np.stack(expected))
    plain = MeshWriter().images(decoder, signal, latents)
    np.testing.assert_array_equal(plain, signal.images(decoder, latents))
    assert (plain != shaded).any()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pictures_of_any_channels_are_learned(channels: int) -> None:
    signal = Image(SIZE, channels, stride=2)
    method = EncoderMethod(
        decoder_of(signal),
        signal,
        signal.encoder(6, 32),
        latent_noise=0.0,
        augmentations=[*signal.augmentations().values()],
    )
    plain = torch.from_numpy(bytes_of(8, 1, 1, channels)).expand(-1, *SIZE, -1)
    batch = {"images": plain, "row": torch.arange(8)}
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss = method(key=instance_keys(0, step, batch["row"]), **batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    variance = signal.observe(batch).values.var(dim=0, correction=0).mean().item()
    assert losses[-1] < 0.6 * losses[0]
    assert losses[-1] < variance  # what predicting the mean picture would leave


GRIDS = {
    "pictures": Image(SIZE, 3, stride=2),
    "shapes": Voxels(8, stride=2),
    "pictures of odd parts": Image([9, 15], 1, 3),
}


@pytest.mark.parametrize("cells", [1, 4])
@pytest.mark.parametrize("grid", GRIDS)
@torch.no_grad()
def test_parts_tile_the_grid_and_are_predicted_as_the_whole_is(grid: str, cells: int) -> None:
    signal = GRIDS[grid]
    decoder = decoder_of(signal, cells=cells, overlap=0.2)
    coefficients = decoder.coefficients(torch.randn(2, 6))
    axes = [signal.resolution] * signal.dimensions if isinstance(signal.resolution, int) else signal.resolution
    values = torch.rand(2, *axes, signal.channels)
    mask = (torch.rand(2, *axes) < 0.5).float()
    whole = Observation(values, (1, None), mask)
    predicted = signal.predict(decoder, coefficients, whole)
    torch.testing.assert_close(predicted, decoder.decode_coefficients(coefficients, decoder.grid()))

    pixel = torch.arange(int(np.prod(axes))).view(*axes)
    covered: dict[tuple[int, ...], Tensor] = {}
    for seed in range(150):
        part = signal.subsample(whole, torch.Generator().manual_seed(seed))
        stride, phase = part.query
        assert stride == signal.stride
        taken = tuple(slice(start, None, stride) for start in phase)
        covered[phase] = pixel[taken].flatten()
        assert torch.equal(part.values, values[:, *taken])
        assert part.mask is not None
        assert torch.equal(part.mask, mask[:, *taken])
        if seed < 20:
            torch.testing.assert_close(
                signal.predict(decoder, coefficients, part), predicted[:, *taken], atol=1e-5, rtol=0
            )
    assert torch.equal(torch.cat([*covered.values()]).sort().values, pixel.flatten())


def test_a_stride_must_divide_every_axis() -> None:
    with pytest.raises(UserError, match="--stride 4: must divide the resolution, 10"):
        Image([8, 10], 3, stride=4)
    with pytest.raises(UserError, match="--stride 0"):
        Voxels(8, stride=0)


@pytest.mark.parametrize("resolution", [3, 8, 13])
def test_occupancy_is_unpacked_as_numpy_does_it(resolution: int) -> None:
    occupied = np.random.default_rng(0).random((2, resolution, resolution, resolution)) < 0.3
    packed = torch.from_numpy(np.packbits(occupied, axis=-1))
    observation = Voxels(resolution).observe({"packed": packed})
    unpacked = np.unpackbits(packed.numpy(), axis=-1, count=resolution)
    np.testing.assert_array_equal(observation.values[..., 0].numpy(), unpacked * 2.0 - 1)
    np.testing.assert_array_equal(observation.values[..., 0].numpy() > 0, occupied)


def test_intersection_over_union_of_known_shapes() -> None:
    nothing, left, right, half = (torch.full((4, 2, 2, 1), -1.0) for _ in range(4))
    left[:2], right[2:], half[1:3] = 1.0, 0.5, 0.1
    values, targets = (
        torch.stack([left, left, left, nothing, nothing]),
        torch.stack([left, right, half, left, nothing]),
    )
    torch.testing.assert_close(intersection_over_union(values, targets), torch.tensor([1.0, 0.0, 1 / 3, 0.0, 1.0]))
    a, b = np.random.default_rng(0).standard_normal((2, 6, 5, 5, 5, 1)).astype(np.float32)
    axes = (1, 2, 3, 4)
    expected = np.logical_and(a > 0, b > 0).sum(axis=axes) / np.logical_or(a > 0, b > 0).sum(axis=axes)
    np.testing.assert_allclose(intersection_over_union(torch.from_numpy(a), torch.from_numpy(b)), expected, rtol=1e-6)


def test_psnr_of_known_errors_and_of_what_was_seen() -> None:
    targets = torch.full((4, 3, 3, 1), 0.2)
    values = targets + torch.tensor([0.2, 0.02, 0.0, 50.0]).view(4, 1, 1, 1)  # errors of 0.1, 0.01 and 0 on [0, 1]
    np.testing.assert_allclose(psnr(values, targets), [20, 40, 100, 20 * np.log10(2 / 0.8)], rtol=1e-5)
    a, b = np.random.default_rng(0).uniform(-1, 1, (2, 5, 4, 7, 3)).astype(np.float32)
    seen = np.random.default_rng(1).random((5, 4, 7)) < 0.4
    expected = [10 * np.log10(4 / np.square(x - y)[where].mean()) for x, y, where in zip(a, b, seen, strict=True)]
    found = psnr(torch.from_numpy(a), torch.from_numpy(b), torch.from_numpy(seen).float())
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("signal", [Image(SIZE, 3, 2), Voxels(6, stride=3)], ids=["pictures", "shapes"])
def test_errors_of_one_field_are_those_of_the_general_way(signal: GridSignal) -> None:
    decoder = decoder_of(signal, cells=1)
    axes = [signal.resolution] * signal.dimensions if isinstance(signal.resolution, int) else signal.resolution
    whole = signal.on_grid(torch.rand(3, *axes, signal.channels) * 2 - 1)
    latents = torch.randn(3, 6, requires_grad=True)
    for observation in (whole, signal.subsample(whole, torch.Generator().manual_seed(3))):
        fast = signal.per_instance_loss(decoder, latents, observation)
        general = Signal.per_instance_loss(signal, decoder, latents, observation)
        predicted = signal.predict(decoder, decoder.coefficients(latents), observation).detach()
        expected = (predicted - observation.values).square().flatten(1).mean(dim=1)
        torch.testing.assert_close(fast, general)
        torch.testing.assert_close(fast.detach(), expected)
        weights = torch.tensor([1.0, -2.0, 3.0])  # so that instances cannot stand for one another
        wanted = [latents, *decoder.parameters()]
        gradients = [torch.autograd.grad((errors * weights).sum(), wanted) for errors in (fast, general)]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("signal", [Image(SIZE, 3, 2), Voxels(6, stride=3)], ids=["pictures", "shapes"])
def test_errors_of_cells_are_that_of_their_blend_and_what_they_differ_by(signal: GridSignal, masked: bool) -> None:
    decoder = decoder_of(signal, cells=2)
    axes = [signal.resolution] * signal.dimensions if isinstance(signal.resolution, int) else signal.resolution
    whole = signal.on_grid(torch.rand(3, *axes, signal.channels) * 2 - 1)
    if masked:
        whole = replace(whole, mask=(torch.rand(3, *axes) < 0.7).float())
    part = signal.subsample(whole, torch.Generator().manual_seed(3))
    latents = torch.randn(3, 6)
    grid = decoder.grid(signal.resolution, *part.query)
    values = decoder.bake(decoder.coefficients(latents))(grid.coordinates).view(3, *grid.weights.shape, -1)
    squares, blended = grid.blend(values.square()), grid.blend(values)
    differ = Observation(torch.zeros_like(blended), None, part.mask).errors(
        (squares - blended.square()).clamp(0).sqrt()
    )
    torch.testing.assert_close(signal.per_instance_loss(decoder, latents, part), part.errors(blended) + differ)


def test_a_mask_of_ones_changes_nothing_and_a_partial_one_counts_what_it_shows() -> None:
    signal = Image(SIZE, 3)
    decoder = decoder_of(signal, cells=1)
    values, latents = torch.rand(2, *SIZE, 3), torch.randn(2, 6)
    plain = signal.per_instance_loss(decoder, latents, signal.on_grid(values))
    ones = signal.per_instance_loss(decoder, latents, Observation(values, (1, None), torch.ones(2, *SIZE)))
    torch.testing.assert_close(ones, plain)
    mask = torch.zeros(2, *SIZE)
    mask[:, 2:5, 3] = 1
    masked = signal.per_instance_loss(decoder, latents, Observation(values, (1, None), mask))
    expected = (decoder(latents) - values)[:, 2:5, 3].square().mean(dim=(1, 2))
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize(("signal", "axis"), [(Image(SIZE, 3), 2), (Voxels(8), 1)], ids=["pictures", "shapes"])
def test_about_half_are_mirrored_and_nothing_else_changes(signal: GridSignal, axis: int) -> None:
    generator = InstanceGenerator(instance_keys(0, 0, torch.arange(400)))
    shape = (400, *SIZE, 3) if signal.dimensions == 2 else (400, 8, 8, 8, 1)
    values = torch.rand(shape)
    changed = signal.augmentations()["random_flip"](signal.on_grid(values), generator).values
    as_they_were = (changed == values).flatten(1).all(dim=1)
    mirrored = (changed == torch.from_numpy(np.flip(values.numpy(), axis).copy())).flatten(1).all(dim=1)
    assert (as_they_were ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_every_order_of_colours_occurs_and_pixels_stay_whole() -> None:
    generator = InstanceGenerator(instance_keys(0, 0, torch.arange(300)))
    signal = Image(SIZE, 3)
    values = torch.rand(300, *SIZE, 3)
    changed = signal.augmentations()["random_colours"](signal.on_grid(values), generator).values
    orders = {order: (changed == values[..., order]).flatten(1).all(dim=1) for order in permutations(range(3))}
    assert all(30 < chosen.sum() < 70 for chosen in orders.values())
    assert sum(chosen.int() for chosen in orders.values()).eq(1).all()
    assert "random_colours" not in Image(SIZE, 1).augmentations()


@pytest.mark.parametrize("mixing", ["delta", "average"])
@pytest.mark.parametrize("form", ["layer", "shared", "direct"])
def test_forms_of_coefficients(form: str, mixing: str) -> None:
    bases, width, latent_dim, fields = 5, 8, 6, 4
    decoder = decoder_of(
        Image(8, 3),
        num_bases=bases,
        width=width,
        depth=1,
        mixing=mixing,
        coefficient_form=form,
        latent_dim=None if form == "direct" else latent_dim,
    )
    layers = [(2 + 1) * width, (width + 1) * width, (width + 1) * 3]
    delta = mixing == "delta"
    mixed = layers[1:] if delta else layers
    vectors = fields * (1 if form == "shared" else len(mixed))
    expected = sum(mixed) * bases + (sum(layers) if delta else 0)
    if form == "direct":
        assert decoder.coefficient_map is None
        assert decoder.config.latent_dim == vectors * bases
    else:
        expected += (latent_dim + 1) * vectors * bases
    assert sum(parameter.numel() for parameter in decoder.parameters()) == expected

    latents = torch.randn(3, decoder.config.latent_dim)
    found = decoder.coefficients(latents)
    assert found.shape == (3, fields, len(mixed), bases)
    same = (found == found[:, :, :1]).all()
    assert same if form == "shared" else not same
    assert not (found == found[:, :1]).all()  # every cell has its own
    if form == "direct":
        numbers = latents.numpy().reshape(3, fields, len(mixed), bases) + (0 if delta else 1)
    else:
        weight, bias = (np.float64(tensor.detach()) for tensor in decoder.coefficient_map.parameters())
        numbers = (latents.numpy() @ weight.T + bias).reshape(3, fields, -1, bases)
    np.testing.assert_allclose(found.detach(), numbers / np.sqrt(bases) * np.ones(found.shape), rtol=1e-4, atol=1e-6)


def test_sizes_of_latents_that_do_not_fit_their_form() -> None:
    with pytest.raises(ValueError, match="latent_dim 7: direct coefficients make it 48"):
        MNIFModel(num_bases=6, cells=2, depth=0, latent_dim=7, coefficient_form="direct", mixing="average")
    with pytest.raises(ValueError, match="latent_dim: a number is needed"):
        MNIFModel(latent_dim=None)
    with pytest.raises(ValueError, match="coefficient_form"):
        MNIFModel(coefficient_form="none")


@pytest.mark.parametrize(
    "signal",
    [Image(SIZE, 4, stride=2), Voxels(8, stride=4), RadianceField([6, 8], bound=0.5, samples=4, held_out_views=2)],
    ids=lambda signal: signal.name,
)
def test_a_model_remembers_its_signal(signal: Signal, tmp_path) -> None:
    decoder_of(signal).save_pretrained(tmp_path)
    loaded = signal_of_model(MNIFModel.from_pretrained(tmp_path, low_cpu_mem_usage=False))
    assert type(loaded) is type(signal)
    assert loaded.settings() == signal.settings()


def test_signals_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", {})
    assert signal_class("voxels") is Voxels
    with pytest.raises(UserError, match="signal 'relief': must be one of image, radiance, voxels"):
        signal_class("relief")

    @register_signal
    class Relief(Image):
        name = "relief"

    assert signal_class("relief") is Relief
    decoder = decoder_of(Relief(8, 1))
    assert type(signal_of_model(decoder)) is Relief
    with pytest.raises(UserError, match="must be one of image, radiance, relief, voxels"):
        signal_class("sound")


@pytest.mark.parametrize(
    ("resolution", "cells"),
    [(8, 4), (28, 4), (32, 4), (48, 6), (64, 8), ([48, 64], 7), (100, 12), (128, 16), (512, 16)],
)
def test_cells_of_pictures_have_about_eight_pixels(resolution: int | list[int], cells: int) -> None:
    assert Image(resolution, 3).default_cells() == cells


def test_cells_given_win_and_those_of_the_rule_are_recorded(picture_folder: Path, tmp_path: Path) -> None:
    small = ["--num_bases", "2", "--width", "4", "--depth", "0", "--latent_dim", "3", "--encoder_width", "8"]
    small += ["--max_train_steps", "1", "--train_batch_size", "4", "--refinement_steps", "0"]
    for given, cells in (([], 6), (["--cells", "1"], 1)):
        run = tmp_path / str(cells)
        fit(["--data", str(picture_folder), "--output_dir", str(run), "--resolution", "48", *given, *small])
        assert json.loads((run / "run.json").read_text())["fit"]["arguments"]["cells"] == cells
        assert load_component(MNIFModel, run / "model", "decoder").config.cells == cells
    assert Voxels(64, 1).default_cells() == 4
