"""Several evaluations in one table; the figures are made up, so that what is written can be told from them."""

import json
from pathlib import Path

import pytest
from PIL import Image

from evals.presentation import metrics_of, table_rows
from mnif.cli import main
from mnif.utils.errors import UserError
from scripts.refresh_results import BEGIN, END, refresh

PROTOCOL = {"extractor": "lite0", "resize": "bicubic-antialias", "samples": 1000, "seed": 0}


def evaluation(folder: Path, steps: int, distance: float, **protocol: object) -> Path:
    folder.mkdir(parents=True)
    metrics = {
        "fd_lite0": distance,
        "fd_lite0_std": 0.25,
        "fd_lite0_floor": 2.0,
        "fd_lite0_gaussian": 40.0,
        "psnr_heldout": 24.5,
        "psnr_pca_heldout": 22.5,
        "psnr_mean_heldout": 11.5,
        "psnr_heldout_encoder": 20.0,
        "seconds": 3.0,
        "model": {"num_bases": 8 * steps, "num_inference_steps": steps, "multiply_adds_per_value": 100},
        "protocol": PROTOCOL | protocol,
        "inputs": {},
        "command": "mnif eval",
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def test_figures_stand_above_their_controls() -> None:
    metrics = {"psnr_heldout": 24.5, "psnr_pca_heldout": 22.5, "fd_lite0": 9.0, "fd_lite0_std": 0.26}
    metrics |= {"fd_lite0_floor": 2.0, "seconds": 1.0, "border_step_ratio_train": 1.0}
    rows = table_rows([metrics, {"fd_lite0": 8.0}])
    assert [(row.label, row.cells, row.control) for row in rows] == [
        ("fd_lite0 ↓", ["9 ± 0.3", "8"], False),
        ("real against real", ["2", "–"], True),
        ("PSNR, held-out, dB ↑", ["24.5", "–"], False),
        ("PCA, as many numbers", ["22.5", "–"], True),
    ]


def test_keys_say_what_was_measured_of_what() -> None:
    keys = {
        "fd_lite0": ("fd_lite0", "", ""),
        "fd_lite0_gaussian": ("fd_lite0", "", "gaussian"),
        "mmd_chamfer_floor": ("mmd_chamfer", "", "floor"),
        "nn_ratio_latents": ("nn_ratio_latents", "", ""),
        "psnr_heldout": ("psnr", "heldout", ""),
        "psnr_heldout_inner_loop": ("psnr", "heldout", "inner_loop"),
        "rfd_lite0_pca_train": ("rfd_lite0", "train", "pca"),
        "psnr_novel_views_mean_test": ("psnr_novel_views", "test", "mean"),
    }
    evaluation = dict.fromkeys(keys, 1.0) | {"psnr_heldout_std": 0.5, "no_surface_train": 3, "protocol": {}}
    metrics = {metric.key: metric for metric in metrics_of(evaluation)}
    assert {key: metric.identity for key, metric in metrics.items()} == keys
    assert (metrics["psnr_heldout"].std, metrics["fd_lite0"].std) == (0.5, None)
    assert metrics["psnr_novel_views_mean_test"].family.arrow == "↑"
    assert metrics["rfd_lite0_pca_train"].label == "rfd_lite0_pca_train ↓"


def test_controls_without_what_they_control_stand_alone() -> None:
    rows = table_rows([{"fd_lite0_floor": 2.0, "unheard_of": 1.0}])
    assert [(row.label, row.control) for row in rows] == [("fd_lite0_floor ↓", False), ("unheard_of", False)]


def test_one_table_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = evaluation(tmp_path / "runs/a/eval", 4, 10.0)
    evaluation(tmp_path / "runs/b/eval", 20, 8.0, seed=3)
    output = tmp_path / "compared"
    assert main(["eval", str(a), str(tmp_path / "runs/b"), "--output_dir", str(output)]) == 0
    lines = (output / "comparison.md").read_text().splitlines()
    assert lines[0] == "| figure | a-eval | b |"
    assert "| fd_lite0 ↓ | 10 ± 0.2 | 8 ± 0.2 |" in lines
    assert "| *– mean of the training set* | 11.5 | 11.5 |" in lines
    assert "samples 1000" in lines[-3]
    assert lines[0] in capsys.readouterr().out
    content = json.loads((output / "comparison.json").read_text())
    assert [one["figures"]["fd_lite0"] for one in content["evaluations"]] == [10.0, 8.0]
    with Image.open(output / "comparison.png") as plot:
        assert plot.width > plot.height > 300  # three costs beside each other, two qualities


def test_readme_and_page_take_the_figures_in(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "eval", 4, 10.0)
    (tmp_path / "docs").mkdir()
    readme, page = tmp_path / "README.md", tmp_path / "docs/results.md"
    for each in (readme, page):
        each.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    refresh(tmp_path, folder)
    once = [readme.read_text(), page.read_text()]
    for text in once:
        assert "| fd_lite0 ↓ | 10 ± 0.2 |" in text
        assert "old" not in text
        assert text.startswith("before\n\n")
        assert text.endswith(f"{END}\n\nafter\n")
    assert "Protocol: " in once[1]
    assert once[0].count("\n|") < once[1].count("\n|")
    assert "PCA, as many numbers 22.5" in once[0]
    refresh(tmp_path, folder)
    assert [readme.read_text(), page.read_text()] == once
    for each in ("README.md", "docs/results.md"):
        assert BEGIN in (Path(__file__).parents[2] / each).read_text()


def test_no_page_is_changed_where_one_lacks_its_markers(tmp_path: Path) -> None:
    folder = evaluation(tmp_path / "eval", 4, 10.0)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"{BEGIN}\nold\n{END}\n")
    (tmp_path / "docs/results.md").write_text("nothing\n")
    with pytest.raises(UserError, match=r"results\.md: needs the lines"):
        refresh(tmp_path, folder)
    assert "old" in (tmp_path / "README.md").read_text()


def test_what_cannot_be_compared_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = evaluation(tmp_path / "a", 4, 10.0)
    b = evaluation(tmp_path / "b", 4, 8.0, resize="pillow-bicubic")
    output = ["--output_dir", f"{tmp_path}/out"]
    (tmp_path / "nothing").mkdir()
    for paths, words in (
        ([a, b], "a was measured with resize bicubic-antialias, b with pillow-bicubic"),
        ([a, tmp_path / "nothing"], "nothing: holds no evaluation"),
        ([a, a], "the same folder is given twice"),
        ([a, "--samples", tmp_path], "give either folders to compare, or one of"),
    ):
        assert main(["eval", *map(str, paths), *output]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert words in line
    assert not (tmp_path / "out").exists()
