import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mnif.utils.errors import UserError
from mnif.utils.process import Processes
from mnif.utils.resumable import Chunks, chunks_of, compute_in_chunks

SIZE = 64
COUNT = 3 * SIZE + 5


def squares(tmp_path: Path, arguments: list[int], stop_at: int | None = None) -> np.ndarray:
    """Rows [i², -i²]; notes the first row of every chunk asked for, and is stopped at one of them."""

    def compute(rows: range) -> np.ndarray:
        if rows.start == stop_at:
            raise KeyboardInterrupt
        arguments.append(rows.start)
        return np.array([[row**2, -(row**2)] for row in rows])

    path, chunks = tmp_path / "whole.npy", tmp_path / "chunks"
    return compute_in_chunks(path, chunks, COUNT, 2, SIZE, lambda rows: rows, compute, Processes(), "squares")


def test_a_killed_computation_continues_with_the_missing_chunks(tmp_path: Path) -> None:
    arguments: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        squares(tmp_path, arguments, stop_at=2 * SIZE)
    assert arguments == [0, SIZE]
    found = squares(tmp_path, arguments)
    assert arguments == [0, SIZE, 2 * SIZE, 3 * SIZE]
    np.testing.assert_array_equal(found[:, 0], np.arange(COUNT, dtype=np.float32) ** 2)
    np.testing.assert_array_equal(found[:, 1], -found[:, 0])
    assert squares(tmp_path, arguments).shape == (COUNT, 2)
    assert len(arguments) == 4  # all was there
    assert {path.name for path in tmp_path.iterdir()} == {"whole.npy", ".seals"}


@pytest.mark.parametrize("value", [np.nan, 3.0])
def test_rows_that_were_changed_since_are_computed_anew(
    tmp_path: Path, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        squares(tmp_path, arguments, stop_at=2 * SIZE)
    path = tmp_path / "chunks/000000064.safetensors"
    rows = load_file(path)["rows"]
    rows[5, 1] = value
    save_file({"rows": rows}, path)
    found = np.array(squares(tmp_path, arguments))
    assert arguments == [0, SIZE, SIZE, 2 * SIZE, 3 * SIZE]
    assert f"{path}: not known to be as it was written; made anew" in capsys.readouterr().out
    np.testing.assert_array_equal(found[:, 0], np.arange(COUNT, dtype=np.float32) ** 2)
    whole = np.load(tmp_path / "whole.npy", mmap_mode="r+")
    whole[7, 1] = value
    whole.flush()
    np.testing.assert_array_equal(squares(tmp_path, arguments), found)
    assert len(arguments) == 9


def test_chunks_are_loaded_while_others_are_computed(tmp_path: Path) -> None:
    loaded: list[int] = []
    seen: list[int] = []

    def load(rows: range) -> range:
        loaded.append(rows.start)
        return rows

    def compute(rows: range) -> np.ndarray:
        for _ in range(1000):  # at most ten seconds for the next chunk to be asked for
            if len(loaded) > len(seen) + 1 or rows.stop == COUNT:
                break
            time.sleep(0.01)
        seen.append(len(loaded))
        return np.zeros((len(rows), 1))

    compute_in_chunks(tmp_path / "x.npy", tmp_path / "p", COUNT, 1, SIZE, load, compute, Processes(), "zeros")
    assert seen == [2, 3, 4, 4]


def test_rows_that_are_no_numbers_are_named_and_not_kept(tmp_path: Path) -> None:
    def compute(rows: range) -> np.ndarray:
        return np.array([[np.nan if row == SIZE + 3 else 1.0] for row in rows])

    with pytest.raises(UserError, match=f"features of x: row {SIZE + 3} comes out as NaN"):
        compute_in_chunks(
            tmp_path / "x.npy", tmp_path / "p", COUNT, 1, SIZE, lambda r: r, compute, Processes(), "features of x"
        )
    assert not (tmp_path / "x.npy").exists()


def test_chunks_of_another_search_go_and_nothing_else_does(tmp_path: Path) -> None:
    folder = tmp_path / "pairs"
    chunks = Chunks(folder, "latents", {"seed": 0})
    chunks.save(0, np.zeros((2, 3), dtype=np.float32))
    (folder / "notes.txt").write_text("mine")
    (folder / "mine.safetensors").write_text("mine")
    assert 0 in Chunks(folder, "latents", {"seed": 0})
    (folder / "search.json").write_text("[" * 9)  # cut off
    chunks = Chunks(folder, "latents", {"seed": 1})
    assert 0 not in chunks
    assert not chunks
    for start, value in ((2, 5), (0, 4)):
        chunks.save(start, np.full((3, 2), value).T)  # not contiguous
    np.testing.assert_array_equal(chunks.load(2), np.full((2, 3), 5))
    np.testing.assert_array_equal(chunks.all((0, 2)), np.repeat([4, 5], 2)[:, None].repeat(3, axis=1))
    chunks.remove()
    assert sorted(path.name for path in folder.iterdir()) == ["mine.safetensors", "notes.txt"]


def test_rows_are_cut_into_chunks_of_one_size() -> None:
    assert chunks_of(range(64, 150), 64) == [range(64, 128), range(128, 150)]
    assert chunks_of(range(128), 64) == [range(64), range(64, 128)]
    assert chunks_of(range(0), 64) == []
