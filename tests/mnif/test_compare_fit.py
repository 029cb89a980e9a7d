"""`mnif compare-fit`: rows, controls and curves of a comparison, and what spoils the instances it is measured on."""

import json
import math
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from mnif.cli import main
from mnif.comparison.engine import _time_after
from mnif.comparison.robustness import robustness, spoilt
from mnif.comparison.summary import comparison_table
from mnif.data.batches import ArrayDataset, array_dataset
from mnif.latents.inference import LatentInit, infer_latents
from mnif.latents.inner_loop import InnerLoop
from mnif.models.encoders import PatchEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.signals.image import Image

SMALL = [
    "--resolution",
    "16",
    "--cells",
    "2",
    "--num_bases",
    "6",
    "--width",
    "8",
    "--depth",
    "1",
    "--latent_dim",
    "12",
    "--encoder_width",
    "16",
]
QUICK = ["--train_batch_size", "8", "--refinement_steps", "3", "--held_out_fraction", "0.25", "--probes", "6"]
METHODS = ["encoder", "auto-decoding", "meta"]


def command(pictures: Path, folder: Path, *more: str) -> list[str]:
    return ["compare-fit", "--data", str(pictures), "--output_dir", str(folder), *SMALL, *QUICK, *more]


def table_rows(text: str) -> list[list[str]]:
    """The cells of every row of every table, without heads and rules."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if row[0] != "run" and set(row[0]) != {"-"}]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    more = ["--max_train_steps", "6", "--validation_steps", "3", "--random_flip"]
    assert main(command(picture_folder, folder, *more)) == 0
    return folder


def test_every_method_has_its_row_of_finite_numbers(compared: Path) -> None:
    comparison = json.loads((compared / "compare.json").read_text())
    assert [run["name"] for run in comparison["runs"]] == METHODS
    for run in comparison["runs"]:
        assert run["train_steps"] == 6
        assert run["augmented"] == (["random_flip"] if run["method"] == "encoder" else [])
        numbers = {name: value for name, value in run.items() if isinstance(value, (int, float))}
        assert all(math.isfinite(value) for value in numbers.values())
        assert {f"psnr_heldout_{name}" for name in ("whole", "missing", "noise", "shift")} <= numbers.keys()
        assert ("seconds_per_instance_finder_batch_1" in numbers) == (run["method"] != "auto-decoding")
        assert {"psnr_train", "psnr_heldout", "seconds_per_instance_refined_batch_32", "peak_rss_mb"} <= numbers.keys()
        assert {"decoder_parameters", "field_parameters", "multiply_adds_per_value"} <= numbers.keys()
    (pca,) = comparison["controls"]["pca"]
    assert pca["components"] == 12
    assert pca["psnr_heldout"] > comparison["controls"]["mean"]["psnr_heldout"] > 5
    quality = ["encoder", "auto-decoding", "meta", "control: PCA, 12 components", "control: mean instance"]
    rows = table_rows((compared / "compare.md").read_text())
    assert [row[0] for row in rows] == [*quality, *METHODS]
    assert [row.count("–") for row in rows[:3]] == [0, 1, 0]  # only auto-decoding has no finder
    with Picture.open(compared / "curves.png") as picture:
        assert picture.width > 600


def test_every_method_learns_latents_laid_out_as_tokens(picture_folder: Path, tmp_path: Path) -> None:
    variant = "latent_layout=tokens,tokens=2,latent_dim=16"
    more = ["--max_train_steps", "2", "--probes", "2", "--refinement_steps", "1", "--variants", variant]
    assert main(command(picture_folder, tmp_path, *more)) == 0
    comparison = json.loads((tmp_path / "compare.json").read_text())
    for run in comparison["runs"]:
        config = json.loads((Path(run["folder"]) / "model/decoder/config.json").read_text())
        assert (config["tokens"], config["latent_dim"]) == (2, 16)
        assert all(math.isfinite(value) for value in run.values() if isinstance(value, (int, float)))
    assert [pca["components"] for pca in comparison["controls"]["pca"]] == [16]
    rows = table_rows((tmp_path / "compare.md").read_text())
    assert [row[0] for row in rows[:3]] == [f"{method}-{variant}" for method in METHODS]


def test_the_table_marks_a_control_that_knows_its_training_set(compared: Path) -> None:
    comparison = json.loads((compared / "compare.json").read_text())
    for instances, train, lines in ((14, "26.00", 0), (13, "(26.00)", 1)):  # twelve components and the mean
        comparison["instances"]["train"] = instances
        comparison["controls"]["pca"][0]["psnr_train"] = 26
        text = comparison_table(comparison)
        assert [row[1] for row in table_rows(text) if row[0] == "control: PCA, 12 components"] == [train]
        assert text.count("holds all of the 13 training instances: its figures on them mean nothing") == lines


def test_same_command_reuses_runs_and_measurements(
    compared: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((compared / "compare.json").read_text())["runs"]
    capsys.readouterr()
    more = ["--max_train_steps", "6", "--validation_steps", "3", "--random_flip"]
    assert main(command(picture_folder, compared, *more)) == 0
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert main(["compare-fit", "--config", f"{compared}/config.yaml"]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 6
    assert json.loads((compared / "compare.json").read_text())["runs"] == before
    assert main(command(picture_folder, compared, *more, "--methods", "meta", "--seed", "1")) == 2
    assert "meta holds a `fit` with seed 0 where now it is 1" in capsys.readouterr().err


def test_seconds_are_turned_into_steps_once(
    picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["--variants", "cells=2", "cells=1,width=4,output_sine=true"]
    arguments = command(picture_folder, tmp_path, "--train_seconds", "1", "--methods", "encoder", *variants)
    assert main(arguments) == 0
    first = json.loads((tmp_path / "compare.json").read_text())
    assert [run["name"] for run in first["runs"]] == ["encoder-cells=2", "encoder-cells=1,width=4,output_sine=true"]
    for run, fields in zip(first["runs"], (4, 1), strict=True):
        assert run["fields_per_instance"] == fields
        assert run["train_steps"] == max(round(1 / run["seconds_per_step"]), 1)
    assert json.loads((Path(run["folder"]) / "model/decoder/config.json").read_text())["output_sine"]
    capsys.readouterr()
    assert main(arguments) == 0
    assert capsys.readouterr().out.count("nothing to do") == 4
    assert json.loads((tmp_path / "compare.json").read_text())["runs"] == first["runs"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the wall's clock counts where an accelerator works")
def test_what_else_a_processor_does_makes_no_step_longer() -> None:
    """A wait is what the loop meets on a busy machine."""

    def waiting() -> Iterator[int]:
        for step in count():
            time.sleep(0.02)
            yield step

    steps = waiting()
    started = _time_after(steps)
    assert _time_after(steps) - started < 0.05  # five steps, a tenth of a second by the wall


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "guessing"], "guessing"),
        (["--method", "meta"], "--method: give --methods"),
        (["--variants", "celts=1"], "--variants celts=1: there is no flag --celts"),
        (["--variants", "cells"], "cells needs a value"),
        (["--variants", "cells=0"], "--variants cells=0: --cells 0: must be at least 1"),
        (["--variants", "cells=few"], "--variants cells=few: --cells few: must be a whole number"),
        (["--variants", "resolution=8"], "--resolution must be the same for all"),
        (["--variants", "output_sine=maybe"], "must be true or false"),
        (["--variants", "random_flip=true"], "--random_flip needs --method encoder"),
        (["--train_seconds", "5", "--max_train_steps", "5"], "--train_seconds and --max_train_steps: give one"),
        (["--train_seconds=5", "--num_train_epochs=5"], "--train_seconds and --num_train_epochs: give one"),
        (["--train_seconds", "0"], "--train_seconds 0: must be above 0"),
        (["--probes", "0"], "--probes 0: must be at least 1"),
        (["--dry_run"], "--dry_run"),
        (["--held_out_fraction", "0"], "0 held out; raise --held_out_fraction"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(
    flags: list[str], message: str, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(picture_folder, tmp_path / "out", *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnif compare-fit: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture
def signal() -> Image:
    return Image(16, 3)


@pytest.fixture
def rows() -> ArrayDataset:
    return array_dataset({"images": np.random.default_rng(3).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)})


@pytest.mark.parametrize("method", METHODS)
def test_what_is_missing_does_not_influence_the_latent(
    method: str, decoder: MNIFModel, signal: Image, rows: ArrayDataset
) -> None:
    torch.manual_seed(2)
    finders: dict[str, LatentInit] = {"encoder": PatchEncoder(3, 16, 12, width=16).eval(), "meta": InnerLoop(12)}
    latent_init, observe = finders.get(method), spoilt(signal, "missing", seed=0)
    (batch,) = rows.batches(5)
    seen = observe(batch).mask
    assert seen is not None
    assert seen.flatten(1).sum(dim=1).tolist() == [128] * 5  # half of 16×16
    assert not torch.equal(seen[0], seen[1])
    hidden = (seen[..., None] == 0).numpy()

    def found(images: np.ndarray) -> torch.Tensor:
        changed = array_dataset({"images": images})
        return torch.cat([*infer_latents(decoder, signal, changed, latent_init, 4, batch_size=2, observe=observe)])

    images = batch["images"].numpy()
    latents = found(images)
    assert torch.equal(found(np.where(hidden, 255 - images, images)), latents)
    assert not torch.equal(found(np.where(hidden, images, 255 - images)), latents)


@pytest.mark.parametrize("condition", ["missing", "noise", "shift"])
def test_spoiling_is_a_function_of_seed_and_row(condition: str, signal: Image, rows: ArrayDataset) -> None:
    (batch,) = rows.batches(5)
    whole = spoilt(signal, condition, seed=0)(batch)
    single = [spoilt(signal, condition, seed=0)(one).values for one in rows.batches(1)]
    assert torch.equal(torch.cat(single), whole.values)
    other = spoilt(signal, condition, seed=1)(batch)
    assert torch.equal(other.values, whole.values) == (condition == "shift")
    clean = signal.observe(batch).values
    if condition == "noise":
        assert (whole.values - clean).std().item() == pytest.approx(0.2, rel=0.05)
    if condition == "shift":
        assert torch.equal(whole.values[:, :, 2:], clean[:, :, :-2])
        assert torch.equal(whole.values[:, :, :2], clean[:, :, -2:])


def test_robustness_is_measured_against_the_clean_original(decoder: MNIFModel, signal: Image) -> None:
    """Pictures the decoder draws itself: found again whole, and a little worse when they are spoilt."""
    with torch.no_grad():
        drawn = decoder(torch.randn(4, 12)).clamp(-1, 1)
    rows = array_dataset({"images": (drawn * 127.5 + 127.5).round().byte().numpy()})
    metrics = robustness(decoder, signal, rows, None, 8, seed=0)
    assert metrics == robustness(decoder, signal, rows, None, 8, seed=0)
    assert metrics["psnr_heldout_whole"] > metrics["psnr_heldout_noise"] > 20
    assert metrics["psnr_heldout_whole"] >= metrics["psnr_heldout_missing"] - 1 > 20
