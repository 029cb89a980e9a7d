"""Damaged and hostile profiles of held-out instances."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mnif.data.batches import ArrayDataset
from mnif.latents.calibration import TrainingInstances, fit_profile
from mnif.latents.inference import infer_latents
from mnif.latents.profile import PROFILE, Profile, load_profile
from mnif.signals.registry import signal_of_model
from tests.conftest import small_decoder, small_encoder
from tests.hostile.conftest import refusal_of
from tests.hostile.mutators import damaged_bytes, damaged_json


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with a profile of 40 pictures of noise."""
    folder = tmp_path_factory.mktemp("profiled")
    decoder, draw = small_decoder(), np.random.default_rng(0)
    signal = signal_of_model(decoder)
    learned, held_out = (
        ArrayDataset(images=torch.from_numpy(draw.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8))) for _ in range(2)
    )
    trained = TrainingInstances(learned, [str(each) for each in range(40)])
    latents = torch.cat([*infer_latents(decoder, signal, held_out, small_encoder(), 0)])
    fit_profile(decoder, signal, trained, held_out, trained.groups, latents, "noise").save(folder)
    return folder


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def judged(model: Path) -> Profile:
    """Loads a profile, and judges by it: whatever is accepted gives p-values."""
    profile = load_profile(model, small_decoder())
    values = np.zeros((2, 16, 16, 3), np.float32)
    scored = profile.score(np.zeros((2, 12)), np.full((2, 16), 0.01), profile.looks(values))
    assert ((scored.p_values > 0) & (scored.p_values <= 1)).all()
    return profile


@pytest.mark.parametrize("seed", range(40))
def test_profile_json(seed: int, model: Path) -> None:
    path = model / PROFILE / "profile.json"
    path.write_bytes(damaged_json(path.read_bytes(), seed))
    refusal_of(lambda: judged(model))


@pytest.mark.parametrize("seed", range(40))
def test_profile_arrays(seed: int, model: Path) -> None:
    path = model / PROFILE / "arrays.safetensors"
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    refusal_of(lambda: judged(model))


def test_wrong_arrays_are_refused(model: Path) -> None:
    path = model / PROFILE / "arrays.safetensors"
    arrays = load_file(path)
    judged(model)
    for name, array in arrays.items():
        wrong = {"nan": np.full_like(array, np.nan), "axis": array[..., None].copy(), "whole": array.astype(np.int64)}
        if name not in ("ranks", "alarms", "reference_latents", "reference_scores"):
            wrong["short"] = array[:-1].copy()
        for change, other in wrong.items():
            save_file(arrays | {name: other}, path)
            refusal = refusal_of(lambda: judged(model))
            assert refusal, (name, change)
            assert f": {name} " in refusal, (name, change)
        save_file({other: each for other, each in arrays.items() if other != name}, path)
        assert "damaged profile" in (refusal_of(lambda: judged(model)) or "")
    for name in ("number_std", "residual_std", "tail_scale", "weights"):
        save_file(arrays | {name: -arrays[name]}, path)
        assert f"{name} holds numbers that are not positive" in (refusal_of(lambda: judged(model)) or "")
    for name in ("ranks", "alarms"):
        save_file(arrays | {name: arrays[name][..., ::-1].copy()}, path)
        assert f"{name} is not in order" in (refusal_of(lambda: judged(model)) or "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patches": [1, 16]}, "patches [1, 16] are not those of a grid [16, 16]"),
        ({"grid": []}, "grid"),
        ({"grid": [10**9, 10**9]}, "grid[0]: Expected"),
        ({"grid": [80, 16]}, "patches [4, 4] are not those of a grid [80, 16]"),
        ({"scores": ["residual", "patch"]}, "scores of another version of mnif; `mnif monitor --fit --model"),
        ({"format": "mnif-profile/2"}, "scores of another version of mnif; `mnif monitor --fit --model"),
        ({"kinds": ["noise"]}, "--data DATA` makes the profile anew"),
        ({"false_alarm_rate": 1}, "false_alarm_rate"),
        ({"fingerprints": []}, "fingerprints"),
        ({"fingerprints": ["0" * 64]}, "the profile of another decoder"),
    ],
)
def test_wrong_records_are_refused(changes: dict[str, object], message: str, model: Path) -> None:
    path = model / PROFILE / "profile.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert message in (refusal_of(lambda: judged(model)) or "")
