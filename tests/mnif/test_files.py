import errno
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from latent_prior.pipeline import MNIFPipeline
from mnif.utils.files import folder_written_atomically, write_errors_of, write_json, written_atomically
from mnif.utils.json_files import read_json


def test_json_that_is_written_can_be_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf"), "d": (2, None)}})
    assert read_json(tmp_path / "a.json") == {"a": [None, 1.5], "b": {"c": None, "d": [2, None]}}


def test_file_stays_old_when_the_disk_fills(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def fill() -> None:
        with written_atomically(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        fill()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights"]


@pytest.mark.parametrize(
    ("error", "number", "named"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC, "weights"),
        (OSError(errno.ENOSPC, "No space left on device", "what was copied"), errno.ENOSPC, "weights"),
        (OSError(errno.EACCES, "Permission denied", "what was copied"), errno.EACCES, "what was copied"),
        (SafetensorError("Error while serializing: I/O error: disk quota (os error 122)"), errno.EDQUOT, "weights"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), errno.EIO, "weights"),
        (RuntimeError("basic_ios::clear: iostream error"), errno.EIO, "weights"),
    ],
)
def test_errors_of_writing_are_of_one_kind_and_name_the_file(
    tmp_path: Path, error: Exception, number: int, named: str
) -> None:
    def fail() -> None:
        with written_atomically(tmp_path / "weights") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(OSError, match=named) as raised:
        fail()
    assert (raised.value.errno, Path(raised.value.filename).name) == (number, named)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="of a mistake"), written_atomically(tmp_path / "weights"):
        raise RuntimeError("of a mistake")
    with pytest.raises(PermissionError) as raised, write_errors_of(tmp_path / "a", tmp_path / ".a.tmp"):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / ".a.tmp"))
    assert raised.value.filename == str(tmp_path / "a")  # not the temporary name


def test_folder_is_old_or_new_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "a").write_text("old")

    def interrupted() -> None:
        with folder_written_atomically(path) as temporary:
            (temporary / "a").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "a").read_text() == "old"
    with folder_written_atomically(path) as temporary:
        (temporary / "b").write_text("new")
    assert [entry.name for entry in path.iterdir()] == ["b"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("left", ["tmp", "old"])
def test_what_a_killed_process_left_of_a_folder_goes_with_the_next(tmp_path: Path, left: str) -> None:
    (tmp_path / "model").mkdir()
    others = [".model.notes.tmp", ".model.v2.ab3d_f9h.tmp", "model.ab3d_f9h.tmp"]
    for name in (*others, f".model.ab3d_f9h.{left}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("old")
    (tmp_path / ".model.12.tmp").write_text("half a file")
    with folder_written_atomically(tmp_path / "model") as temporary:
        (temporary / "a").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", *others])
    assert (tmp_path / "model/a").read_text() == "new"


def test_a_folder_whose_place_was_never_taken_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames, or stopped there by Ctrl-C, where names cannot be exchanged at once."""
    monkeypatch.setattr("mnif.utils.files._exchanged", lambda one, other: False)
    path = tmp_path / "model"
    (tmp_path / ".model.ab3d_f9h.old").mkdir()
    (tmp_path / ".model.ab3d_f9h.old/a").write_text("old")
    rename = Path.rename

    def stopped(source: Path, target: Path) -> Path:
        if source.suffix == ".tmp":
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), folder_written_atomically(path) as temporary:
            (temporary / "a").write_text("new")
        assert (path / "a").read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_model_survives_a_disk_that_fills_during_a_save(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the write of the weights fails half-way."""
    pipeline.save_pretrained(tmp_path)
    program = (
        "import resource, sys; from pathlib import Path; import torch; "
        "from mnif import cli; from mnif.models.io import save_component; "
        "from mnif.models.mnif_model import MNIFModel\n"
        "def main(_):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    save_component(Path(sys.argv[1]), 'decoder', MNIFModel())\n"
        "cli.COMMANDS['save'] = ('__main__', '', '')\n"
        "sys.exit(cli.main(['save']))"
    )
    before = (tmp_path / "decoder/diffusion_pytorch_model.safetensors").read_bytes()
    done = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"mnif save: {tmp_path}/decoder: ")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "decoder/diffusion_pytorch_model.safetensors").read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "decoder",
        "denoiser",
        "model_index.json",
        "pipeline.py",
        "scheduler",
    ]
