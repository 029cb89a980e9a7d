"""Arrays on disk: `.npz` and `.npy` files read with one-line errors, and a cache that is written once and mapped."""

import hashlib
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

from mnif.utils.errors import UserError
from mnif.utils.files import cache_folder, written_atomically
from mnif.version import __version__

# What damaged archives and arrays end in, in zipfile, zlib and NumPy; RuntimeError: one with a password.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    BadZipFile,
    zlib.error,
    struct.error,
    AttributeError,
    TypeError,
    OverflowError,
    MemoryError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
    TokenError,
    RecursionError,
)


def npz_arrays(path: Path, needs: str, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Reads arrays of an ``.npz`` file by name.

    Args:
        path: the file.
        needs: what the file should hold, for the error.
        names: those that are read, as far as they are there; others are not touched. Default: all.

    Raises:
        UserError: the file is damaged, holds Python objects, or asks for more memory than it may: an array that is
            packed more than 200 to one and takes over 256 MB, or one over the limit of :func:`memmap_cached`.
    """
    try:
        with ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = [name for name in members if names is None or name in names]
            for name in wanted:
                _check_member(archive, members[name])
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in wanted}
    except _DAMAGE as error:
        raise UserError(f"{path}: needs {needs} ({error})") from None


def _check_member(archive: ZipFile, member: ZipInfo) -> None:
    """Looks at the sizes an array in an archive states, before it is read.

    Raises:
        ValueError: they do not fit each other, or are too large.
    """
    with archive.open(member) as file:
        shape, _, kind = read_array_header(file)
        size = math.prod(shape) * kind.itemsize
        if kind.hasobject or size != member.file_size - file.tell():
            raise ValueError(f"{member.filename} is not the {kind} {list(shape)} that its header states")
    is_bomb = size > 256 << 20 and size > 200 * max(member.compress_size, 1)
    if is_bomb or size > _limit_bytes():
        raise ValueError(f"{member.filename} would take {size:,} bytes of memory; give it as .npy")


def read_array_header(file: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads what an ``.npy`` file says of its array: shape, order and type.

    Raises:
        ValueError: it is not of that format.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, order, kind = read(file)
    if any(size < 0 for size in shape):
        raise ValueError(f"an array cannot be {list(shape)}")
    return shape, order, kind


def npz_names(path: Path) -> set[str]:
    """Lists the names of the arrays in an ``.npz`` file, without reading them.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except _DAMAGE as error:
        raise UserError(f"{path}: not an .npz file ({error})") from None


def npy_array(path: Path) -> np.ndarray:
    """Opens the array of an ``.npy`` file, memory-mapped and copy-on-write.

    Raises:
        UserError: the file is damaged, or holds Python objects.
    """
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except _DAMAGE as error:
        raise UserError(f"{path}: not a readable .npy array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: not a readable .npy array (it is an .npz file)")
    return array


def ids_and_groups(path: Path, arrays: dict[str, np.ndarray], count: int) -> tuple[list[str], list[str]]:
    """Takes ids and groups from arrays; row numbers where there are no ids, the ids where there are no groups.

    Raises:
        UserError: they are not ``count`` names each.
    """
    ids = [str(id) for id in arrays["ids"].ravel()] if "ids" in arrays else row_names(count)
    groups = [str(group) for group in arrays["groups"].ravel()] if "groups" in arrays else ids
    for name, names in (("ids", ids), ("groups", groups)):
        if len(names) != count:
            raise UserError(f'{path}: "{name}" has {len(names)} names for {count} instances')
    return ids, groups


def row_names(count: int) -> list[str]:
    """Makes ids for instances without names: ``000000``, ``000001``, …"""
    return [f"{row:06d}" for row in range(count)]


_DEFAULT_LIMIT_MB = 2048


def memmap_cached(
    shape: tuple[int, ...], fill: Callable[[np.ndarray], None], key: Iterable[str], keep: bool = False
) -> np.ndarray:
    """Lets ``fill`` write an array: in memory, or memory-mapped from the cache folder if it is over the limit.

    The limit is 2048 MB, or the environment variable ``MNIF_MEMORY_LIMIT_MB``; the folder is ``data`` in
    :func:`mnif.utils.files.cache_folder`. A file that is already there under the same key is not written again.

    Args:
        shape: of the array.
        fill: writes every element of a uint8 array of this shape.
        key: what the content depends on besides the shape (:func:`file_stamps`, parameters); names the file.
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


def file_stamps(paths: Iterable[Path]) -> list[str]:
    """Makes one line a file, which changes with its name, size or time of change."""
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
