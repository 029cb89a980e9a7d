"""`mnif monitor`: its tests against hand calculations, its advice, its exit codes and its page."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from evals.drift import advice, alarms_p_value, holm
from mnif.cli import main
from mnif.latents.calibration import one_of_each
from mnif.latents.profile import Profile, load_profile
from mnif.latents.surprise import KINDS
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.volume_rendering import turntable_poses
from tests.browser.chromium import asked_of_page, needs_browser


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


@pytest.fixture(scope="module")
def watched(discs: Path) -> Path:
    """What `mnif monitor` says of more discs, and of noise."""
    monitor = ["monitor", "--model", str(discs / "run"), "--refinement_steps", "5"]
    for name, code in {"more": 0, "noise": 1}.items():
        assert main([*monitor, "--data", f"{discs / name}.npz", "--output_dir", f"{discs / name}"]) == code
    return discs


def test_data_of_the_kind_are_kept_and_noise_is_not(watched: Path) -> None:
    kept, refit = (json.loads((watched / name / "monitor.json").read_text()) for name in ("more", "noise"))
    assert (kept["advice"], refit["advice"]) == ("keep", "refit")
    assert kept["gate"]["counts"]["in"] >= 68  # of 80
    assert refit["gate"]["counts"]["in"] == 0
    assert refit["tests"]["scores"]["significant"] >= 3
    assert refit["tests"]["coefficients"]["all"] == 12
    page = (watched / "noise/monitor.html").read_text()
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


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_fits_a_phone(watched: Path, scheme: str) -> None:
    page = watched / "noise/monitor.html"
    assert page.stat().st_size < 1e6
    found = asked_of_page(
        page.resolve().as_uri(),
        """
        await page.click("#theme");
        const toggled = await page.evaluate(() => getComputedStyle(document.body).backgroundColor);
        await page.click("#theme");
        return page.evaluate(toggled => ({ toggled, width: document.documentElement.scrollWidth,
          charts: document.querySelectorAll(".chart svg").length, words: document.body.innerText,
          pictures: [...document.images].filter(image => image.naturalWidth > 0).length,
          lost: [...document.querySelectorAll("nav a")].filter(a => !document.querySelector(a.getAttribute("href"))),
          ground: getComputedStyle(document.body).backgroundColor }), toggled);
        """,
        viewport={"width": 360, "height": 800},
        colorScheme=scheme,
    )
    assert (found["width"], found["charts"], found["pictures"], found["lost"]) == (360, 5, 24, [])
    grounds = ["rgb(247, 248, 250)", "rgb(20, 22, 26)"]
    assert [found["ground"], found["toggled"]] == (grounds if scheme == "light" else grounds[::-1])
    assert KINDS["noise"] in found["words"]


@pytest.fixture(scope="module")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 84 balls in three views each, of which half are held out, and such balls under noise."""
    folder = tmp_path_factory.mktemp("balls")
    draw = np.random.default_rng(0)
    poses = turntable_poses(3, 2.5, 20.0).double().numpy()
    slope = (np.arange(12) + 0.5 - 6) / 6 * np.tan(0.45)
    in_camera = np.stack([*np.meshgrid(slope, -slope), -np.ones((12, 12))], axis=-1)
    for number in range(94):
        home = folder / ("known" if number < 84 else "noise") / f"{number:02d}"
        home.mkdir(parents=True)
        colour, centre, radius = draw.integers(0, 200, 3), draw.uniform(-0.2, 0.2, 3), draw.uniform(0.4, 0.6)
        frames = []
        for view, pose in enumerate(poses):
            rays = in_camera @ pose[:3, :3].T
            along = rays @ (centre - pose[:3, 3]) / np.square(rays).sum(axis=-1)
            near = np.linalg.norm(pose[:3, 3] + along[..., None] * rays - centre, axis=-1) < radius
            pixels = np.where(near[..., None], colour, 255.0)
            pixels += 50 * draw.standard_normal(pixels.shape) * (number >= 84)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(home / f"{view}.png")
            frames.append({"file_path": f"{view}.png", "transform_matrix": pose.tolist()})
        (home / "transforms.json").write_text(json.dumps({"camera_angle_x": 0.9, "frames": frames}))
    fit = ["fit", "--data", str(folder / "known"), "--output_dir", str(folder / "run"), "--compile", "off"]
    fit += ["--held_out_fraction", "0.5", "--held_out_views", "0", "--train_batch_size", "12", "--rays_per_step", "32"]
    fit += ["--cells", "1", "--num_bases", "4", "--width", "8", "--depth", "1", "--latent_dim", "8"]
    fit += ["--test_fraction", "0", "--samples_per_ray", "8", "--max_train_steps", "20", "--refinement_steps", "2"]
    assert main(fit) == 0
    return folder


def test_views_are_judged_and_watched(balls: Path, tmp_path: Path) -> None:
    """Scores are means over views: the noise on all of them is found and named, and the advice is not to keep."""
    encode = ["encode", "--model", str(balls / "run"), "--data", str(balls / "noise"), "--gate"]
    assert main([*encode, "--refinement_steps", "2", "--output_dir", f"{tmp_path}/noise"]) == 0
    gate = json.loads((tmp_path / "noise/metrics.json").read_text())["gate"]
    assert gate["counts"]["in"] == 0
    assert [one["reason"] for one in gate["instances"].values()].count("noise") >= 8  # of ten
    monitor = ["monitor", "--model", str(balls / "run"), "--refinement_steps", "2", "--data"]
    held_out = ["--split", "held_out", "--held_out_fraction", "0.5", "--test_fraction", "0"]
    assert main([*monitor, str(balls / "known"), *held_out, "--output_dir", f"{tmp_path}/a"]) in (0, 1)
    assert main([*monitor, str(balls / "noise"), "--output_dir", f"{tmp_path}/b"]) == 1
    known, noise = (json.loads((tmp_path / name / "monitor.json").read_text()) for name in "ab")
    assert known["gate"]["counts"]["in"] >= 0.8 * known["instances"]
    assert noise["gate"]["counts"]["in"] == 0
    assert "data:image/webp" in (tmp_path / "b/monitor.html").read_text()
