import errno
import subprocess
import sys
from pathlib import Path

import pytest

from latent_prior.pipeline import MNIFPipeline
from mnif.files import folder_written_atomically, written_atomically


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


def test_model_survives_a_disk_that_fills_during_a_save(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the write of the weights fails half-way."""
    pipeline.save_pretrained(tmp_path)
    program = (
        "import resource, sys; from pathlib import Path; import torch; "
        "from mnif import cli; from mnif.model_folder import save_component; from mnif.modeling import MNIFModel\n"
        "def save(_):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "    save_component(Path(sys.argv[1]), 'decoder', MNIFModel())\n"
        "cli.COMMANDS['save'] = ('__main__:save', '')\n"
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
        "scheduler",
    ]
