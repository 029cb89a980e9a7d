"""Rows computed piece by piece, by one process or several, and kept on disk: a killed evaluation loses one piece.

Pieces have the same bounds whatever the number of processes, so rows come out the same to the last bit. A process
holds one piece and loads the next one meanwhile; the whole is memory-mapped. Processes on several machines need a
folder that all of them see.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from latent_prior.sampling import CHUNK
from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically
from mnif.utils.process import Processes, progress_bar

SHARD = CHUNK  # so that a shard of samples is drawn as `mnif sample` draws it


T = TypeVar("T")


def computed_in_shards(
    path: Path,
    pieces: Path,
    count: int,
    width: int,
    load: Callable[[range], T],
    compute: Callable[[T], np.ndarray],
    processes: Processes,
    description: str,
) -> np.ndarray:
    """``compute(load(rows))`` of all rows, memory-mapped; at once if the file is there already.

    Args:
        path: of the ``.npy`` file, which stands for its content.
        pieces: folder where they wait; no other evaluation may use it.
        count: rows.
        width: numbers in a row.
        load: rows → what computing takes; called in another thread for the next piece while one is computed.
        compute: that → [len(rows), width] numbers.
        processes: who share the work; every one of them must call this.
        description: of the progress bar.

    Returns:
        [count, width] float32, not to be written to.

    Raises:
        UserError: a row comes out as NaN or infinity.
    """
    shards = [range(start, min(start + SHARD, count)) for start in range(0, count, SHARD)]
    if not path.exists():
        missing = [rows for rows in processes.share(shards) if not _piece(pieces, rows).exists()]
        with progress_bar(total=count, desc=description, unit="row", disable=not processes.is_main) as bar:
            bar.update(count - sum(map(len, missing)) if processes.count == 1 else 0)
            for rows, loaded in _loaded_ahead(load, missing):
                values = np.asarray(compute(loaded), dtype=np.float32)
                _check(values, rows, description)
                with written_atomically(_piece(pieces, rows)) as temporary, temporary.open("wb") as file:
                    np.save(file, values)
                bar.update(len(rows) * processes.count)
    processes.wait()
    if processes.is_main and not path.exists():
        _join(path, pieces, shards, (count, width))
    processes.wait()
    return np.load(path, mmap_mode="r")


def _loaded_ahead(load: Callable[[range], T], shards: Sequence[range]) -> Iterator[tuple[range, T]]:
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load, shards[0]) if shards else None
        for number, rows in enumerate(shards):
            assert ahead is not None
            loaded = ahead.result()
            if number + 1 < len(shards):
                ahead = thread.submit(load, shards[number + 1])
            yield rows, loaded


def _join(path: Path, pieces: Path, shards: Sequence[range], shape: tuple[int, int]) -> None:
    with written_atomically(path) as temporary:
        whole = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=shape)
        for rows in shards:
            whole[rows.start : rows.stop] = np.load(_piece(pieces, rows), allow_pickle=False)
        whole.flush()
        del whole
    shutil.rmtree(pieces, ignore_errors=True)


def _piece(pieces: Path, rows: range) -> Path:
    return pieces / f"{rows.start:09d}.npy"


def _check(values: np.ndarray, rows: range, description: str) -> None:
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise UserError(f"{description}: row {rows[int(bad[0])]} comes out as NaN or infinity; look at what it is of")
