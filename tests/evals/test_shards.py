import time
from pathlib import Path

import numpy as np
import pytest

from evals.shards import SHARD, computed_in_shards
from mnif.utils.errors import UserError
from mnif.utils.process import Processes

COUNT = 3 * SHARD + 5


def squares(tmp_path: Path, arguments: list[int], stop_at: int | None = None) -> np.ndarray:
    """Rows [i², -i²]; notes the first row of every piece asked for, and is stopped at one of them."""

    def compute(rows: range) -> np.ndarray:
        if rows.start == stop_at:
            raise KeyboardInterrupt
        arguments.append(rows.start)
        return np.array([[row**2, -(row**2)] for row in rows])

    path, pieces = tmp_path / "whole.npy", tmp_path / "pieces"
    return computed_in_shards(path, pieces, COUNT, 2, lambda rows: rows, compute, Processes(), "squares")


def test_a_killed_computation_continues_with_the_missing_pieces(tmp_path: Path) -> None:
    arguments: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        squares(tmp_path, arguments, stop_at=2 * SHARD)
    assert arguments == [0, SHARD]
    found = squares(tmp_path, arguments)
    assert arguments == [0, SHARD, 2 * SHARD, 3 * SHARD]
    np.testing.assert_array_equal(found[:, 0], np.arange(COUNT, dtype=np.float32) ** 2)
    np.testing.assert_array_equal(found[:, 1], -found[:, 0])
    assert squares(tmp_path, arguments).shape == (COUNT, 2)
    assert len(arguments) == 4  # all was there
    assert [path.name for path in tmp_path.iterdir()] == ["whole.npy"]


def test_pieces_are_loaded_while_others_are_computed(tmp_path: Path) -> None:
    loaded: list[int] = []
    seen: list[int] = []

    def load(rows: range) -> range:
        loaded.append(rows.start)
        return rows

    def compute(rows: range) -> np.ndarray:
        for _ in range(1000):  # at most ten seconds for the next piece to be asked for
            if len(loaded) > len(seen) + 1 or rows.stop == COUNT:
                break
            time.sleep(0.01)
        seen.append(len(loaded))
        return np.zeros((len(rows), 1))

    computed_in_shards(tmp_path / "x.npy", tmp_path / "p", COUNT, 1, load, compute, Processes(), "zeros")
    assert seen == [2, 3, 4, 4]


def test_rows_that_are_no_numbers_are_named_and_not_kept(tmp_path: Path) -> None:
    def compute(rows: range) -> np.ndarray:
        return np.array([[np.nan if row == SHARD + 3 else 1.0] for row in rows])

    with pytest.raises(UserError, match=f"features of x: row {SHARD + 3} comes out as NaN"):
        computed_in_shards(
            tmp_path / "x.npy", tmp_path / "p", COUNT, 1, lambda r: r, compute, Processes(), "features of x"
        )
    assert not (tmp_path / "x.npy").exists()
