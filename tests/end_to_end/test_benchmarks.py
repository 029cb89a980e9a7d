"""Benchmarks are run by hand; that they still fit the code they measure shows when they are read."""

import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mnif.utils.files import write_json
from mnif.utils.json_files import read_json

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks"
PARTS = ["tests", "fields", "sampling", "training"]


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_imports_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(path.parent))
    runpy.run_path(str(path), run_name="read_only")


def command_of(folder: Path, *flags: str) -> list[str]:
    return [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--tiny", "--output_dir", str(folder), *flags]


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_parts

    return gpu_parts


@pytest.mark.slow
def test_every_part_for_a_gpu_leaves_results_that_are_used_again(tmp_path: Path) -> None:
    first = subprocess.run(command_of(tmp_path, "--minutes", "60"), capture_output=True, text=True)
    assert first.returncode == 0, first.stdout + first.stderr
    results = read_json(tmp_path / "results.json")
    assert sorted(results) == sorted(PARTS)
    rows = {row["work"]: row for part in results.values() for row in part["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    assert rows["pytest -m gpu tests/end_to_end/test_gpu.py"]["passed"]
    assert rows["CAVIA second order, tiny, batch 4, bf16"]["ratio"] > 0
    assert rows["the paper's prior, 1000 steps, batch 1"]["extrapolated"]
    assert rows["encoder + mixing, tiny, batch 4, training step, float32"]["ours, images/s"] > 0
    assert (tmp_path / "results.md").read_text().count("not judged") == 7  # every one has a row, also in miniature
    assert rows["model"]["MB"] <= rows["model"]["asked, MB"]
    for name in ("results.md", "chart.png", "model/model_index.json", "samples", "eval"):
        assert (tmp_path / name).exists(), name
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()}
    again = subprocess.run(command_of(tmp_path), capture_output=True, text=True)
    assert again.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "parts").iterdir()} == written


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A folder in which one part has finished."""
    part = {"device": "cpu", "tiny": True, "machine": {}, "finished": True}
    write_json(tmp_path / "parts/tests.json", part | {"rows": [{"work": "a", "summary": "2 passed"}]})
    return tmp_path


def test_a_part_that_is_cut_off_leaves_the_others(begun: Path) -> None:
    process = subprocess.Popen(command_of(begun), stdout=subprocess.PIPE, text=True)
    for number, name in enumerate(PARTS[1:]):
        while not (begun / f"parts/{name}.txt").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM if number % 2 else signal.SIGINT)
    told, _ = process.communicate()
    assert process.returncode == 0  # of those that have left something, all have finished
    assert told.count("stopped; given again") == len(PARTS) - 1
    assert read_json(begun / "results.json")["tests"]["rows"] == [{"work": "a", "summary": "2 passed"}]
    assert "2 passed" in (begun / "results.md").read_text()


def test_a_part_whose_time_is_up_says_so(begun: Path) -> None:
    command = command_of(begun, "--minutes", "0.01", "--parts", "tests", "sampling")
    found = subprocess.run(command, capture_output=True, text=True)
    assert "sampling: its time is up" in found.stdout
    assert read_json(begun / "parts/tests.json")["finished"]


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--device", "cpu"], "made with --device cpu --tiny; choose another --output_dir"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_a_line(begun: Path, flags: list[str], problem: str) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--output_dir", str(begun), *flags]
    found = subprocess.run(command, capture_output=True, text=True)
    assert (found.returncode, found.stderr.count("\n")) == (2, 1)
    assert problem in found.stderr


def test_a_work_that_fails_costs_no_other(
    parts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def works(place):
        yield "good", lambda: {"figure": 1}
        yield "bad", lambda: {"figure": 1 // 0}
        yield "last", lambda: {"figure": 2}

    monkeypatch.setitem(parts.WORKS, "fields", works)
    place = parts.Place(tmp_path, torch.device("cpu"), True, time.monotonic() + 60)
    with pytest.raises(SystemExit):  # a device may be of no more use to this process
        parts.run("fields", place)
    parts.run("fields", place)
    part = read_json(tmp_path / "parts/fields.json")
    failed = "ZeroDivisionError: integer division or modulo by zero"
    good, last = {"work": "good", "figure": 1}, {"work": "last", "figure": 2}
    assert part["rows"] == [good, {"work": "bad", "failed": failed}, last]
    assert part["finished"]


@pytest.mark.parametrize("mixing", ["delta", "average"])
def test_the_plain_form_mixes_what_ours_does(parts: ModuleType, mixing: str) -> None:
    import fitting

    sizes = {"resolution": 8, "num_bases": 4, "width": 8, "latent_dim": 8, "cells": 2}
    model, latents = fitting.MNIFModel(**sizes, mixing=mixing), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(fitting.plain_rows(model, latents), model.bake(model.coefficients(latents)).params)


def full_rows(parts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The names of all rows that a GPU leaves, without their figures."""
    place = parts.Place(Path("nowhere"), torch.device("cuda"), False, 0.0)
    monkeypatch.setattr(parts, "paper_model", lambda *_: None)
    monkeypatch.setattr(parts, "untrained_pipeline", lambda _: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    monkeypatch.setattr(parts, "draw", lambda *_: None)
    return {name: [work for work, _ in parts.WORKS[name](place)] for name in ("fields", "sampling")}


@pytest.mark.parametrize(
    ("figure", "met"), [(1.0, "no yes no yes no yes yes"), (1e6, "yes yes yes yes yes no no")], ids=["1", "1e6"]
)
def test_the_report_says_what_of_the_reach_is_met(
    parts: ModuleType, monkeypatch: pytest.MonkeyPatch, figure: float, met: str
) -> None:
    import gpu_report

    figures = dict.fromkeys([reach.figure for reach in gpu_report.REACHES], figure)
    made = {
        name: {"device": "cuda", "tiny": False, "rows": [{"work": work, **figures} for work in works]}
        for name, works in full_rows(parts, monkeypatch).items()
    }
    lines = gpu_report.reached(made)[4:]
    assert " ".join(line.split("|")[-2].strip() for line in lines) == met
    assert all(line.endswith("not measured |") for line in gpu_report.reached({})[4:])


def test_the_files_with_tests_for_a_gpu_are_run(parts: ModuleType) -> None:
    marked = {path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()}
    assert {ROOT / "tests" / name for name in parts.FILES_OF_TESTS} == marked
