"""`mnif pilot`: what it writes, what it recommends, and what it refuses."""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.commands.pilot import fit_command
from evals.costs import decode_costs, shipped_bytes
from mnif.cli import main
from mnif.commands.fit import parse_fit_arguments
from mnif.comparison.choice import Candidate
from mnif.comparison.robustness import spoilt
from mnif.data.batches import array_dataset
from mnif.models.mnif_model import MNIFModel
from mnif.signals.image import Image
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model
from tests.browser.chromium import asked_of_page, needs_browser

SMALL = ["--width", "8", "--depth", "1", "--latent_dim", "12", "--encoder_width", "16", "--cells", "2"]
QUICK = ["--train_batch_size", "8", "--refinement_steps", "2", "--held_out_fraction", "0.25", "--probes", "4"]
SIZES = ["--num_bases", "8", "4", "--max_train_steps", "4"]


def command(data: Path | str, folder: Path, *more: str) -> list[str]:
    return ["pilot", "--data", str(data), "--output_dir", str(folder), *SMALL, *QUICK, *more]


def content_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "pilot.json").read_text())


@pytest.fixture(scope="module")
def piloted(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("pilots") / "sizes of it"
    more = ["--resolution", "16", "20", "--random_flip", "--prior_steps", "2"]
    assert main(command(picture_folder, folder, *SIZES, *more)) == 0
    return folder


def test_every_setting_has_its_figures_over_two_seeds(piloted: Path) -> None:
    pilot = content_of(piloted)
    names = [f"encoder-num_bases={size},cells=2,seed={seed}" for size in (4, 8) for seed in (0, 1)]
    assert [run["name"] for run in pilot["runs"]] == names
    assert [(each["num_bases"], each["cells"], len(each["qualities"])) for each in pilot["settings"]] == [
        (4, 2, 2),
        (8, 2, 2),
    ]
    needed = {"psnr_train", "psnr_heldout", "psnr_pca_heldout", "images_per_second", "samples_distance"}
    needed |= {f"psnr_heldout_{name}" for name in ("whole", "missing", "noise", "shift", "few")}
    needed |= {"decode_milliseconds", "decode_multiply_adds", "field_bytes", "shipped_bytes"}
    small, large = pilot["settings"]
    assert needed <= small["means"].keys()
    runs = [run["psnr_heldout"] for run in pilot["runs"]]
    assert small["means"]["psnr_heldout"] == pytest.approx(np.mean(runs[:2]))
    assert large["spreads"]["psnr_heldout"] == pytest.approx(np.std(runs[2:], ddof=1))
    assert small["spreads"]["psnr_heldout"] > 0
    assert small["means"]["shipped_bytes"] < large["means"]["shipped_bytes"]
    assert set(pilot["conditions"]) == {"whole", "missing", "noise", "shift", "few"}


def test_what_is_recommended_is_a_fit_of_the_same_flags(piloted: Path, picture_folder: Path) -> None:
    text = (piloted / "pilot.md").read_text()
    for each in content_of(piloted)["recommendations"]:
        assert f"`{each['command']}`" in text
        program, name, *flags = shlex.split(each["command"])
        assert (program, name) == ("mnif", "fit")
        arguments = parse_fit_arguments(flags)
        assert (arguments.num_bases, arguments.cells) == (each["num_bases"], 2)
        assert arguments.output_dir == piloted / each["name"]
        assert (arguments.data, arguments.resolution) == (str(picture_folder), [16, 20])
        assert arguments.random_flip
        assert arguments.max_train_steps == 5000  # those of `mnif fit`, not the pilot's


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", "it's $HOME; `a`\n*"), ("data", "-b"), ("random_flip", False), ("learning_rate", 1e-5), ("seed", 3)],
)
def test_a_command_line_says_what_was_meant(name: str, value: Any) -> None:
    given = {"data": "here", "signal": "image", "probes": 4, "train_seconds": 2.0, "num_bases": [1, 2], name: value}
    program, _, *flags = shlex.split(fit_command(given, Candidate(7, 3, (), {}, {}), Path("a b")))
    arguments = parse_fit_arguments(flags)
    assert program == "mnif"
    assert getattr(arguments, name) == value
    assert (arguments.num_bases, arguments.cells, arguments.output_dir) == (7, 3, Path("a b"))


def test_a_command_line_says_nothing_that_goes_without_saying() -> None:
    """Of a preset of the signal's own, what differs from the flags' defaults is not said either."""
    given = {"data": "furniture", "width": 24, "learning_rate": 4e-3, "random_flip": True, "seed": 0, "cells": [2]}
    usual = parse_fit_arguments(["--data", "furniture", "--output_dir", "out"])
    given |= {"signal": "voxels", "stride": usual.stride, "train_batch_size": usual.train_batch_size}
    command = fit_command(given, Candidate(7, 3, (), {}, {}), Path("out"))
    flags = "--data furniture --output_dir out --num_bases 7 --cells 3 --signal voxels --random_flip"
    assert command == f"mnif fit {flags}"


def test_the_same_command_again_reuses_all(
    piloted: Path, picture_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_of(piloted)
    capsys.readouterr()
    assert main(["pilot", "--config", f"{piloted}/config.yaml"]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 3 * 4  # fit, and two files of figures
    assert content_of(piloted)["settings"] == before["settings"]
    more = ["--resolution", "16", "20", "--random_flip", "--prior_steps", "2"]
    assert main(command(picture_folder, piloted, *SIZES, *more, "--latent_noise", "0.1")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed=0 holds a `fit` with latent_noise 0.3 where now it is 0.1" in line


def test_a_comparison_takes_over_the_runs_of_a_pilot(
    piloted: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*SMALL[:-2], *QUICK, "--resolution", "16", "20", "--random_flip", "--max_train_steps", "4"]
    data = ["--data", str(picture_folder), "--output_dir", str(tmp_path), "--runs_dir", str(piloted)]
    variant = "num_bases=8,cells=2,seed=0"
    capsys.readouterr()
    assert main(["compare-fit", *data, *flags, "--methods", "encoder", "--variants", variant]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    (run,) = json.loads((tmp_path / "compare.json").read_text())["runs"]
    assert run["psnr_heldout"] == content_of(piloted)["runs"][2]["psnr_heldout"]


@pytest.mark.parametrize(("data", "figure"), [("furniture", "iou_heldout"), ("balls", "psnr_heldout")])
def test_shapes_and_views_are_piloted_too(data: str, figure: str, ball_views: Path, tmp_path: Path) -> None:
    quick = ["--refinement_steps", "1", "--probes", "2", "--train_seconds", "0.001"]
    form = (
        ["--resolution", "8"]
        if data == "furniture"
        else ["--held_out_views", "0", "--max_views", "2", "--samples_per_ray", "2"]
    )
    source = data if data == "furniture" else str(ball_views)
    assert main([*command(source, tmp_path / "out", "--num_bases", "2", "4"), *quick, *form]) == 0
    pilot = content_of(tmp_path / "out")
    assert pilot["quality"] == figure
    assert all(np.isfinite(each["means"][figure]) for each in pilot["settings"])
    assert ("psnr_heldout_shift" in pilot["settings"][0]["means"]) == (data == "furniture")
    assert ("IoU" in (tmp_path / "out/pilot.html").read_text()) == (data == "furniture")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_bases", "8"], "--num_bases 8: a curve needs two different numbers at least"),
        (["--num_bases", "8", "8"], "--num_bases 8 8: a curve needs two different numbers at least"),
        (["--num_bases", "4", "0"], "--num_bases 0: must be at least 1"),
        (["--num_bases", "8", "73"], "--num_bases 73: a layer has 72 numbers, which as many bases span; give fewer"),
        (
            ["--num_bases", "4", "65", "--cells", "1"],
            "more than the 32 fields to learn from (32 pictures of 1 field each)",
        ),
        (["--seeds", "1"], "--seeds 1: must be at least 2"),
        (["--cells", "2", "0"], "--cells 0: must be at least 1"),
        (["--prior_steps", "-1"], "--prior_steps -1: must be at least 0"),
        (["--good_enough", "-1"], "--good_enough -1.0: must be at least 0"),
        (["--train_seconds", "5", "--max_train_steps", "5"], "--train_seconds and --max_train_steps: give one"),
        (["--held_out_fraction", "0"], "0 held out; raise --held_out_fraction"),
        (["--dry_run"], "--dry_run"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(
    flags: list[str], message: str, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(picture_folder, tmp_path / "out", "--resolution", "16", *flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnif pilot: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cells", [1, 3])
def test_multiply_adds_are_those_counted_by_hand(cells: int) -> None:
    """Two layers are mixed beside the first: 5×5 and 5×3 weights with their biases."""
    decoder = MNIFModel(resolution=12, num_bases=7, width=5, depth=1, latent_dim=11, cells=cells)
    rows = array_dataset({"images": np.zeros((1, 12, 12, 3), dtype=np.uint8)})
    costs = decode_costs(decoder, signal_of_model(decoder), rows)
    fields = cells**2
    points = decoder.grid().coordinates.shape[1] * fields
    assert points == 144 if cells == 1 else points > 144
    of_map, of_mixing = 11 * 7 * 2 * fields, 7 * (30 + 18) * fields
    assert costs["decode_multiply_adds"] == of_map + of_mixing + points * (2 * 5 + 5 * 5 + 5 * 3)
    assert costs["field_bytes"] == 4 * fields * (15 + 30 + 18)


def test_bytes_that_ship_grow_with_the_bases_by_what_they_hold() -> None:
    sizes = {
        count: shipped_bytes(MNIFModel(num_bases=count, width=16, depth=2, latent_dim=64, cells=2))
        for count in (64, 128)
    }
    of_bases = 64 * (2 * 2 * 17 * 16 + 2 * 17 * 3)  # float16; the biases among them
    of_map = 64 * 4 * 3 * (64 + 4 + 4)  # a byte each, and a scale and a bias in float32 for a row
    assert sizes[128] - sizes[64] == pytest.approx(of_bases + of_map, rel=0.15)


def test_few_values_are_a_sixteenth_and_of_views_one() -> None:
    rows = array_dataset({"images": np.zeros((3, 16, 16, 3), dtype=np.uint8)})
    (batch,) = rows.batches(3)
    mask = spoilt(Image(16, 3), "few", seed=0)(batch).mask
    assert mask is not None
    assert mask.flatten(1).sum(dim=1).tolist() == [16] * 3
    assert not torch.equal(mask[0], mask[1])
    poses, intrinsics = torch.eye(4).expand(2, 5, 4, 4), torch.full((2, 4), 8.0)
    views = {"images": torch.randint(0, 256, (2, 5, 16, 16, 3)), "poses": poses, "intrinsics": intrinsics}
    signal = RadianceField(16, held_out_views=1)
    assert torch.equal(spoilt(signal, "few", seed=0)(views).values, signal.observe(views).values[:, :1])


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_stands_alone_and_fits_a_phone(piloted: Path, scheme: str) -> None:
    page = piloted / "pilot.html"
    assert page.stat().st_size < 1e6
    found = asked_of_page(
        page.resolve().as_uri(),
        """
        return page.evaluate(() => ({ width: document.documentElement.scrollWidth, words: document.body.innerText,
          charts: [...document.querySelectorAll(".chart svg")].length,
          ground: getComputedStyle(document.body).backgroundColor }));
        """,
        viewport={"width": 360, "height": 800},
        colorScheme=scheme,
    )
    assert (found["width"], found["charts"]) == (360, 5)
    assert found["ground"] == ("rgb(247, 248, 250)" if scheme == "light" else "rgb(20, 22, 26)")
    assert all(each["command"] in found["words"] for each in content_of(piloted)["recommendations"])
