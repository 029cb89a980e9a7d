"""Arrays too large for memory, or slow to make: written once to the cache folder and memory-mapped."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from mnif import __version__
from mnif.errors import UserError
from mnif.files import cache_folder, written_atomically

_DEFAULT_LIMIT_MB = 2048


def filled(
    shape: tuple[int, ...], fill: Callable[[np.ndarray], None], key: Iterable[str], keep: bool = False
) -> np.ndarray:
    """An array that ``fill`` writes: in memory, or memory-mapped from the cache folder if it is over the limit.

    The limit is 2048 MB, or the environment variable ``MNIF_MEMORY_LIMIT_MB``; the folder is ``data`` in
    :func:`mnif.files.cache_folder`. A file that is already there under the same key is not written again.

    Args:
        shape: of the array.
        fill: writes every element of a uint8 array of this shape.
        key: what the content depends on besides the shape (:func:`stamps` of the files, parameters); names the file.
        keep: goes to the cache folder even if it fits into memory, because it takes long to make.

    Returns:
        uint8 array; a memory-mapped one is copy-on-write, so the file cannot be changed through it.

    Raises:
        UserError: the limit is not a number.
        OSError: the disk is full, or the cache folder cannot be written.
    """
    if not keep and math.prod(shape) <= _limit_bytes():
        array = np.empty(shape, dtype=np.uint8)
        fill(array)
        return array
    name = hashlib.sha256(json.dumps([__version__, list(shape), *key]).encode()).hexdigest()[:32]
    path = cache_folder() / "data" / f"{name}.npy"
    if not path.exists():
        with written_atomically(path) as temporary:
            mapped = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            fill(mapped)
            mapped.flush()
            del mapped
    return np.load(path, mmap_mode="c")


def stamps(paths: Iterable[Path]) -> list[str]:
    """One line a file, which changes with its name, size or time of change."""
    lines = []
    for path in paths:
        status = path.stat()
        lines.append(f"{path.absolute()} {status.st_size} {status.st_mtime_ns}")
    return lines


def _limit_bytes() -> int:
    text = os.environ.get("MNIF_MEMORY_LIMIT_MB", str(_DEFAULT_LIMIT_MB))
    try:
        return int(float(text) * 2**20)
    except (ValueError, OverflowError):
        raise UserError(f"MNIF_MEMORY_LIMIT_MB={text}: must be a number of megabytes") from None
