"""Files and folders written so that a power cut leaves the old or the new, and whether they can be written at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from .bundle import BundleError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux

REPLACED = ".replaced"
"""Behind the name of a folder that is to get another one's content, where that takes two steps."""


def write_atomically(path: Path, content: bytes, flush: bool = True) -> None:
    """Writes a file under a temporary name beside its own, then renames it; its folder is made if it is missing.

    Args:
        path: the file.
        content: of it.
        flush: it is on the disk before it has its name; False leaves that to the system, for many small files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        if temporary.exists():
            temporary.unlink()


def check_writable(folder: Path) -> None:
    """Makes sure, before any work is done, that files can be written to a folder; it may be missing.

    Raises:
        BundleError: nothing can be written there, and why.
    """
    there = folder.absolute()
    while not os.path.lexists(str(there)):
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=str(there)):
            pass
    except OSError as error:
        raise BundleError(f"{folder}: nothing can be written there ({error.strerror}); choose another place") from None


def check_output(path: Path | None) -> None:
    """Makes sure that a file can be written, where one is asked for.

    Raises:
        BundleError: it cannot, and why.
    """
    if path is not None and path.is_dir():
        raise BundleError(f"{path}: is a folder; name a file")
    if path is not None:
        check_writable(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, would outlive a power cut."""
    handle = os.open(str(path), os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network disks: files alone
            raise
    finally:
        os.close(handle)


def exchange_folders(one: Path, other: Path) -> None:
    """Gives each of two folders beside each other the other's name.

    It is one step on Linux's own file systems. Elsewhere ``other`` is moved to ``ONE.replaced`` first, and there is a
    moment in which nothing has its name.

    Raises:
        BundleError: they cannot be renamed, and why.
    """
    try:
        rename = getattr(ctypes.CDLL(None), "renameat2", None)
        if rename is None or rename(_HERE, os.fsencode(str(one)), _HERE, os.fsencode(str(other)), _EXCHANGE) != 0:
            replaced = one.with_name(one.name + REPLACED)
            other.rename(replaced)
            try:
                one.rename(other)
            except BaseException:
                replaced.rename(other)
                raise
            replaced.rename(one)
        flush_to_disk(other.parent)
    except OSError as error:
        raise BundleError(f"{other}: cannot be replaced ({error.strerror}); is it a disk of its own?") from None


def can_link(file: Path, folder: Path) -> bool:
    """Tells whether a file can have a second name in a folder: not on FAT, nor from disk to disk."""
    link = folder / ".link.tmp"
    try:
        os.link(str(file), str(link))
    except OSError:
        return False
    link.unlink()
    return True


def link_or_copy(path: Path, target: Path) -> None:
    """Gives a file or symbolic link a second name, or where that cannot be a copy on the disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(str(path), str(target), follow_symlinks=False)
    except FileExistsError:
        raise
    except (OSError, NotImplementedError):
        shutil.copy2(str(path), str(target), follow_symlinks=False)
        if not target.is_symlink():
            flush_to_disk(target)


def own_bytes(folder: Path) -> int:
    """Counts the bytes of a folder's files that have no other name: what removing it would give back."""
    found = [path.lstat() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sum(each.st_size for each in found if each.st_nlink == 1)
