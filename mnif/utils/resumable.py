"""Rows that are worked out a chunk at a time and wait on disk until all are there: a stopped command loses one chunk.

Chunks have the same bounds whatever the number of processes, so rows come out the same to the last bit. Processes on
several machines need a folder that all of them see. What a stopped command left is gone on from only where it is, byte
for byte, what was written: its length and SHA-256 are its seal.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from mnif.utils.errors import UserError, printable
from mnif.utils.files import (
    remove_leftovers,
    sha256_of_file,
    write_json,
    written_apart,
    written_atomically,
)
from mnif.utils.json_files import read_json
from mnif.utils.process import Processes, is_main_process, progress_bar

T = TypeVar("T")


def chunks_of(rows: range, size: int) -> list[range]:
    """Cuts ``rows`` into ranges of ``size``; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


SEALS = ".seals"


class Seals:
    """What files held when they were written, so that one that was changed or cut off since is not taken for whole.

    Args:
        folder: the files are below it, and the seals in its hidden folder ``.seals``.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def sound(self, name: str, files: Iterable[Path], tell: bool = True) -> set[Path]:
        """Picks the files that are as they were sealed.

        Args:
            name: of the seal.
            files: below the folder; they may be missing.
            tell: whether a line names those that are there and are not as they were sealed.
        """
        sealed, there = self._read(name), [path for path in files if path.is_file()]
        sound = {path for path in there if sealed.get(self._key(path)) == _content_of(path)}
        changed = [path for path in there if path not in sound]
        if changed and tell and is_main_process():
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            tqdm.write(f"{printable(changed[0])}{more}: not known to be as it was written; made anew")
        return sound

    def seal(self, name: str, files: Iterable[Path], flush: bool = True) -> None:
        """Notes what those of the files hold that are there; what was noted of others stays.

        Args:
            name: of the seal.
            files: below the folder; they may be missing.
            flush: as of :func:`mnif.utils.files.written_atomically`: like the files themselves.
        """
        content = {self._key(path): _content_of(path) for path in files if path.is_file()}
        with written_atomically(self._path(name), flush) as temporary:
            temporary.write_text(json.dumps(self._read(name) | content))

    def remove(self) -> None:
        """Removes all seals, and what a killed command left of one."""
        remove_leftovers(self.folder / SEALS)
        for path in (self.folder / SEALS).glob("*.json"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (self.folder / SEALS).rmdir()

    def _key(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def _path(self, name: str) -> Path:
        return self.folder / SEALS / f"{name}.json"

    def _read(self, name: str) -> dict[str, Any]:
        """What is noted; nothing where the seal itself is missing or damaged."""
        with contextlib.suppress(OSError, UserError):
            return read_json(self._path(name))
        return {}


def _content_of(path: Path) -> list[int | str]:
    """Length and SHA-256 of a file."""
    return [path.stat().st_size, sha256_of_file(path)]


class Chunks:
    """The chunks that are there already, each a file named by its first row.

    Args:
        folder: where they wait; it may be missing.
        name: of the array in each file.
        search: what the rows depend on, written beside them; chunks of another search are removed. None: the folder
            is of one search alone.
    """

    def __init__(self, folder: Path, name: str, search: dict[str, Any] | None = None):
        self.folder, self.name, self._seals = folder, name, Seals(folder)
        self._record = folder / "search.json"
        if search is not None:
            for place in (folder, folder / SEALS):
                remove_leftovers(place)
            if not self._is_of(search):
                self.remove()
            write_json(self._record, search)

    def __contains__(self, start: int) -> bool:
        path = self._path(start)
        return path in self._seals.sound(path.stem, [path])

    def __bool__(self) -> bool:
        return bool(self._paths())

    def save(self, start: int, rows: np.ndarray) -> None:
        """Keeps the chunk that begins at row ``start``."""
        with written_atomically(self._path(start)) as temporary, written_apart(temporary) as apart:
            save_file({self.name: np.ascontiguousarray(rows)}, apart)
        self._seals.seal(self._path(start).stem, [self._path(start)])

    def load(self, start: int) -> np.ndarray:
        """Reads the chunk that begins at row ``start``."""
        return load_file(self._path(start))[self.name]

    def all(self, starts: Iterable[int]) -> np.ndarray:
        """Reads the rows of the chunks that begin at ``starts``."""
        return np.concatenate([self.load(start) for start in starts])

    def remove(self) -> None:
        """Forgets everything, once it has been written elsewhere; the folder goes unless others have files there."""
        for path in (*self._paths(), self._record):
            path.unlink(missing_ok=True)
        self._seals.remove()
        remove_leftovers(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _is_of(self, search: dict[str, Any]) -> bool:
        try:
            return read_json(self._record) == search
        except UserError:  # missing or damaged
            return False

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
    """Computes ``compute(load(rows))`` of all rows into a file, unless the file is there already, as it was written.

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
    chunks, kept, seals = chunks_of(range(count), chunk_size), Chunks(folder, "rows"), Seals(path.parent)
    is_there = path in seals.sound(path.name, [path])
    processes.wait()  # all find the same, before one writes
    if not is_there:
        missing = [chunk for chunk in processes.share(chunks) if chunk.start not in kept]
        with progress_bar(total=count, desc=description, unit="row", disable=not processes.is_main) as bar:
            bar.update(count - sum(map(len, missing)) if processes.count == 1 else 0)
            for chunk, loaded in _loaded_ahead(load, missing):
                rows = np.asarray(compute(loaded), dtype=np.float32)
                _check_finite(rows, chunk, description)
                kept.save(chunk.start, rows)
                bar.update(len(chunk) * processes.count)
    processes.wait()
    if processes.is_main and not is_there:
        with written_atomically(path) as temporary:
            whole = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(count, width))
            for chunk in chunks:
                whole[chunk.start : chunk.stop] = kept.load(chunk.start)
            whole.flush()
            del whole
        seals.seal(path.name, [path])
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
