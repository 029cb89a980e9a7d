"""`mnif eval` on pictures through the command line: presets, processes, statistics, and what bad input gets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from evals.features.extractor import extract_features
from latent_prior.commands.prior import add_prior
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.models.io import save_component

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _own_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that earlier tests kept would hide what is computed; the compiled operator stays where it is."""
    monkeypatch.setattr("evals.features.extractor.cache_folder", lambda: tmp_path / "cache")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Twelve pictures of 16×16 pixels with what `mnif sample` writes beside them."""
    folder = tmp_path / "samples"
    folder.mkdir()
    for index in range(12):
        save(folder / f"{index:06d}.png", GENERATOR.integers(0, 256, (16, 16, 3)))
    (folder / "samples.json").write_text("{}")
    return folder


def save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def evaluated(*flags: object) -> dict:
    output = Path(str(flags[flags.index("--output_dir") + 1]))
    assert main(["eval", *map(str, flags)]) == 0
    return json.loads((output / "metrics.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    capsys.readouterr()
    assert main(["eval", *map(str, flags)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, lines
    return lines[0]


def test_every_figure_has_its_spread_its_controls_and_its_protocol(
    samples: Path, picture_folder: Path, tmp_path: Path
) -> None:
    metrics = evaluated("--samples", samples, "--reference", picture_folder, "--output_dir", tmp_path / "out")
    for name in ("fd_lite0", "kd_lite0", "precision_lite0", "recall_lite0", "density_lite0", "coverage_lite0"):
        for ending in ("", "_std", "_floor", "_floor_std"):
            assert f"{name}{ending}" in metrics, name + ending
    assert metrics["fd_lite0_floor"] < metrics["fd_lite0"]
    assert metrics["coverage_lite0_floor"] > metrics["coverage_lite0"]
    assert {"fd_lite0_infinity", "kd_lite0_subset_mean", "nn_ratio", "nn_ratio_std"} <= metrics.keys()
    assert not any("fid" in name or "kid" in name for name in metrics)
    protocol = metrics["protocol"]
    assert (protocol["samples"], protocol["preset"], protocol["neighbours"]) == (12, "offline", 5)
    assert (protocol["resize"], protocol["resolution"]) == ("bicubic-antialias", "16×16")
    assert len(metrics["warnings"]) == 2
    assert "12 samples are fewer than the 1280 feature dimensions" in metrics["warnings"][0]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["metrics.json", "metrics.md", "nearest.png"]


def test_presets_change_filter_part_and_neighbours(samples: Path, picture_folder: Path, tmp_path: Path) -> None:
    common = ["--samples", samples, "--reference", picture_folder, "--extractor", "lite0"]
    clean = evaluated(*common, "--preset", "clean", "--output_dir", tmp_path / "clean")
    paper = evaluated(*common, "--preset", "paper", "--output_dir", tmp_path / "paper")
    assert clean["protocol"]["resize"] == "pillow-bicubic"
    assert (clean["protocol"]["reference_part"], clean["protocol"]["reference_images"]) == ("all", 48)
    assert (paper["protocol"]["resize"], paper["protocol"]["neighbours"]) == ("bilinear", 3)
    assert 24 < paper["protocol"]["reference_images"] < 48
    assert clean["fd_lite0"] != pytest.approx(paper["fd_lite0"], rel=1e-3)


def test_statistics_stand_for_the_reference_under_the_same_protocol_only(
    samples: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics = tmp_path / "statistics.npz"
    common = ["--samples", samples, "--output_dir", tmp_path / "out"]
    whole = evaluated(*common, "--reference", picture_folder, "--save_statistics", statistics)
    with np.load(statistics) as file:  # as pytorch-fid and clean-fid read it
        assert file["mu"][:].shape == (1280,)
        assert file["sigma"][:].shape == (1280, 1280)
    metrics = evaluated(*common, "--reference", statistics)
    for name in ("fd_lite0", "fd_lite0_std", "fd_lite0_infinity"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-5)
    assert "nn_ratio" not in metrics
    message = refused(capsys, *common, "--reference", statistics, "--preset", "clean", "--extractor", "lite0")
    assert "made with resize 'bicubic-antialias', not 'pillow-bicubic'" in message


def test_a_stopped_evaluation_continues(
    samples: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extracted: list[int] = []

    def counted(images: np.ndarray, *arguments: Any, **options: Any) -> np.ndarray:
        extracted.append(len(images))
        if len(extracted) == 2:
            raise KeyboardInterrupt
        return extract_features(images, *arguments, **options)

    monkeypatch.setattr("evals.features.extractor.extract_features", counted)
    flags = ["--samples", samples, "--reference", picture_folder, "--output_dir", tmp_path / "out"]
    assert main(["eval", *map(str, flags)]) == 130
    assert not (tmp_path / "out/metrics.json").exists()
    assert evaluated(*flags)["protocol"]["samples"] == 12
    assert extracted == [12, 48, 48]  # the samples were not looked at again


def test_the_card_of_the_model_says_what_was_measured(
    pipeline: MNIFPipeline, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    save_component(model, "decoder", pipeline.decoder)
    add_prior(model, pipeline)
    (model / "README.md").write_text("# emoji\n\n## Evaluation\n\nSamples have not been measured yet.\n\n## Licence\n")
    flags = ["eval", "--model", str(model), "--reference", str(picture_folder), "--num_samples", "12"]
    flags += ["--refinement_steps", "1", "--output_dir", str(tmp_path / "out")]
    assert main(flags) == 0
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    card = ModelCard.load(model / "README.md")
    assert "not been measured" not in card.text
    assert "## Licence" in card.text
    assert "| fd_lite0 ↓ |" in card.text
    assert str(tmp_path) not in str(card)
    figures = {row.metric_type: row.metric_value for row in card.data.eval_results}
    assert figures["fd_lite0"] == pytest.approx(metrics["fd_lite0"])
    assert not [name for name in figures if name.endswith(("_floor", "_gaussian", "_std"))]
    (model / "README.md").write_text("# emoji\n")
    capsys.readouterr()
    assert main(flags) == 0  # the card is no part of what was measured
    assert "nothing to do" in capsys.readouterr().out
    assert "fd_lite0" in (model / "README.md").read_text()
    assert main([*flags, "--hub_model_id", "me/emoji"]) == 2
    assert "say --push_to_hub too" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_measure_what_one_does(pipeline: MNIFPipeline, picture_folder: Path, tmp_path: Path) -> None:
    save_component(tmp_path / "model", "decoder", pipeline.decoder)
    add_prior(tmp_path / "model", pipeline)
    flags = ["eval", "--model", f"{tmp_path}/model", "--reference", str(picture_folder), "--num_samples", "70"]
    flags += ["--refinement_steps", "1", "--output_dir"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "--", "mnif"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # principal components in float32 depend on the threads
    subprocess.run([sys.executable, "-m", "mnif", *flags, f"{tmp_path}/one"], env=environment, check=True, timeout=400)
    done = subprocess.run(
        [*launch, *flags, f"{tmp_path}/two"], capture_output=True, text=True, env=environment, check=True, timeout=400
    )
    assert done.stdout.count("metrics.json") == 1  # one of the processes speaks: they know of each other
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if isinstance(value, float) and name not in ("seconds", "peak_rss_mb"):
            assert two[name] == pytest.approx(value, rel=1e-9, abs=1e-9), name
    assert one["model"] == two["model"]
    assert one["model"]["num_bases"] == 6


def test_unusable_samples_get_one_line(
    samples: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", picture_folder, "--output_dir", tmp_path / "out", "--samples"]
    stranger = samples / "notes.txt"
    stranger.write_text("not a picture")
    assert "notes.txt: no picture; move it away from the samples" in refused(capsys, *flags, samples)
    stranger.unlink()
    cut = samples / "cut.png"
    cut.write_bytes((samples / "000000.png").read_bytes()[:60])
    assert "cut.png: unreadable picture" in refused(capsys, *flags, samples)
    cut.unlink()
    for pixels, words in (
        (np.zeros((16, 20, 3)), "wide.png: 16×20 pixels where the others have 16×16"),
        (np.zeros((16, 16)), "wide.png: a picture of mode L; RGB without transparency is needed"),
        (np.zeros((16, 16, 4)), "wide.png: a picture of mode RGBA"),
    ):
        save(samples / "wide.png", pixels)
        assert words in refused(capsys, *flags, samples)
    (tmp_path / "one").mkdir()
    save(tmp_path / "one/a.png", np.zeros((16, 16, 3)))
    assert "1 picture; at least 2 are needed" in refused(capsys, *flags, tmp_path / "one")
    np.savez(tmp_path / "grey.npz", images=np.zeros((9, 16, 16, 1), np.uint8))
    assert "RGB is needed, [N, H, W, 3]" in refused(capsys, *flags, tmp_path / "grey.npz")
    np.savez(tmp_path / "nan.npz", images=np.full((9, 16, 16, 3), np.nan, np.float32))
    assert "holds NaN or infinity" in refused(capsys, *flags, tmp_path / "nan.npz")
    assert "no such folder" in refused(capsys, *flags, tmp_path / "nothing")
    assert not (tmp_path / "out").exists()


def test_unusable_flags_get_one_line(
    samples: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--reference", picture_folder, "--output_dir", tmp_path / "out"]
    assert "give one of --model RUN/model, --samples" in refused(capsys, *flags)
    assert "give one of" in refused(capsys, *flags, "--samples", samples, "--bundle", tmp_path)
    assert "manifest.json" in refused(capsys, *flags, "--bundle", tmp_path)
    assert "--num_samples 1: at least 2" in refused(capsys, *flags, "--samples", samples, "--num_samples", 1)
    assert "--neighbours 0" in refused(capsys, *flags, "--samples", samples, "--neighbours", 0)
    other = tmp_path / "other.pth"
    other.write_bytes(b"x")
    message = refused(capsys, *flags, "--samples", samples, "--preset", "paper", "--inception_weights", other)
    assert "other.pth: sha256" in message
    assert "fd_lite0, not FID" in message
    assert not (tmp_path / "out").exists()
