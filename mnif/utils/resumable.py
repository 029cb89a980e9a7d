"""Rows that are worked out a chunk at a time and wait on disk until all are there: a stopped command loses one chunk.

Chunks have the same bounds whatever the number of processes, so rows come out the same to the last bit. Processes on
several machines need a folder that all of them see.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from mnif.utils.errors import UserError
from mnif.utils.files import remove_leftovers, write_json, written_atomically
from mnif.utils.json_files import read_json
from mnif.utils.process import Processes, progress_bar

T = TypeVar("T")


def chunks_of(rows: range, size: int) -> list[range]:
    """Cuts ``rows`` into ranges of ``size``; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class Chunks:
    """The chunks that are there already, each a file named by its first row.

    Args:
        folder: where they wait; it may be missing.
        name: of the array in each file.
        search: what the rows depend on, written beside them; chunks of another search are removed. None: the folder
            is of one search alone.
    """

    def __init__(self, folder: Path, name: str, search: dict[str, Any] | None = None):
        self.folder, self.name = folder, name
        self._record = folder / "search.json"
        if search is not None:
            if not self._record.exists() or read_json(self._record) != search:
                self.remove()
            write_json(self._record, search)

    def __contains__(self, start: int) -> bool:
        return self._path(start).exists()

    def __bool__(self) -> bool:
        return bool(self._paths())

    def save(self, start: int, rows: np.ndarray) -> None:
        """Keeps the chunk that begins at row ``start``."""
        with written_atomically(self._path(start)) as temporary:
            save_file({self.name: np.ascontiguousarray(rows)}, temporary)

    def load(self, start: int) -> np.ndarray:
        """Reads the chunk that begins at row ``start``."""
        return load_file(self._path(start))[self.name]

    def all(self) -> np.ndarray:
        """Reads all rows in order."""
        return np.concatenate([load_file(path)[self.name] for path in self._paths()])

    def remove(self) -> None:
        """Forgets everything, once it has been written elsewhere; the folder goes unless others have files there."""
        for path in (*self._paths(), self._record):
            path.unlink(missing_ok=True)
        remove_leftovers(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]" * 9 + ".safetensors"))

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"


def compute_in_chunks(
    path: Path,
    folder: Path,
    count: int,
    width: int,
    chunk_size: int,
    load: Callable[[range], T],
    compute: Callable[[T], np.ndarray],
    processes: Processes,
    description: str,
) -> np.ndarray:
    """Computes ``compute(load(rows))`` of all rows into a file, unless the file is there already.

    A process holds one chunk and loads the next one meanwhile.

    Args:
        path: of the ``.npy`` file, which stands for its content.
        folder: where chunks wait; nothing else may use it.
        count: rows.
        width: numbers in a row.
        chunk_size: rows in a chunk.
        load: rows → what computing takes; called in another thread.
        compute: that → [len(rows), width] numbers.
        processes: who share the work; every one of them must call this.
        description: of the progress bar.

    Returns:
        [count, width] float32, memory-mapped, not to be written to.

    Raises:
        UserError: a row comes out as NaN or infinity.
    """
    chunks, kept = chunks_of(range(count), chunk_size), Chunks(folder, "rows")
    if not path.exists():
        missing = [chunk for chunk in processes.share(chunks) if chunk.start not in kept]
        with progress_bar(total=count, desc=description, unit="row", disable=not processes.is_main) as bar:
            bar.update(count - sum(map(len, missing)) if processes.count == 1 else 0)
            for chunk, loaded in _loaded_ahead(load, missing):
                rows = np.asarray(compute(loaded), dtype=np.float32)
                _check_finite(rows, chunk, description)
                kept.save(chunk.start, rows)
                bar.update(len(chunk) * processes.count)
    processes.wait()
    if processes.is_main and not path.exists():
        with written_atomically(path) as temporary:
            whole = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, width))
            for chunk in chunks:
                whole[chunk.start : chunk.stop] = kept.load(chunk.start)
            whole.flush()
            del whole
        kept.remove()
    processes.wait()
    return np.load(path, mmap_mode="r")


def _loaded_ahead(load: Callable[[range], T], chunks: Sequence[range]) -> Iterator[tuple[range, T]]:
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(load, chunks[0]) if chunks else None
        for number, chunk in enumerate(chunks):
            assert ahead is not None
            loaded = ahead.result()
            if number + 1 < len(chunks):
                ahead = thread.submit(load, chunks[number + 1])
            yield chunk, loaded


def _check_finite(rows: np.ndarray, chunk: range, description: str) -> None:
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise UserError(f"{description}: row {chunk[int(bad[0])]} comes out as NaN or infinity; look at what it is of")
