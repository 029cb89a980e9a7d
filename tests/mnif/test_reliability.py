"""What docs/reliability.md promises of a power cut: content reaches the disk before its name does."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from latent_prior.commands.prior import add_prior
from latent_prior.pipeline import MNIFPipeline
from latent_prior.pipeline_folder import save_index
from mnif.cli import main
from mnif.utils import files
from mnif.utils.files import folder_written_atomically, remove_folder, write_json, written_atomically
from mnif.utils.pixels import save_image
from tests.mnif.test_loop import run


class Disk:
    """What a power cut would leave: contents and names as they were when last flushed."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.contents: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.early: list[Path] = []
        fsync, replace, exchanged = os.fsync, os.replace, files._exchanged

        def flush(handle: int) -> None:
            fsync(handle)
            status = os.fstat(handle)
            if stat.S_ISDIR(status.st_mode):
                with os.scandir(handle) as entries:
                    self.names[status.st_ino] = {entry.name: entry.inode() for entry in entries}
            else:
                self.contents[status.st_ino] = Path(f"/proc/self/fd/{handle}").read_bytes()

        def checked_replace(source: Path, target: Path) -> None:
            self.early += self.lost(Path(source))
            replace(source, target)

        def checked_exchange(one: Path, other: Path) -> bool:
            self.early += self.lost(one)
            return exchanged(one, other)

        patch.setattr(os, "fsync", flush)
        patch.setattr(os, "replace", checked_replace)
        patch.setattr(files, "_exchanged", checked_exchange)

    def lost(self, path: Path) -> list[Path]:
        """What of a file, or of a folder and all that is in it, would not be there as it is now."""
        number = path.stat().st_ino
        if path.is_file():
            return [] if self.contents.get(number) == path.read_bytes() else [path]
        lost, kept = [], self.names.get(number, {})
        for entry in path.iterdir():
            lost += self.lost(entry) if kept.get(entry.name) == entry.stat().st_ino else [entry]
        return lost


pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see what is flushed")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


def test_files_and_the_folders_made_for_them(disk: Disk, tmp_path: Path) -> None:
    for _ in range(2):
        write_json(tmp_path / "new/newer/figures.json", {"psnr": 30})
        assert not disk.lost(tmp_path)
    with folder_written_atomically(tmp_path / "new/model") as temporary:
        (temporary / "decoder").mkdir()
        (temporary / "decoder/weights").write_text("weights")
    assert not disk.lost(tmp_path)
    assert not disk.early
    save_image(tmp_path / "new/picture.png", np.zeros((4, 4, 3), dtype=np.uint8))
    assert disk.lost(tmp_path) == [tmp_path / "new/picture.png"]  # pictures are left to the system


def test_checkpoints_best_weights_and_curves(disk: Disk, tmp_path: Path) -> None:
    run(tmp_path / "run", checkpointing_steps=2)
    assert disk.lost(tmp_path / "run") == []
    assert disk.early == []


def test_a_checkpoint_has_its_name_when_the_curves_up_to_it_are_safe(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, curves, safe = Path.rename, tmp_path / "run/metrics.jsonl", []

    def checked(self: Path, target: Path) -> Path:
        if Path(target).name.startswith("checkpoint-") and curves.exists():
            safe.append(disk.lost(curves) == [])
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", checked)
    run(tmp_path / "run")
    assert safe == [True, True, True]


def test_a_model_folder_and_its_index(disk: Disk, pipeline: MNIFPipeline, tmp_path: Path) -> None:
    for _ in range(2):
        add_prior(tmp_path / "model", pipeline)
        assert disk.lost(tmp_path) == []
    before = (tmp_path / "model/model_index.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline), "to_json_string", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_index(tmp_path / "model", pipeline)
    assert (tmp_path / "model/model_index.json").read_text() == before


@pytest.mark.slow
def test_a_run_of_both_stages_loses_pictures_at_most(disk: Disk, picture_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fit_and_prior(picture_folder, folder)
    assert {path.suffix for path in disk.lost(folder)} <= {".png"}
    assert all(".png." in path.name for path in disk.early)


@pytest.mark.slow
def test_two_runs_write_the_same_tensors(picture_folder: Path, tmp_path: Path) -> None:
    files = []
    for name in ("one", "two"):
        fit_and_prior(picture_folder, tmp_path / name)
        found = (tmp_path / name).rglob("*.safetensors")
        files.append({path.relative_to(tmp_path / name): path.read_bytes() for path in found})
    assert Path("latents.safetensors") in files[0]
    assert files[0] == files[1]


def fit_and_prior(pictures: Path, folder: Path) -> None:
    """Six steps of each."""
    fit = ["fit", "--data", str(pictures), "--output_dir", str(folder), "--resolution", "16", "--cells", "2"]
    fit += ["--num_bases", "8", "--width", "8", "--depth", "1", "--latent_dim", "12", "--refinement_steps", "2"]
    short = ["--max_train_steps", "6", "--validation_steps", "3", "--checkpointing_steps", "3", "--compile", "off"]
    assert main([*fit, *short, "--train_batch_size", "16"]) == 0
    assert main(["prior", "--run", str(folder), "--width", "16", "--depth", "1", *short]) == 0


def test_sampling_flushes_once_when_all_samples_are_there(
    disk: Disk, pipeline: MNIFPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    there = []
    monkeypatch.setattr(os, "sync", lambda: there.append(len([*(tmp_path / "drawn").glob("0*.png")])))
    command = ["sample", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "drawn"), "--grid", "0"]
    assert main([*command, "--num_samples", "70", "--num_inference_steps", "2"]) == 0
    assert there == [70]


def test_a_folder_is_never_missing_while_it_is_replaced(tmp_path: Path) -> None:
    """A second process looks all the time."""
    path = tmp_path / "model"
    with folder_written_atomically(path) as temporary:
        (temporary / "weights").write_text("0")
    (tmp_path / "other").mkdir()
    if not files._exchanged(tmp_path / "other", path):
        pytest.skip("this file system cannot exchange two names")
    files._exchanged(tmp_path / "other", path)
    watch = (
        "import os, sys\nseen = missing = 0\nprint('ready', flush=True)\n"
        "while not os.path.exists(sys.argv[2]):\n"
        "    seen += 1\n    missing += not os.path.exists(sys.argv[1])\n"
        "print(seen, missing)"
    )
    command = [sys.executable, "-c", watch, str(path / "weights"), str(tmp_path / "done")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == "ready\n"
        for number in range(300):
            with folder_written_atomically(path) as temporary:
                (temporary / "weights").write_text(str(number))
        (tmp_path / "done").touch()
        seen, missing = map(int, watcher.stdout.read().split())
    assert seen > 300
    assert missing == 0


def test_without_an_exchange_a_folder_is_replaced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    for text in ("old", "new"):
        with folder_written_atomically(tmp_path / "model") as temporary:
            (temporary / "weights").write_text(text)
    assert (tmp_path / "model/weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_removed_folder_is_gone_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/weights").write_text("x")
    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", lambda folder: 1 / 0)  # as if killed here
        with pytest.raises(ZeroDivisionError):
            remove_folder(tmp_path / "checkpoint-4")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    assert left.suffix == ".tmp"
    assert (left / "weights").exists()


def test_a_flush_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def failing(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="Input/output"), written_atomically(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights"]
