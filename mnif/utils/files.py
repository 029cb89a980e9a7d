"""Files and folders that are either old and whole or new and whole, never half-written, after a power cut too.

docs/reliability.md says what is promised.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mnif.utils.errors import UserError

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


# .NAME.PROCESS.tmp of a file, .NAME.RANDOM.tmp and .old of a folder, as this module names them.
_TEMPORARY = re.compile(r"\.(.+)\.(?:\d+|[a-z0-9_]{8})\.(tmp|old)")


@contextmanager
def written_atomically(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; moves it onto ``path`` when the block ends without an error.

    If the block raises (a full disk, Ctrl-C), the temporary file is removed and an older ``path`` stays as it was.

    Args:
        path: the file.
        flush: the file is on the disk before it has its name, and its name when this returns. False leaves that to
            the system, for many small files whose command ends with :func:`flush_everything`; a power cut can leave
            such a file empty (:func:`was_written`).
    """
    _make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_errors_of(path, temporary):
            yield temporary
            _open_to_others(temporary)
            if flush:
                flush_to_disk(temporary)
            os.replace(temporary, path)
            if flush:
                flush_to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def folder_written_atomically(path: Path) -> Iterator[Path]:
    """Yields a temporary folder beside ``path``; it replaces ``path`` when the block ends without an error.

    All of it is on the disk before it has its name. Where two names cannot be exchanged at once (:func:`_exchanged`),
    a killed process can leave the older folder as ``.NAME.*.old`` and nothing under ``path``;
    :func:`remove_leftovers` brings it back.
    """
    with temporary_folder(path) as temporary:
        replaced = temporary.with_suffix(".old")
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            _open_to_others(entry)
            flush_to_disk(entry)
        if not (path.exists() and _exchanged(temporary, path)):
            if path.exists():
                path.rename(replaced)
            try:
                temporary.rename(path)
            except BaseException:
                if replaced.exists():
                    replaced.rename(path)
                raise
        flush_to_disk(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yields an empty hidden folder beside ``path`` that goes at the end; what killed commands left goes first."""
    remove_leftovers(path.parent, path.name)
    _make_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with write_errors_of(path, temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporaries that killed commands left directly in ``folder``; nobody else may be writing there.

    A folder that was taken away to be replaced, and never was, comes back.

    Args:
        folder: where to look; it may be missing.
        name: of the file or folder that they were to become; None: of any, for folders that are a command's own.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _TEMPORARY.fullmatch(path.name)
        if match is None or name not in (None, match[1]):
            continue
        if match[2] == "old" and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_folder(path: Path) -> None:
    """Removes a folder at once for whoever looks: a kill leaves all of it, or a hidden ``.tmp`` beside its place."""
    hidden = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    path.rename(hidden)
    shutil.rmtree(hidden)


def flush_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's names, would outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():  # some network disks: files alone
            raise
    finally:
        os.close(handle)


def flush_everything() -> None:
    """Does the same for all files at once, those of other programs too: one wait in place of thousands."""
    os.sync()


def was_written(path: Path) -> bool:
    """Whether a file of some length is there; one that a power cut left empty is not."""
    return path.exists() and path.stat().st_size > 0


def _make_folder(path: Path) -> None:
    """Makes a folder and those above it whose names outlive a power cut as what is written into it does."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush_to_disk(path.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchanges two names in one step, and says whether that can be done: on Linux, on most of its file systems."""
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    return exchange is not None and not exchange(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE)


@contextmanager
def write_errors_of(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Makes one kind of error of all that can go wrong in writing ``path``: an OSError that names it.

    Libraries that write in native code raise errors of their own for a full disk, Python's own have no name or that of
    the temporary file.

    Args:
        path: the file or folder, as the user knows it.
        temporary: what it is written as.
    """
    try:
        yield
    except OSError as error:
        is_own = error.filename is None or (temporary and str(error.filename).startswith(str(temporary)))
        if not is_own and error.errno not in _ONLY_OF_WRITING:  # a copy names what it reads
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _TENSOR_WRITERS.search(str(error)):
            raise
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else errno.ENOSPC if _is_full(path.parent) else errno.EIO
        raise OSError(number, os.strerror(number), str(path)) from error


_ONLY_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# In the messages of PyTorch's writer, whose errors have no class or number of their own.
_TENSOR_WRITERS = re.compile("PytorchStreamWriter|iostream|inline_container")


def _is_full(folder: Path) -> bool:
    return shutil.disk_usage(folder).free < 2**20


_TRIES = 20  # to find a folder as it was a moment ago, among commands that make and remove it


def check_writable(path: Path) -> None:
    """Makes sure, before any work is done, that a folder can be filled or a file written, without leaving a trace.

    Args:
        path: the folder, which may be missing with others above it; of a file, the folder it is to lie in.

    Raises:
        UserError: nothing can be written there, and why.
    """
    for _ in range(_TRIES):
        there = path.absolute()
        while not os.path.lexists(there):
            there = there.parent
        try:
            with tempfile.TemporaryFile(dir=there), contextlib.suppress(FileNotFoundError):
                os.stat(path)  # a name that is too long
            return
        except OSError as error:
            problem = error.strerror
            if not isinstance(error, FileNotFoundError) and os.path.lexists(there):
                break  # else another command has just removed it, and may have made it again
    raise UserError(f"{path}: nothing can be written there ({problem}); choose another place")


def _open_to_others(path: Path) -> None:
    """Usual permissions: temporary names and safetensors keep what they make from other users."""
    path.chmod(0o755 if path.is_dir() else 0o644)


def write_json(path: Path, content: Any) -> None:
    """Writes ``content`` as indented JSON, atomically; NaN and infinity, which JSON does not know, as null."""
    with written_atomically(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, sort_keys=True) + "\n")


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def sha256_of_file(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_folder(folder: Path) -> str:
    """The hexadecimal SHA-256 of a folder's files and their names, hidden ones left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()


def cache_folder() -> Path:
    """Where things that can be made again are kept: ``MNIF_CACHE``, or ``mnif`` in the user's cache folder."""
    own = os.environ.get("MNIF_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mnif"


@contextmanager
def written_apart(path: Path) -> Iterator[Path]:
    """Yields a path in a hidden folder of its own beside ``path``, and moves the file there at the end.

    For safetensors, which writes under temporary names of its own: a kill leaves them where :func:`remove_leftovers`
    finds them.
    """
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
        yield Path(folder) / path.name
        (Path(folder) / path.name).rename(path)


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors with ``metadata`` in the order of its names.

    The bytes depend on what is written alone; safetensors itself puts metadata in an order that changes from call to
    call.
    """
    from safetensors.torch import save_file  # torch is no business of those who read and write other files

    with written_apart(path) as apart:
        save_file(dict(tensors), apart, dict(metadata) if metadata else None)
    if not metadata:
        return
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{path}: the header takes {len(text)} bytes where safetensors took {length}")
        file.seek(8)
        file.write(text)
