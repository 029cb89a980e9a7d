import errno
from pathlib import Path

import pytest

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
