"""Scores, thresholds and verdicts against closed forms, and `mnif encode --gate` and `--robust`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from mnif.cli import main
from mnif.data.batches import ArrayDataset
from mnif.latents import calibration, surprise
from mnif.latents.calibration import HeldOut, TrainingInstances, check_enough, fit_arrays, fit_looks
from mnif.latents.damage import SHARES, _foreign, damaged, some_damaged
from mnif.latents.damage_network import _Network, learn_damage
from mnif.latents.inference import optimize_latents
from mnif.latents.patches import patches_of, residuals_in_patches
from mnif.latents.profile import load_profile
from mnif.latents.robust import RobustLoss
from mnif.latents.surprise import KINDS, NUMBERS, SCORES
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.model_folders import sha256_of_model
from tests.conftest import small_decoder


def gaussian_instances(count: int, seed: int, patches: int = 4) -> HeldOut:
    """Latents of a Gaussian, patches' residuals whose logarithms are, and looks that are."""
    draw = np.random.default_rng(seed)
    mixing = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.3, 1.5]])
    latents = draw.standard_normal((count, 3)) @ mixing.T + [1.0, -2.0, 0.5]
    residuals = 0.01 * np.exp(0.5 * draw.standard_normal((count, patches)))
    return HeldOut(
        latents, residuals, draw.standard_normal((count, len(KINDS) + 1)), [str(each) for each in range(count)]
    )


def fitted(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return fit_arrays({"weights": np.ones(len(SCORES))}, gaussian_instances(count, seed), 0.05)[0]


def p_values(arrays: dict[str, np.ndarray], some: HeldOut) -> np.ndarray:
    surprises = surprise.surprises_of(arrays, some.scores(arrays))
    return surprise.p_values_of(arrays, surprise.alarms_of(arrays, surprises))


def test_latent_score_is_the_density_of_a_gaussian() -> None:
    """−2 log of the density, but for a constant, by SciPy and the covariance that latents were drawn with."""
    arrays = fitted(8000)
    some = gaussian_instances(200, 1)
    mixing = np.array([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.3, 1.5]])
    density = stats.multivariate_normal([1.0, -2.0, 0.5], mixing @ mixing.T)
    distances = -2 * (density.logpdf(some.latents) - density.logpdf(density.mean))
    found = np.exp(some.scores(arrays)[:, list(SCORES).index("latent")])
    np.testing.assert_allclose(found, distances, rtol=0.1, atol=0.05)


def test_surprise_is_counted_in_the_body_and_exponential_in_the_tail() -> None:
    draw = np.random.default_rng(0)
    arrays = fitted(2000)
    columns = np.repeat(draw.exponential(size=(4000, 1)), len(SCORES), axis=1)
    arrays |= {"ranks": np.sort(columns, axis=0).T, "tail_start": np.quantile(columns, 0.8, axis=0)}
    arrays |= {"tail_scale": np.full(len(SCORES), 1.0)}
    asked = np.linspace(0.1, 12, 30)
    found = surprise.surprises_of(arrays, np.repeat(asked[:, None], len(SCORES), axis=1))
    np.testing.assert_allclose(found[:, 0], asked, rtol=0.1, atol=0.05)  # −log of the share beyond x is x itself


def test_alarms_of_equal_weights_order_as_fishers_p_values() -> None:
    """SciPy's combination of all p-values; the reason is what adds most."""
    surprises = np.random.default_rng(0).exponential(2, (50, len(SCORES)))
    arrays = {"weights": np.ones(len(SCORES))}
    expected = [stats.combine_pvalues(np.exp(-row)).statistic / 2 for row in surprises]
    np.testing.assert_allclose(surprise.alarms_of(arrays, surprises), expected)
    looks = np.eye(len(KINDS) + 1)[np.arange(50) % len(KINDS)]
    arrays["weights"][1] = 0.1
    for row, reason in enumerate(surprise.reasons_of(arrays, surprises, looks)):
        most = list(SCORES)[(surprises[row] * arrays["weights"]).argmax()]
        assert reason == (list(KINDS)[row % len(KINDS)] if most == "damage" else most)


def test_false_alarms_of_fresh_instances_are_those_of_the_beta_distribution() -> None:
    """Split conformal: over calibration sets of m, the rate of false alarms at level a is Beta(k, m + 1 − k)."""
    rates = []
    for seed in range(40):
        arrays = fitted(160, seed)
        rates.append((p_values(arrays, gaussian_instances(2000, 1000 + seed)) <= 0.05).mean())
    m = len(arrays["alarms"])
    k = int(0.05 * (m + 1))
    expected = stats.beta(k, m + 1 - k)
    assert abs(np.mean(rates) - expected.mean()) < 4 * expected.std() / np.sqrt(len(rates))
    assert stats.kstest(rates, expected.cdf).pvalue > 1e-3
    assert expected.mean() <= 0.05


def test_verdicts_follow_the_rank_of_the_threshold() -> None:
    """The threshold at rate a is the alarm of rank ⌈(m + 1)(1 − a)⌉."""
    alarms = np.sort(np.random.default_rng(0).standard_normal(199))
    rank = int(np.ceil(200 * 0.95))
    asked = np.array([alarms[rank - 1] + 1e-9, alarms[rank - 1] - 1e-9, alarms[-1] + 1])
    found = surprise.p_values_of({"alarms": alarms}, asked)
    np.testing.assert_allclose(found, [10 / 200, 11 / 200, 1 / 200])
    assert surprise.verdicts_of({"alarms": alarms}, found, 0.05).tolist() == [1, 0, 2]


def test_groups_are_not_divided_and_too_few_instances_are_refused() -> None:
    some = gaussian_instances(102, 0)
    groups = [str(number // 2) for number in range(102)]
    _, calibrating = fit_arrays({"weights": np.ones(len(SCORES))}, replace(some, groups=groups), 0.05)
    assert len(calibrating) == len({groups[row] for row in calibrating}) == 34  # two thirds of 51, one of each group
    with pytest.raises(UserError, match="1 groups among 102 held-out instances"):
        fit_arrays({"weights": np.ones(len(SCORES))}, replace(some, groups=["one"] * 102), 0.05)
    check_enough(30, 0.05)
    with pytest.raises(UserError, match=r"29 held-out instances: a false-alarm rate of 0.05 needs 30 at least"):
        check_enough(29, 0.05)


@pytest.mark.parametrize("shape", [(12, 9, 3), (6, 40, 1), (9, 8, 10, 1)])
def test_boxes_are_those_of_loops(shape: tuple[int, ...]) -> None:
    """Means of squared differences in patches and layers; of a moved copy, those of maps that are moved by hand."""
    values = np.random.default_rng(0).standard_normal((2, *shape))
    grid, patches = shape[:-1], patches_of(shape[:-1])
    axes = range(1, len(grid) + 1)
    padded = np.pad(values, [(0, 0), *[(1, 1)] * len(grid), (0, 0)], mode="edge")
    inner = (slice(None), *[slice(1, -1)] * len(grid))
    maps = [np.square(np.roll(padded, -1, axis)[inner] - values).mean(axis=-1) for axis in axes]
    bend = sum(np.roll(padded, 1, axis)[inner] + np.roll(padded, -1, axis)[inner] - 2 * values for axis in axes)
    maps.append(np.square(bend).mean(axis=-1))
    found = surprise.boxes_of(values, patches)
    assert found.shape == (2, 1 + 2 * len(grid), surprise.count_boxes(grid, patches))
    owners = [np.arange(pixels) * count // pixels for pixels, count in zip(grid, patches, strict=True)]
    layers = [np.arange(pixels) * min(32, pixels) // pixels for pixels in grid]
    for number, (axis, step) in enumerate([(1, 0), *((axis, step) for axis in axes for step in (2, -2))]):
        moved = []
        for one in maps:
            places = np.arange(one.shape[axis]) + step  # a step of 2 brings what is two pixels further
            kept = np.take(one, np.clip(places, 0, one.shape[axis] - 1), axis)
            kept = np.moveaxis(kept, axis, -1) * ((places >= 0) & (places < one.shape[axis]))
            moved.append(np.moveaxis(kept, -1, axis))
        inside = [
            np.ix_([0, 1], *[np.flatnonzero(owner == at) for owner, at in zip(owners, place, strict=True)])
            for place in np.ndindex(*patches)
        ]
        expected = [one[box] for one in moved for box in inside]
        expected += [
            np.compress(layers[across - 1] == layer, one, axis=across)
            for across in axes
            for one in moved[:-1]
            for layer in range(layers[across - 1][-1] + 1)
        ]
        by_hand = np.stack([box.reshape(2, -1).mean(axis=1) for box in expected], axis=1)
        np.testing.assert_allclose(found[:, number], by_hand, rtol=2e-4, atol=1e-6, err_msg=f"{axis} {step}")


@pytest.mark.parametrize("shape", [(17, 3), (12, 19, 3), (48, 64, 1), (9, 8, 10, 1)])
def test_the_network_is_that_of_pytorch(shape: tuple[int, ...]) -> None:
    """Convolutions, normalization and layers in NumPy, on axes of odd lengths and at all strides."""
    network = _Network(shape[:-1], shape[-1]).eval()
    draw = torch.Generator().manual_seed(0)
    for normalization in network.normalizations:
        for values in (normalization.weight.data, normalization.bias.data, normalization.running_mean):
            values.normal_(generator=draw)
        normalization.running_var.uniform_(0.5, 2, generator=draw)
    values = torch.randn(3, *shape, generator=draw)
    arrays = network.arrays()
    assert {name: array.shape for name, array in arrays.items()} == surprise.network_shapes(shape[:-1], shape[-1])
    with torch.no_grad():
        odds = network(torch.from_numpy(surprise.with_places(values.numpy()))).log_softmax(dim=1).exp()
    sound, *kinds = odds.split([1, *surprise.variants_of(len(shape) - 1).values()], dim=1)
    expected = torch.cat([(kind.sum(dim=1, keepdim=True) / sound).log() for kind in kinds], dim=1)
    found = surprise.log_odds_of(arrays, values.numpy())
    np.testing.assert_allclose(found, expected, atol=0.02 * float(expected.std()) + 0.02)  # half precision


def discs(count: int, seed: int) -> np.ndarray:
    """Pictures [count, 16, 16, 3] in [-1, 1] of a disc near the middle of a ground, with stripes."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:16, 0:16]
    images = []
    for _ in range(count):
        ground, colour = draw.uniform(-1, 1, (2, 3))
        radius = draw.uniform(4, 6)
        disc = ((rows - 7.5) ** 2 + (columns - 7.5) ** 2 < radius**2)[..., None]
        images.append(np.where(disc, colour * (1 - 0.3 * (rows % 4 == 0)[..., None]), ground))
    return np.stack(images).astype(np.float32)


@pytest.fixture(scope="module")
def looks() -> dict[str, np.ndarray]:
    rows = ArrayDataset(images=torch.from_numpy(((discs(300, 0) + 1) * 127.5).astype(np.uint8)))
    trained = TrainingInstances(rows, [str(each) for each in range(300)])
    return fit_looks(signal_of_model(small_decoder()), trained, [4, 4])


def spoilt_discs() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Discs, and damage of other makes than what is learned from."""
    fresh, draw = discs(60, 1), np.random.default_rng(2)
    hidden = fresh.copy()
    hidden[:, 2:10, 6:14] = draw.uniform(-1, 1, (60, 1, 1, 3))
    halved = fresh.copy()
    halved[:, :, 8:] = fresh[::-1, :, 8:]
    return fresh, {
        "noise": fresh + 0.1 * draw.standard_normal(fresh.shape).astype(np.float32),
        "blur": (np.roll(fresh, 1, 1) + fresh + np.roll(fresh, -1, 1)) / 3,
        "occlusion": hidden,
        "shift": np.roll(fresh, 2, axis=2),
        "foreign": halved,
    }


def test_looks_tell_each_damage_by_its_name(looks: dict[str, np.ndarray]) -> None:
    fresh, spoilt = spoilt_discs()
    sound = np.logaddexp.reduce(surprise.look_of(looks, fresh, [4, 4])[:, :-1], axis=1)
    for kind, values in spoilt.items():
        found = surprise.look_of(looks, values, [4, 4])[:, :-1]
        higher = np.logaddexp.reduce(found, axis=1)[:, None] > sound
        assert higher.mean() > 0.95, kind
        named = [list(KINDS)[each] for each in found.argmax(axis=1)]
        assert np.mean([name == kind or {name, kind} == {"occlusion", "foreign"} for name in named]) > 0.6, kind


def test_a_network_learns_to_tell_damage() -> None:
    """In few steps, from few pictures; it is the same again, and PyTorch's draws go on as if it had not been."""
    pictures, state = discs(240, 0), torch.get_rng_state()
    network, again = (learn_damage(pictures, np.full(240, 1 / 240), steps=steps) for steps in (80, 80))
    assert torch.equal(torch.get_rng_state(), state)
    assert all((network[name] == array).all() for name, array in again.items())
    fresh, spoilt = spoilt_discs()
    sound = np.logaddexp.reduce(surprise.log_odds_of(network, fresh), axis=1)
    for kind in ("blur", "foreign", "shift"):
        found = np.logaddexp.reduce(surprise.log_odds_of(network, spoilt[kind]), axis=1)
        assert (found[:, None] > sound).mean() > 0.85, kind


def test_layout_is_the_density_of_a_gaussian(looks: dict[str, np.ndarray]) -> None:
    """−2 log of the density of the logarithms, but for a constant, by SciPy and the profile's own covariance."""
    boxes = surprise.boxes_of(discs(5, 3), [4, 4])
    whitening = looks["log_whitening"].astype(np.float64)
    density = stats.multivariate_normal(looks["log_mean"], np.linalg.inv(whitening @ whitening), allow_singular=True)
    expected = -2 * (density.logpdf(surprise.log_features(boxes[:, 0])) - density.logpdf(density.mean))
    found = np.exp(surprise.numbers_of(looks, boxes, [4, 4])[:, list(NUMBERS).index("layout")])
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_kinds_are_those_of_bayes() -> None:
    """Looks of Gaussians that differ in means and spreads: log-odds are those of densities and priors."""
    draw = np.random.default_rng(0)
    means, spreads = (
        draw.normal(0, 0.8, (len(KINDS), len(NUMBERS))),
        draw.uniform(0.8, 1.3, (len(KINDS), len(NUMBERS))),
    )
    pairs = [(np.zeros(len(NUMBERS)), np.ones(len(NUMBERS))), *zip(means, spreads, strict=True)]
    densities = [stats.multivariate_normal(mean, np.diag(spread**2)) for mean, spread in pairs]
    rows = [density.rvs(2000, random_state=number) for number, density in enumerate(densities)]
    arrays = calibration._fit_kinds(dict(zip(("sound", *KINDS), rows, strict=True)))
    fresh = np.concatenate([density.rvs(100, random_state=99) for density in densities])
    ratios = np.stack([each.logpdf(fresh) - densities[0].logpdf(fresh) for each in densities[1:]], axis=1)
    expected = ratios + np.log([calibration._PRIORS[kind] / len(KINDS) for kind in KINDS])
    found = surprise.log_odds_by(arrays, fresh)
    assert np.abs(found - expected).mean() < 0.1 * expected.std()
    assert np.abs((found - expected).mean(axis=0)).max() < 0.4  # a prior of two moves them by 0.7


def test_squares_of_numbers_tell_what_is_unusual_to_either_side() -> None:
    arrays = {"number_mean": np.full(len(NUMBERS), 2.0), "number_std": np.full(len(NUMBERS), 0.5)}
    found = surprise.kind_features(arrays, np.array([[1.0] * len(NUMBERS), [9.0] * len(NUMBERS)]))
    np.testing.assert_array_equal(
        found, [[-2.0] * len(NUMBERS) + [4.0] * len(NUMBERS), [14.0] * len(NUMBERS) + [25.0] * len(NUMBERS)]
    )


@pytest.mark.parametrize("shape", [(8, 6, 3), (7, 8, 5, 1)])
def test_foreign_ones_are_parts_or_of_several(shape: tuple[int, ...]) -> None:
    """One half is another's, or each corner holds every second pixel of one; or one is cut, shuffled or turned."""
    pixels = np.arange(np.prod(shape)).reshape(shape) / 1000
    values = np.arange(40.0).reshape(40, *[1] * len(shape)) + pixels  # an instance is its number, a pixel the rest
    second = pixels[tuple([slice(None, None, 2)] * (len(shape) - 1))]
    corners = []
    for place in np.ndindex(*[2] * (len(shape) - 1)):
        sides = zip(place, second.shape[:-1], strict=True)
        corners.append(tuple(slice(at * half, (at + 1) * half) for at, half in sides))
    spoilt, ways = _foreign(values, np.random.default_rng(0))
    assert set(ways) == set(range(7))
    for number, (one, way) in enumerate(zip(spoilt, ways, strict=True)):
        whose = np.floor(one)
        if way == 0:
            np.testing.assert_allclose(one % 1, pixels)
            assert (whose == number).mean() >= 0.4
            assert len(set(whose.ravel().tolist())) <= 2
        elif way == 1:
            for corner in corners:
                assert len(np.unique(whose[corner])) == 1
                kept = second[tuple(slice(count) for count in one[corner].shape[:-1])]
                np.testing.assert_allclose(one[corner] % 1, kept)
        elif way != 4:  # of one alone: enlarged, reduced, in another order or turned
            assert (whose == number).all()
        if way in (5, 6):
            np.testing.assert_array_equal(np.sort(one, axis=None), np.sort(values[number], axis=None))


def test_damage_is_what_it_is_called() -> None:
    values = discs(40, 0).reshape(20, 2, 16, 16, 3)  # of two views each
    spoilt = damaged(values, 2)
    assert list(spoilt) == list(KINDS)
    assert all(some.shape == values.shape and some.dtype == values.dtype for some in spoilt.values())
    noise = (spoilt["noise"] - values).std(axis=(2, 3, 4))
    assert 0.025 < noise.min() < noise.max() < 0.22
    assert (np.diff(spoilt["blur"], axis=2).std() < np.diff(values, axis=2).std()).all()
    changed = (spoilt["occlusion"] != values).any(axis=-1)
    for picture, where in zip(spoilt["occlusion"].reshape(-1, 16, 16, 3), changed.reshape(-1, 16, 16), strict=True):
        assert len(np.unique(picture[where], axis=0)) <= 1  # one flat colour
    moves = [np.roll(values, step, axis) for axis in (2, 3) for step in (-3, -2, -1, 1, 2, 3)]
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))
    moved = [(spoilt["shift"][inner] == move[inner]).all(axis=(2, 3, 4)) for move in moves]
    assert np.any(moved, axis=0).all()
    assert (damaged(values, 2)["noise"] == spoilt["noise"]).all()
    assert (damaged(values, 2, seed=1)["noise"] != spoilt["noise"]).any()


def test_classes_are_those_of_what_was_done() -> None:
    values = discs(64, 0)
    spoilt, classes = some_damaged(values, np.random.default_rng(0))
    counts = [1, *surprise.variants_of(2).values()]
    kinds = np.repeat(np.arange(len(counts)), counts)[classes]
    assert np.bincount(kinds).tolist() == [2 * share for share in SHARES.values()]
    assert ((spoilt == values).all(axis=(1, 2, 3)) == (kinds == 0))[:20].all()
    assert classes.max() < sum(counts)


@pytest.mark.parametrize("shape", [(2, 12, 3), (2, 8, 12, 3), (2, 9, 8, 10, 1), (2, 3, 8, 8, 3)])
def test_residuals_in_patches_are_those_of_loops(shape: tuple[int, ...]) -> None:
    values, predictions = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).double()
    views = shape[1] == 3
    grid = shape[2:-1] if views else shape[1:-1]
    patches = patches_of(grid)
    found = residuals_in_patches(values, predictions, patches)
    means = np.square((predictions - values).numpy()).mean(axis=-1)
    means = means.mean(axis=1) if views else means
    owners = [np.arange(pixels) * count // pixels for pixels, count in zip(grid, patches, strict=True)]
    for number, place in enumerate(np.ndindex(*patches)):
        chosen = np.ix_(*[np.flatnonzero(owner == at) for owner, at in zip(owners, place, strict=True)])
        np.testing.assert_allclose(found[:, number], [one[chosen].mean() for one in means])


def test_a_robust_search_forgives_rubbish(decoder: MNIFModel) -> None:
    """A quarter of the pixels are rubbish: the latent that drew the others is found again, by squares it is not."""
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=torch.Generator().manual_seed(len(parameter)))
    signal = signal_of_model(decoder)
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(4, 12, generator=generator)
    with torch.no_grad():
        clean = decoder(truth)
    rubbish = torch.rand(clean.shape, generator=generator) * 4 - 2
    replaced = torch.rand(clean.shape[:-1], generator=generator)[..., None] < 0.25
    observation = signal.on_grid(torch.where(replaced, rubbish, clean))
    start = truth + 0.3 * torch.randn(truth.shape, generator=generator)
    loss = RobustLoss(1e-4, torch.zeros(12), torch.eye(12))
    errors = {}
    for name, kind in {"squares": None, "robust": loss}.items():
        found = optimize_latents(decoder, signal, observation, start, 80, loss=kind)
        with torch.no_grad():
            errors[name] = (decoder(found) - clean).square().mean().item()
    assert errors["robust"] < errors["squares"] / 10


SMALL = ["--resolution", "16", "--num_bases", "12", "--width", "12", "--depth", "1", "--latent_dim", "16"]
TRAINING = ["--train_batch_size", "24", "--encoder_width", "48", "--compile", "off", "--cells", "2"]


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 pictures of a disc on a ground, and beside them the last 16 with a quarter hidden."""
    folder = tmp_path_factory.mktemp("drawings")
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:16]
    images = []
    for _ in range(160):
        ground, colour = draw.integers(0, 256, (2, 3))
        centre, radius = draw.uniform(5, 11, 2), draw.uniform(3, 5)
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2
        images.append(np.where(disc[..., None], colour, ground).astype(np.uint8))
    np.savez(folder / "sound.npz", images=images, ids=[f"disc {number:03d}" for number in range(160)])
    hidden = np.stack(images[-16:])
    hidden[:, 8:, 8:] = draw.integers(0, 256, (16, 8, 8, 3))
    np.savez(folder / "hidden.npz", images=hidden, ids=[f"hidden {number:02d}" for number in range(16)])
    return folder


@pytest.fixture(scope="module")
def run(drawings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "discs"
    fit = ["fit", "--data", str(drawings / "sound.npz"), "--output_dir", str(output), *SMALL, *TRAINING]
    fit += ["--held_out_fraction", "0.4", "--test_fraction", "0.2", "--refinement_steps", "4"]
    assert main([*fit, "--max_train_steps", "150"]) == 0
    return output


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
    return line


def test_fit_leaves_a_profile_and_the_gate_judges_by_it(
    run: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = load_profile(run, load_component(MNIFModel, run, "decoder"))
    assert profile.record.patches == [4, 4]
    assert profile.record.gap_steps == 4
    encode = ["encode", "--model", str(run), "--gate", "--refinement_steps", "4"]
    encode += ["--held_out_fraction", "0.4", "--test_fraction", "0.2"]
    hidden, sound = tmp_path / "hidden", tmp_path / "sound"
    assert main([*encode, "--data", str(drawings / "hidden.npz"), "--output_dir", str(hidden)]) == 0
    assert "gate: 0 in, " in capsys.readouterr().out
    gates = {"hidden": json.loads((hidden / "metrics.json").read_text())["gate"]}
    assert main([*encode, "--data", f"{drawings / 'sound.npz'}", "--split", "test", "--output_dir", str(sound)]) == 0
    gates["sound"] = json.loads((sound / "metrics.json").read_text())["gate"]
    assert gates["hidden"]["counts"]["in"] == 0
    assert gates["sound"]["counts"]["in"] >= 0.75 * sum(gates["sound"]["counts"].values())
    patches = [tuple(patch) for one in gates["hidden"]["instances"].values() for patch in one["patches"]]
    assert patches
    assert np.mean([row >= 2 and column >= 2 for row, column in patches]) > 0.8  # the quarter that was hidden
    one = gates["hidden"]["instances"]["hidden 00"]
    assert set(one["scores"]) == set(SCORES)
    assert 0 < one["gap_p_value"] <= 1


def test_a_profile_goes_with_its_decoder(
    run: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    encode = ["encode", "--model", str(model), "--data", str(drawings / "hidden.npz"), "--preset", "fast", "--gate"]
    encode += ["--output_dir", f"{tmp_path}/out"]
    decoder = load_component(MNIFModel, model, "decoder")
    half = decoder.half()
    assert half.fingerprint() in load_profile(model, decoder).record.fingerprints
    assert load_profile(model, half).arrays["alarms"].size >= 19
    before = sha256_of_model(model)
    arrays = model / "profile/arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-40])
    assert "damaged profile" in error_of(encode, capsys)
    shutil.rmtree(model / "profile")
    assert sha256_of_model(model) == before  # latents do not depend on it
    assert "no profile; `mnif monitor --fit --model" in error_of(encode, capsys)
    other = load_component(MNIFModel, run, "decoder")
    with torch.no_grad():
        other.bases[0].add_(0.1)
    with pytest.raises(UserError, match="the profile of another decoder"):
        load_profile(run, other)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--gate", "--mirror"],
            "--gate: the profile is of whole instances as the data have them; leave out --mirror",
        ),
        (["--gate", "--views", "1"], "leave out --views"),
        (["--false_alarm_rate", "0.1"], "--false_alarm_rate 0.1: needs --gate"),
        (["--gate", "--false_alarm_rate", "0.001"], "held-out instances allow 0.0"),
        (["--gate", "--false_alarm_rate", "0"], "--false_alarm_rate 0: the profile's"),
        (["--robust", "--preset", "fast"], "--robust: refines latents"),
    ],
)
def test_gates_that_mean_nothing_are_refused(
    flags: list[str], message: str, run: Path, drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode = ["encode", "--model", str(run), "--data", str(drawings / "hidden.npz"), "--output_dir", f"{tmp_path}/out"]
    assert message in error_of([*encode, *flags], capsys)
    assert not (tmp_path / "out").exists()


def test_a_robust_encode_keeps_more_of_what_was_there(run: Path, drawings: Path, tmp_path: Path) -> None:
    for name, flags in {"plain": [], "robust": ["--robust"]}.items():
        encode = ["encode", "--model", str(run), "--data", str(drawings / "hidden.npz"), "--refinement_steps", "5"]
        assert main([*encode, "--output_dir", f"{tmp_path}/{name}", *flags]) == 0
    plain, robust = ((tmp_path / name / "latents.safetensors").read_bytes() for name in ("plain", "robust"))
    assert plain != robust
