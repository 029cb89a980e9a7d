"""Damaged records of runs: run.json, metrics, curves, presets, samples, statistics, and tables of latents."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from evals.charts import curve_chart
from evals.commands.eval import compare
from evals.commands.report import RunFigures
from evals.metrics.frechet import load_moments, moments_of, save_moments
from latent_prior.model_card import write_model_card
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.training.fit_arguments import FitArguments
from mnif.training.run_record import MetricsLog, begin_stage, read_metrics_log, read_run_record
from mnif.utils.errors import UserError
from mnif.utils.flag_files import preset_values, read_config, read_preset, write_config
from mnif.utils.json_files import read_json, read_object
from tests.hostile.conftest import refusal_of
from tests.hostile.mutators import damaged_bytes, damaged_json


def damage(path: Path, seed: int) -> None:
    path.write_bytes(damaged_json(path.read_bytes(), seed))


@pytest.mark.parametrize("seed", range(50))
def test_run_record(seed: int, copied: Callable[[str], Path]) -> None:
    path = copied("run.json")
    damage(path, seed)
    if refusal_of(lambda: read_run_record(path.parent)) is None:
        assert all(isinstance(stage.command, str) for stage in read_run_record(path.parent).values())
        refusal_of(lambda: begin_stage(path.parent, "fit", FitArguments(data="x", output_dir=path.parent), {}))


@pytest.mark.parametrize("seed", range(60))
def test_file_of_flags(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    flags = {"data": "x", "output_dir": "y", "resolution": [16, 24], "omega": 30.5, "random_flip": True, "cells": None}
    write_config(path, {"fit": flags, "prior": {"run": "y"}})
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    if refusal_of(lambda: read_config(path, FitArguments, "mnif fit")) is None:
        read = read_config(path, FitArguments, "mnif fit")
        assert read.keys() <= flags.keys()
        assert isinstance(read.get("omega", 1.0), float)


@pytest.mark.parametrize("name", ["run.json", "metrics.json", "eval/metrics.json"])
@pytest.mark.parametrize("seed", range(25))
def test_model_card(name: str, seed: int, copied: Callable[[str], Path]) -> None:
    for each in ("model", "latents.safetensors", "run.json", "metrics.json", "eval"):
        run = copied(each).parent
    damage(run / name, seed)
    refusal = refusal_of(lambda: write_model_card(run))
    assert (run / "model/README.md").exists() is (refusal is None)


@pytest.mark.parametrize("seed", range(30))
def test_figures_of_a_run(seed: int, copied: Callable[[str], Path]) -> None:
    path = copied("metrics.json")
    damage(path, seed)
    if refusal_of(lambda: read_object(path, RunFigures)) is None:
        assert read_object(path, RunFigures) == json.loads(path.read_text())


@pytest.mark.parametrize("seed", range(40))
def test_evaluations(seed: int, copied: Callable[[str], Path], tmp_path: Path) -> None:
    folders = [copied("eval"), copied("other")]
    damage(folders[0] / "metrics.json", seed)
    refusal = refusal_of(lambda: compare(folders, tmp_path / "out"))
    assert (tmp_path / "out/comparison.json").exists() is (refusal is None)


@pytest.mark.parametrize("seed", range(60))
def test_curves(seed: int, copied: Callable[[str], Path]) -> None:
    path = copied("metrics.jsonl")
    lines = path.read_bytes().splitlines()
    if seed % 2:
        lines[seed % len(lines)] = damaged_json(lines[seed % len(lines)], seed)
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(damaged_bytes(path.read_bytes(), seed // 2))
    before = path.read_bytes()
    if refusal_of(lambda: MetricsLog(path, "fit", 3)):
        assert path.read_bytes() == before
        return
    rows = read_metrics_log(path)
    assert all(row["step"] <= 3 or row["stage"] != "fit" for row in rows)
    curve_chart(rows, "fit", ["loss"], "loss", logarithmic=True)


@pytest.mark.parametrize("seed", range(40))
def test_presets(seed: int, copied: Callable[[str], Path]) -> None:
    path = copied("preset.json")
    damage(path, seed)
    hints = {"output_dir", "data"}
    refusal_of(
        lambda: preset_values(FitArguments, read_preset(str(path), path.parent)["arguments"], "p", "mnif", hints)
    )


@pytest.mark.parametrize("seed", range(20))
def test_samples_are_not_added_to_a_damaged_record(
    seed: int, copied: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(copied("model")), "--output_dir", str(tmp_path / "out"), "--num_samples", "1"]
    assert main([*command, "--num_inference_steps", "1"]) == 0
    damage(tmp_path / "out/samples.json", seed)
    code = main([*command, "--num_inference_steps", "1"])
    assert code in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) == (code == 2)


@pytest.mark.parametrize("seed", range(40))
def test_statistics(seed: int, tmp_path: Path) -> None:
    path, protocol = tmp_path / "statistics.npz", {"extractor": "lite0"}
    save_moments(path, moments_of(np.random.default_rng(0).standard_normal((9, 3))), protocol)
    if seed % 2:
        path.write_bytes(damaged_bytes(path.read_bytes(), seed // 2))
    else:
        with np.load(path) as file:
            arrays = dict(file)
        text = damaged_json(json.dumps(protocol | {"size": "3"}).encode(), seed // 2)
        np.savez(path, **arrays | {"protocol": np.str_(text.decode("latin-1"))})
    refusal_of(lambda: load_moments(path, protocol))


@pytest.mark.parametrize(
    "change",
    [
        {"mu": np.array([np.nan, 0, 0])},
        {"mu": np.zeros((3, 1))},
        {"sigma": np.eye(2)},
        {"sigma": np.full((3, 3), "a")},
        {"num": np.array(1)},
        {"num": np.array("a")},
        {"num": np.array([])},
        {"protocol": np.array(3)},
        {"protocol": np.array(["a", "b"])},
    ],
    ids=str,
)
def test_statistics_of_another_form_are_refused(change: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    save_moments(path, moments_of(np.random.default_rng(0).standard_normal((9, 3))), {})
    with np.load(path) as file:
        np.savez(path, **dict(file) | change)
    assert refusal_of(lambda: load_moments(path, {}))


@pytest.mark.parametrize("seed", range(50))
def test_latent_tables(seed: int, copied: Callable[[str], Path]) -> None:
    path = copied("latents.safetensors")
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    if refusal_of(lambda: LatentTable.load(path)) is None:
        table = LatentTable.load(path)
        assert table.latents.isfinite().all()
        assert len(set(table.ids)) == len(table.ids) == len(table.latents) == len(table.held_out)


TABLES: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, Any]]] = {
    "NaN": lambda t: {"latents": t["latents"].index_fill(0, torch.tensor([4]), float("nan"))},
    "three dimensions": lambda t: {"latents": t["latents"][None]},
    "one dimension": lambda t: {"latents": t["latents"][:, 0]},
    "no rows": lambda t: {"latents": t["latents"][:0]},
    "no numbers": lambda t: {"latents": t["latents"][:, :0]},
    "fewer rows than ids": lambda t: {"latents": t["latents"][:9]},
    "more rows than ids": lambda t: {"latents": torch.zeros(11, 12)},
    "another dimension": lambda t: {"latents": torch.zeros(10, 13)},
    "double": lambda t: {"latents": t["latents"].double()},
    "whole numbers": lambda t: {"latents": t["latents"].int()},
    "a longer mask": lambda t: {"held_out": torch.zeros(11, dtype=torch.uint8)},
    "a mask of floats": lambda t: {"held_out": t["held_out"].float()},
    "a mask of twos": lambda t: {"held_out": t["held_out"] * 2},
    "a square mask": lambda t: {"held_out": t["held_out"][None]},
    "offsets below zero": lambda t: {"id_offsets": t["id_offsets"] - 1},
    "huge offsets": lambda t: {"id_offsets": t["id_offsets"] * 10**15},
    "offsets that fall": lambda t: {"id_offsets": t["id_offsets"].flip(0)},
    "offsets of floats": lambda t: {"id_offsets": t["id_offsets"].float()},
    "bytes left over": lambda t: {"id_bytes": torch.zeros(500, dtype=torch.uint8)},
    "an id twice": lambda t: {"id_bytes": t["id_bytes"].fill_(97)},
    "no UTF-8": lambda t: {"id_bytes": t["id_bytes"].fill_(255)},
    "no ids": lambda t: {"id_bytes": None},
    "no mask": lambda t: {"held_out": None},
}


@pytest.mark.parametrize("change", TABLES)
def test_latent_tables_of_another_form_are_refused(change: str, copied: Callable[[str], Path]) -> None:
    path = copied("latents.safetensors")
    table = LatentTable.load(path)
    tensors = load_file(path)
    tensors = {name: each for name, each in (tensors | TABLES[change](tensors)).items() if each is not None}
    metadata = {"format": "mnif-latents/1", "fingerprint": table.fingerprint, "data": "x"}
    save_file({name: each.contiguous() for name, each in tensors.items()}, path, metadata)
    assert "damaged latent table" in (refusal_of(lambda: LatentTable.load(path, table.fingerprint, 12)) or "")


@pytest.mark.parametrize("missing", ["format", "fingerprint", "data"])
def test_latent_tables_without_an_entry_are_refused(missing: str, copied: Callable[[str], Path]) -> None:
    path = copied("latents.safetensors")
    metadata = {"format": "mnif-latents/1", "fingerprint": "f", "data": "x"}
    save_file(load_file(path), path, {name: each for name, each in metadata.items() if name != missing})
    assert missing in (refusal_of(lambda: LatentTable.load(path)) or "")


def test_of_a_key_that_occurs_twice_the_last_one_counts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1, "a": 2}')
    assert read_json(tmp_path / "a.json") == {"a": 2}


def test_files_that_are_too_large_or_no_files_are_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("w") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="bytes; a file of this kind has"):
        read_json(tmp_path / "large.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="not a file"):
        read_json(tmp_path / "folder.json")
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "none.json")
