"""The presets: the paper's five start on miniatures in their benchmarks' own layouts, and what a preset may say."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnif.cli import main
from mnif.commands.fit import parse_fit_arguments
from mnif.models.mnif_model import MNIFModel
from mnif.training.fit_arguments import PRESETS
from mnif.utils.errors import UserError
from mnif.utils.flag_files import preset_names

ROOT = Path(__file__).parents[2]

PAPER = {
    "celeba-hq-s": {"num_bases": 256, "depth": 4, "width": 64, "latent_dim": 1024, "omega": 30, "field": 17_027},
    "celeba-hq-l": {"num_bases": 384, "depth": 5, "width": 128, "latent_dim": 512, "omega": 30, "field": 83_331},
    "shapenet-s": {"num_bases": 256, "depth": 4, "width": 64, "latent_dim": 512, "omega": 50, "field": 16_961},
    "shapenet-l": {"num_bases": 512, "depth": 5, "width": 128, "latent_dim": 1024, "omega": 30, "field": 83_201},
    "srn-cars-s": {"num_bases": 256, "depth": 4, "width": 64, "latent_dim": 128, "omega": 30, "field": 17_156},
}
"""The paper's table of models (You et al., NeurIPS 2023)."""

LEARNABLE = {"celeba-hq-s": 5.93, "celeba-hq-l": 33.4, "shapenet-s": 5.13, "shapenet-l": 46.3, "srn-cars-s": 4.59}
"""Learnable parameters in millions, of the same table."""

GFLOP = {"celeba-hq-s": 4.13, "celeba-hq-l": 20.5, "shapenet-s": 4.12, "shapenet-l": 20.5, "srn-cars-s": 53.0}
"""For one instance of a step, as `mnif fit --dry_run` counts them."""

COMMON = {"learning_rate": 1e-4, "basis_learning_rate": 1e-4, "matrix_optimizer": "adamw"}
COMMON |= {"lr_scheduler": "cosine", "lr_warmup_steps": 0}
COMMON |= {"mixing": "average", "coefficient_form": "layer", "cells": 1}
META = COMMON | {"method": "meta", "inner_steps": 3, "inner_order": "second", "train_batch_size": 32, "stride": 1}
# The authors' rate of 1 goes with a mean over the 32 instances of a batch; ours with each instance's own error.
META |= {"output_sine": True, "num_train_epochs": 800, "max_grad_norm": 1e9}
RECIPES = {
    "celeba-hq-s": META | {"inner_learning_rate": 267.0, "resolution": [64], "channels": 3},
    "celeba-hq-l": META | {"inner_learning_rate": 400.0, "resolution": [64], "channels": 3},
    "shapenet-s": META | {"inner_learning_rate": 267.0, "resolution": [64], "max_grad_norm": 1.0, "stride": 4},
    "shapenet-l": META
    | {"inner_learning_rate": 533.0, "resolution": [64], "max_grad_norm": 1.0, "stride": 4, "num_train_epochs": 400},
    "srn-cars-s": COMMON
    | {"method": "auto-decoding", "num_train_epochs": 2000, "train_batch_size": 8, "max_grad_norm": 1e9}
    | {"resolution": [128], "near": 0.8, "far": 1.8, "background": "white", "output_sine": False}
    | {"samples_per_ray": 32, "rays_per_step": 32 * 512, "latent_learning_rate": 1e-4},
}


@pytest.fixture(scope="module")
def celeba_hq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG pictures named by number, as CelebA-HQ is handed out; 128×128."""
    folder = tmp_path_factory.mktemp("celeba_hq")
    rows, columns = np.mgrid[0:128, 0:128] / 128
    for index in range(6):
        face = (rows - 0.5) ** 2 + (columns - 0.4 - index / 30) ** 2 < 0.1
        pixels = np.stack([face * 200 + 20, rows * 255, columns * 255], axis=-1)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:05d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def shapenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """IM-NET's HDF5 of all categories, with the lists of names beside it; boxes and balls in 64³ cells."""
    h5py = pytest.importorskip("h5py")
    file = tmp_path_factory.mktemp("shapenet") / "all_vox256_img_train.hdf5"
    generator = np.random.default_rng(0)
    axes = np.mgrid[0:64, 0:64, 0:64]
    centres = generator.uniform(24, 40, (4, 3, 1, 1, 1))
    distances = [np.abs(axes - centre).max(axis=0) for centre in centres[:2]]
    distances += [np.linalg.norm(axes - centre, axis=0) for centre in centres[2:]]
    voxels = np.stack([distance < 16 for distance in distances])
    with h5py.File(file, "w") as content:
        content["voxels"] = voxels[..., None].astype(np.uint8)
        for name, count in (("16", 4096), ("32", 4096), ("64", 16384)):
            points = generator.integers(0, 256, (4, count, 3), dtype=np.uint8)
            inside = [grid[tuple(cells.T // 4)] for grid, cells in zip(voxels, points, strict=True)]
            content[f"points_{name}"] = points
            content[f"values_{name}"] = np.stack(inside)[..., None].astype(np.uint8)
        content.create_dataset("pixels", (4, 24, 137, 137), np.uint8, chunks=(1, 1, 137, 137))  # not written: no room
    names = ["02691156/1a04e3", "02691156/1a32f1", "02828884/1042d7", "02828884/10512d"]
    file.with_suffix(".txt").write_text("\n".join(names) + "\n")
    return file


@pytest.fixture(scope="module")
def srn_cars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cars_train of Scene Representation Networks: 128×128 views from cameras at distance 1.3."""
    folder = tmp_path_factory.mktemp("srn_cars") / "cars_train"
    for index, colour in enumerate(("red", "blue", "green"), start=1):
        car = folder / f"{index:032x}"
        (car / "rgb").mkdir(parents=True)
        (car / "pose").mkdir()
        (car / "intrinsics.txt").write_text("131.250000 64.000000 64.000000 0.000000\n0. 0. 0.\n1.\n128 128\n")
        for view, angle in enumerate((0.3, 2.5)):
            forward = -np.array([np.cos(angle), np.sin(angle), 0.5]) / np.hypot(1, 0.5)
            right = np.cross(forward, [0, 0, 1]) / np.linalg.norm(np.cross(forward, [0, 0, 1]))
            pose = np.eye(4)  # OpenCV's convention: x right, y down, z forward
            pose[:3] = np.stack([right, np.cross(forward, right), forward, -1.3 * forward], axis=1)
            (car / "pose" / f"{view:06d}.txt").write_text(" ".join(map(str, pose.ravel())) + "\n")
            picture = Image.new("RGBA", (128, 128), "white")
            picture.paste(colour, (40, 50, 90 + 5 * index, 80))
            picture.save(car / "rgb" / f"{view:06d}.png")
    return folder


def source_of(preset: str, request: pytest.FixtureRequest) -> str:
    """The miniature of the benchmark a preset is for."""
    return str(request.getfixturevalue(preset.rpartition("-")[0].replace("-", "_")))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PAPER)
def test_the_papers_models_start_on_their_benchmarks(
    preset: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    fit = ["fit", "--preset", preset, "--data", source_of(preset, request), "--output_dir", f"{tmp_path}/run"]
    # Two instances a step and a short search for the held-out latents; the model and its field are the preset's own.
    light = ["--max_train_steps", "2", "--train_batch_size", "2", "--refinement_steps", "1"]
    assert main([*fit, *light, "--held_out_fraction", "0.4"]) == 0
    config = MNIFModel.load_config(tmp_path / "run/model/decoder")
    expected = {name: number for name, number in PAPER[preset].items() if name != "field"}
    assert {name: config[name] for name in expected} == expected
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["field_parameters"] == PAPER[preset]["field"]
    assert metrics["fields_per_instance"] == 1
    assert {"psnr_train", "psnr_heldout"} <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values() if isinstance(value, int | float))
    arguments = json.loads((tmp_path / "run/run.json").read_text())["fit"]["arguments"]
    assert (arguments["max_train_steps"], arguments["num_train_epochs"]) == (2, None)


@pytest.mark.parametrize("preset", PAPER)
def test_presets_say_what_the_papers_recipe_says(preset: str) -> None:
    parsed = parse_fit_arguments(["--preset", preset, "--data", "x", "--output_dir", "y"])
    assert {name: getattr(parsed, name) for name in RECIPES[preset]} == RECIPES[preset]
    network = {name: number for name, number in PAPER[preset].items() if name != "field"}
    assert {name: getattr(parsed, name) for name in network} == network


def estimate(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    """What `mnif fit --dry_run` prints: steps, instances of a step, parameters, GFLOP, GPU hours, MB."""
    capsys.readouterr()
    assert main(["fit", *command, "--dry_run"]) == 0
    patterns = {
        "steps": r"([\d,]+) steps of",
        "batch": r"steps of ([\d,]+)",
        "parameters": r"decoder: ([\d,]+) parameters",
        "field": r"of ([\d,]+) parameters",
        "gflop": r"([\d.e+]+) GFLOP",
        "hours": r"about ([\d.e+-]+) GPU hours",
        "megabytes": r"about ([\d,]+) MB",
    }
    printed = capsys.readouterr().out
    found = {name: re.search(pattern, printed) for name, pattern in patterns.items()}
    return {name: float(match[1].replace(",", "")) for name, match in found.items() if match is not None}


@pytest.mark.parametrize("preset", PAPER)
def test_a_dry_run_names_the_cost_and_writes_nothing(
    preset: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MNIF_CACHE", f"{tmp_path}/cache")
    source = source_of(preset, request)
    printed = estimate(["--preset", preset, "--data", source, "--output_dir", f"{tmp_path}/run"], capsys)
    assert printed["field"] == PAPER[preset]["field"]
    assert printed["parameters"] / 1e6 == pytest.approx(LEARNABLE[preset], rel=2e-3)
    assert printed["hours"] > 0
    assert printed["gflop"] == pytest.approx(GFLOP[preset], rel=0.01)
    # Adam keeps weights, gradients and two moments, four bytes each; activations come on top.
    assert printed["megabytes"] > 16 * LEARNABLE[preset]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("script", "size"), [("celeba_hq", "l"), ("shapenet", "s"), ("srn_cars", "s")])
def test_the_script_of_a_benchmark_begins_with_its_preset(
    script: str, size: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    preset = f"{script.replace('_', '-')}-{size}"
    line = [ROOT / f"examples/paper/{script}.sh", source_of(preset, request), tmp_path / "run", size, "--dry_run"]
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": python, "PYTHONPATH": str(ROOT), "MNIF_CACHE": f"{tmp_path}/cache"}
    if script == "shapenet":
        environment["LAUNCH"] = f"{sys.executable} -m"  # as `accelerate launch … -m` is given
    done = subprocess.run(["bash", *map(str, line)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"of {PAPER[preset]['field']:,} parameters" in done.stdout
    assert "GPU hours" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_page_of_the_paper_has_the_numbers_of_the_presets() -> None:
    """Its table of models, and hours that follow from a dry run's operations for the whole of each set."""
    page = (ROOT / "docs/paper.md").read_text()
    passes = {"celeba-hq": 27_000 * 800, "shapenet": 35_019 * 800, "srn-cars": 2_458 * 2000}
    for name, model in PAPER.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` ")]
        _, _, sizes, latent, parameters, field, hours, *_ = [cell.strip() for cell in row.split("|")]
        assert sizes == f"{model['num_bases']}, {model['depth']}, {model['width']}"
        assert (latent, field) == (f"{model['latent_dim']:,}", f"{model['field']:,}")
        assert parameters == f"{LEARNABLE[name]} M"
        seen = passes[name.rpartition("-")[0]] // (2 if name == "shapenet-l" else 1)
        assert float(hours) == pytest.approx(GFLOP[name] * 1e9 * seen / 5e12 / 3600, abs=0.55)


def test_the_estimate_equals_a_calculation_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CelebA-HQ S on 40 pictures: 800 epochs of one batch of 32."""
    np.savez(tmp_path / "faces.npz", images=np.zeros((40, 64, 64, 3), dtype=np.uint8))
    command = ["--preset", "celeba-hq-s", "--data", f"{tmp_path}/faces.npz", "--output_dir", f"{tmp_path}/run"]
    printed = estimate([*command, "--held_out_fraction", "0", "--test_fraction", "0"], capsys)
    assert (printed["steps"], printed["batch"]) == (800, 32)
    point = 2 * 64 + 4 * 64 * 64 + 64 * 3
    picture = 64 * 64 * point
    assert picture / 1e6 == pytest.approx(70, rel=0.03)  # the paper's 70 M multiply-adds a picture
    # A forward and a backward pass are three forwards; three inner steps differentiated twice, nine each.
    mixing = 3 * 256 * PAPER["celeba-hq-s"]["field"]
    operations = 2 * (picture * (3 + 3 * 9) + mixing)
    assert printed["gflop"] == pytest.approx(operations / 1e9, rel=0.01)
    assert printed["hours"] == pytest.approx(operations * 32 * 800 / 5e12 / 3600, rel=0.02)
    assert printed["megabytes"] == pytest.approx(3300, rel=0.1)  # measured with the authors' code at this batch


def test_flags_win_over_a_preset() -> None:
    fit = ["--data", "x", "--output_dir", "y"]
    for order in (["--preset", "srn-cars-s", "--width", "8"], ["--width=8", "--preset", "srn-cars-s"]):
        parsed = parse_fit_arguments([*fit, *order, "--output_sine", "--resolution", "20", "30"])
        assert (parsed.width, parsed.output_sine, parsed.resolution) == (8, True, [20, 30])
        assert (parsed.signal, parsed.depth, parsed.num_train_epochs) == ("radiance", 4, 2000)
    steps = parse_fit_arguments([*fit, "--preset", "srn-cars-s", "--max-train-steps", "7"])
    assert (steps.max_train_steps, steps.num_train_epochs) == (7, None)
    epochs = parse_fit_arguments([*fit, "--preset", "srn-cars-s", "--num_train_epochs", "3"])
    assert epochs.num_train_epochs == 3


def test_a_preset_of_ones_own(celeba_hq: Path, tmp_path: Path) -> None:
    small = {"resolution": 16, "cells": 1, "num_bases": 4, "width": 8, "depth": 1, "latent_dim": 6, "compile": "off"}
    preset = {"signal": "image", "arguments": small | {"num_train_epochs": 2, "train_batch_size": 2}}
    (tmp_path / "small.json").write_text(json.dumps(preset))
    fit = ["fit", "--data", str(celeba_hq), "--preset", f"{tmp_path}/small.json", "--refinement_steps", "1"]
    assert main([*fit, "--output_dir", f"{tmp_path}/run", "--width", "4"]) == 0
    config = MNIFModel.load_config(tmp_path / "run/model/decoder")
    assert [config[name] for name in ("resolution", "num_bases", "width", "latent_dim")] == [16, 4, 4, 6]
    arguments = json.loads((tmp_path / "run/run.json").read_text())["fit"]["arguments"]
    assert arguments["max_train_steps"] == 6  # two passes over six pictures, two at a time; none falls to another side


def refusal(preset: str) -> str:
    """The message with which a preset is refused."""
    with pytest.raises(UserError) as error:
        parse_fit_arguments(["--data", "x", "--output_dir", "y", "--preset", preset])
    return str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widht": 8}, "a preset cannot set 'widht'"),
        ({"data": "elsewhere"}, "a preset cannot set 'data'"),
        ({"preset": "srn-cars-s"}, "a preset cannot set 'preset'"),
        ({"width": "wide"}, "--width wide: must be a whole number"),
        ({"width": 2.5}, "--width 2.5: must be a whole number"),
        ({"width": True}, "--width True: must be a whole number"),
        ({"width": [8]}, "--width [8]: one value is needed"),
        ({"omega": "fast"}, "--omega fast: must be a number"),
        ({"resolution": [16, "wide"]}, "--resolution [16, 'wide']: must be a whole number"),
        ({"report_to": 1}, "--report_to 1: must be a text"),
        ({"mixing": "stirred"}, "--mixing stirred: must be one of delta, average"),
        ({"output_sine": "yes"}, "--output_sine yes: must be true or false"),
        ({"output_sine": 1}, "--output_sine 1: must be true or false"),
    ],
)
def test_a_preset_is_checked_like_flags(arguments: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"signal": "image", "arguments": arguments}))
    found = refusal(str(path))
    assert found.startswith(f"--preset {path}: ")
    assert message in found
    assert "\n" not in found


def test_what_is_no_preset(tmp_path: Path) -> None:
    assert refusal("celeba-hq-xl").endswith(f"neither a JSON file nor one of {', '.join(preset_names(PRESETS))}")
    assert set(PAPER) < set(preset_names(PRESETS))
    for content in ('["image"]', '{"signal": "image"}', '{"signal": 1, "arguments": {}}', '{"signal": "image"'):
        (tmp_path / "broken.json").write_text(content)
        assert re.search(
            "an object with .* is needed|Expected `object`|required field|not a JSON file",
            refusal(f"{tmp_path}/broken.json"),
        )
    (tmp_path / "smell.json").write_text('{"signal": "smell", "arguments": {}}')
    assert main(["fit", "--data", "x", "--output_dir", f"{tmp_path}/run", "--preset", f"{tmp_path}/smell.json"]) == 2
