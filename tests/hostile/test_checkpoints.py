"""Checkpoints that were changed and sealed again by somebody who can write the seal too: nothing is unpickled."""

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnif.training.checkpoints import _seal
from tests.hostile.conftest import refusal_of
from tests.hostile.mutators import damaged_bytes, damaged_json
from tests.hostile.test_models import Bomb
from tests.mnif.test_loop import run


def checkpoint_of(folder: Path) -> Path:
    """The newest checkpoint of a run that was stopped at step 6; there is an older one."""
    with pytest.raises(KeyboardInterrupt):
        run(folder, stop_after=6)
    return sorted((folder / "checkpoints/stage").glob("checkpoint-*"))[-1]


def outcome(folder: Path) -> torch.Tensor | str:
    """The weights at the end, or the line in which the run stops."""
    weights: list[torch.Tensor] = []
    return refusal_of(lambda: weights.append(run(folder))) or weights[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    return run(tmp_path_factory.mktemp("whole") / "run")


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and not path.name.startswith("."))


@pytest.mark.parametrize("seed", range(15))
def test_resealed_damage(seed: int, tmp_path: Path, whole: torch.Tensor) -> None:
    checkpoint = checkpoint_of(tmp_path / "run")
    files = files_of(checkpoint)
    path = files[seed % len(files)]
    change = damaged_json if path.suffix == ".json" else damaged_bytes
    path.write_bytes(change(path.read_bytes(), seed))
    _seal(checkpoint)
    found = outcome(tmp_path / "run")
    assert isinstance(found, str) or found.shape == whole.shape


@pytest.mark.parametrize(
    "bomb",
    [
        lambda path: pickle.dumps(Bomb(path)),
        lambda path: pickle.dumps({"step": 3, "state": Bomb(path), "numpy": np.random.get_state()}),
        lambda path: _torch_bytes({"a": Bomb(path)}, zipped=True),
        lambda path: _torch_bytes({"a": Bomb(path)}, zipped=False),
    ],
    ids=["pickle", "in a dictionary", "in torch's archive", "in torch's old format"],
)
def test_no_checkpoint_is_unpickled(
    bomb: Callable[[Path], bytes], tmp_path: Path, whole: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(tmp_path / "run")
    names = [path for path in files_of(checkpoint) if path.suffix in (".bin", ".pkl", ".pt")]
    assert any("random_states" in path.name for path in names)  # Python's, NumPy's and torch's, which are pickles
    assert any("optimizer" in path.name for path in names)
    for path in names:
        path.write_bytes(bomb(tmp_path / "ran"))
    _seal(checkpoint)
    found = outcome(tmp_path / "run")
    assert not (tmp_path / "ran").exists()
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, whole)  # of the checkpoint before
    assert "it is passed over" in capsys.readouterr().out


def _torch_bytes(content: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


@pytest.mark.parametrize("change", [{"step": "6"}, {"step": -1}, {"losses": None}, {"ema_step": 1.5}, {"seconds": []}])
def test_progress_of_another_type_is_passed_over(
    change: dict[str, Any], tmp_path: Path, whole: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = checkpoint_of(tmp_path / "run")
    path = checkpoint / "progress.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    _seal(checkpoint)
    found = outcome(tmp_path / "run")
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, whole)
    assert f"progress.json: {next(iter(change))}" in capsys.readouterr().out
