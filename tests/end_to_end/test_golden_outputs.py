"""scripts/golden_outputs.py: what is the same has one hash, what differs has another."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from scripts.golden_outputs import COMMANDS, hashes_of_folder, main


def write_run(folder: Path, names: tuple[str, ...] = ("a", "b"), psnr: float = 20.0, seconds: float = 1.0) -> Path:
    (folder / "model/checkpoints").mkdir(parents=True)
    (folder / "bundle/device").mkdir(parents=True)
    save_file({name: np.full(3, ord(name), np.float32) for name in names}, folder / "model/weights.safetensors")
    metrics = {"psnr": psnr, "train_seconds": seconds, "of": {"path": f"{folder}/model", "command": str(folder)}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "seconds": seconds}) + "\n" for n in (1, 2)))
    (folder / "model/checkpoints/state.bin").write_text(str(seconds))
    (folder / "bundle/device/tool.bin").write_text(str(seconds))
    return folder


def test_times_paths_and_the_order_of_tensors_do_not_count(tmp_path: Path) -> None:
    first = hashes_of_folder(write_run(tmp_path / "first"))
    second = hashes_of_folder(write_run(tmp_path / "second", names=("b", "a"), seconds=2.0))
    assert first == second
    assert set(first) == {"metrics.json", "metrics.jsonl", "model/weights.safetensors"}


def test_what_differs_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, psnr in (("first", 20.0), ("second", 21.0)):
        write_run(tmp_path / name, psnr=psnr)
        assert main(["--output_dir", str(tmp_path / name), "--hash_only"]) == 0
    capsys.readouterr()
    compare = ["--hash_only", "--compare", str(tmp_path / "first/hashes.json")]
    assert main(["--output_dir", str(tmp_path / "second"), *compare]) == 1
    assert "differs: metrics.json\n" in capsys.readouterr().out
    assert main(["--output_dir", str(tmp_path / "first"), *compare]) == 0
    assert "nothing differs" in capsys.readouterr().out


def test_the_chain_is_whole() -> None:
    commands = {line.split()[0] for line in COMMANDS.strip().splitlines()}
    assert commands == {"fit", "prior", "distill", "sample", "export", "eval", "encode"}
