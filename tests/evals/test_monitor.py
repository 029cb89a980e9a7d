"""`mnif monitor`: its tests against hand calculations, its advice, its exit codes and its page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evals.drift import advice, alarms_p_value, holm
from mnif.cli import main
from mnif.latents.calibration import one_of_each
from mnif.latents.profile import Profile, load_profile
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel


def test_holm_is_that_of_a_hand_calculation() -> None:
    """Four tests: 0.005 · 4, then the largest so far of 0.01 · 3, 0.03 · 2 and 0.04 · 1."""
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, 0.03, 0.005])), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.9, 0.8])), [1, 1])


def test_the_number_of_alarms_is_beta_binomial() -> None:
    """Both samples are drawn anew, and one minus the threshold's rank decides: as often as the p-value says."""
    draw, m, count, rate = np.random.default_rng(0), 99, 40, 0.1
    found = []
    for _ in range(4000):
        threshold = np.sort(draw.random(m))[m - int(rate * (m + 1))]
        found.append((draw.random(count) >= threshold).sum())
    profile = Profile(None, {"alarms": np.arange(m)})  # type: ignore[arg-type]
    for alarms in (3, 6, 9):
        p_values = np.where(np.arange(count) < alarms, 0.01, 0.9)
        expected = (np.array(found) >= alarms).mean()
        assert alarms_p_value(profile, p_values, rate) == pytest.approx(expected, abs=0.03)
    assert alarms_p_value(profile, np.full(40, 0.9), rate) == 1
    assert stats.binom(count, rate).sf(8) < alarms_p_value(profile, np.where(np.arange(count) < 9, 0.0, 1.0), rate)


def test_advice_follows_its_rule() -> None:
    assert advice(False, 1.0, 0.05) == "keep"
    assert [advice(True, share, 0.05) for share in (0.0, 0.1, 0.11, 0.5, 0.51)] == [
        "refine",
        "refine",
        "grow",
        "grow",
        "refit",
    ]
    assert one_of_each(["a", "b", "a", "c", "b"]).tolist() == [0, 1, 3]


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 16×16 pictures of discs, and such pictures as they were, blurred by half, and noise."""
    folder = tmp_path_factory.mktemp("discs")
    draw = np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:16]
    images = np.empty((300, 16, 16, 3), np.uint8)
    for image in images:
        ground, colour = draw.integers(0, 256, (2, 3))
        centre, radius = draw.uniform(5, 11, 2), draw.uniform(3, 5)
        image[:] = np.where(
            ((rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 < radius**2)[..., None], colour, ground
        )
    np.savez(folder / "known.npz", images=images[:220], ids=[f"disc {number:03d}" for number in range(220)])
    np.savez(folder / "more.npz", images=images[220:], ids=[f"more {number:03d}" for number in range(80)])
    np.savez(folder / "noise.npz", images=draw.integers(0, 256, (40, 16, 16, 3)).astype(np.uint8))
    np.savez(folder / "few.npz", images=images[:4])
    fit = ["fit", "--data", str(folder / "known.npz"), "--output_dir", str(folder / "run"), "--resolution", "16"]
    fit += ["--num_bases", "12", "--width", "12", "--depth", "1", "--latent_dim", "16", "--train_batch_size", "24"]
    fit += ["--encoder_width", "48", "--compile", "off", "--cells", "2", "--held_out_fraction", "0.5"]
    assert main([*fit, "--max_train_steps", "80", "--refinement_steps", "0"]) == 0
    return folder


def test_data_of_the_kind_are_kept_and_noise_is_not(
    discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monitor = ["monitor", "--model", str(discs / "run"), "--refinement_steps", "5"]
    assert main([*monitor, "--data", str(discs / "more.npz"), "--output_dir", f"{tmp_path}/more"]) == 0
    assert main([*monitor, "--data", str(discs / "noise.npz"), "--output_dir", f"{tmp_path}/noise"]) == 1
    assert "refit: most of them the bases cannot draw" in capsys.readouterr().out
    kept, refit = (json.loads((tmp_path / name / "monitor.json").read_text()) for name in ("more", "noise"))
    assert (kept["advice"], refit["advice"]) == ("keep", "refit")
    assert kept["gate"]["counts"]["in"] >= 68  # of 80
    assert refit["gate"]["counts"]["in"] == 0
    assert refit["tests"]["scores"]["significant"] >= 3
    assert refit["tests"]["coefficients"]["all"] == 12
    page = (tmp_path / "noise/monitor.html").read_text()
    assert page.count("<svg") == 5
    assert page.count("data:image/webp") == 24
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_an_older_model_gets_the_profile_that_fit_makes(discs: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(discs / "run/model", model)
    before = load_profile(model, load_component(MNIFModel, model, "decoder"))
    shutil.rmtree(model / "profile")
    fit = ["monitor", "--fit", "--model", str(model), "--data", str(discs / "known.npz")]
    assert main([*fit, "--held_out_fraction", "0.5", "--refinement_steps", "0"]) == 0
    again = load_profile(model, load_component(MNIFModel, model, "decoder"))
    assert again.record == before.record
    for name, array in before.arrays.items():
        np.testing.assert_array_equal(again.arrays[name], array, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --output_dir, or --fit"),
        (["--fit", "--output_dir", "OUT"], "leave out --output_dir"),
        (["--fit", "--model", "avatars"], "--fit: "),
        (["--fit", "--split", "test"], "--split test: a profile is of held-out instances"),
        (["--fit", "--held_out_fraction", "0.05"], "a false-alarm rate of 0.05 needs 30 at least"),
        (["--output_dir", "OUT", "--significance", "2"], "--significance 2: must lie between 0 and 1"),
        (["--output_dir", "OUT", "--data", "FEW"], "4 pictures; 8 are needed at least"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, discs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"OUT": f"{tmp_path}/out", "FEW": str(discs / "few.npz")}
    flags = [places.get(flag, flag) for flag in flags]
    model = [] if "--model" in flags else ["--model", str(discs / "run")]
    data = [] if "--data" in flags else ["--data", str(discs / "known.npz")]
    capsys.readouterr()
    assert main(["monitor", *model, *data, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()
