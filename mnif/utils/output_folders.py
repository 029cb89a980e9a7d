"""Whose an output folder is: a command fills a folder that is free or its own, alone, and refuses every other one."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from mnif.utils.errors import UserError
from mnif.utils.files import check_writable, remove_leftovers, write_json
from mnif.utils.json_files import read_json
from mnif.utils.process import command_line, is_main_process

BEGUN = ".begun.json"
"""What tells whose a folder is while the command that fills it has none of its own files there."""


# Whose a folder is by a file in it that has one of these entries; the first that is found counts. Names alone do not
# tell: a web page has a manifest.json too, and several commands leave figures in a metrics.json.
_MARKS = (
    ("grow", "run.json", {"grow"}),
    ("fit", "run.json", {"fit", "prior", "distill"}),
    ("compare-fit", "compare.json", {"runs"}),
    ("pilot", "pilot.json", {"recommendations"}),
    ("export", "manifest.json", {"decoder_fingerprint"}),
    ("export", "delta.json", {"base"}),
    ("sample", "samples.json", {"model_sha256"}),
    ("decode", "decode.json", {"decoder"}),
    ("eval", "comparison.json", {"evaluations"}),
    ("eval", "metrics.json", {"inputs"}),
    ("encode", "metrics.json", {"fitting_badly"}),
    ("monitor", "monitor.json", {"advice"}),
    ("fit", "decoder/config.json", {"_class_name"}),  # a model folder
)


# What a command writes whatever it is asked; in a folder without a mark they are somebody else's.
_WRITES: dict[str, tuple[str, ...]] = {
    "fit": ("run.json", "config.yaml", "metrics.json", "metrics.jsonl", "latents.safetensors", "model", "checkpoints"),
    "grow": (
        "run.json",
        "config.yaml",
        "metrics.json",
        "metrics.jsonl",
        "latents.safetensors",
        "model",
        "checkpoints",
    ),
    "compare-fit": ("compare.json", "config.yaml", "compare.md", "curves.png"),
    "pilot": ("pilot.json", "config.yaml", "pilot.md", "pilot.html"),
    "export": (),
    "sample": ("samples.json", "metrics.json", "preview"),
    "decode": ("decode.json", "metrics.json", "grid.png"),
    "eval": ("metrics.json", "metrics.md", "nearest.png", "comparison.json", "comparison.md", "comparison.png"),
    "encode": ("latents.safetensors", "metrics.json"),
    "monitor": ("monitor.json", "monitor.html"),
}


# Folders inside that belong to what is around them.
_INSIDE = {
    "fit": ("model", "checkpoints", "samples", "pairs"),
    "grow": ("model", "checkpoints", "samples", "pairs", "inherited"),
    "export": ("onnx", "device", "engines", "triton"),
    "sample": ("preview", "parts"),
}


def check_output_folder(folder: Path, command: str) -> bool:
    """Makes sure, before any work is done, that a command may fill a folder.

    Args:
        folder: what ``--output_dir`` names; it may be missing.
        command: by its name on the command line, such as ``"encode"``.

    Returns:
        Whether it is the command's already.

    Raises:
        UserError: it is another command's folder or part of one, holds files the command would replace that are not
            its own, cannot be written to, or is no folder.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; choose another --output_dir")
    check_writable(folder)
    found = _owner(folder)
    if found is not None and found[0] != command:
        raise UserError(f"{folder} is of `mnif {found[0]}`, {found[1]} tells; choose another --output_dir")
    if found is not None:
        return True
    for around in folder.resolve().parents:
        found = _owner(around)
        if found is not None and folder.resolve().relative_to(around).parts[0] in _INSIDE.get(found[0], ()):
            raise UserError(f"{folder} is part of {around}, of `mnif {found[0]}`; choose another --output_dir")
    for name in _WRITES[command]:
        if (folder / name).exists():
            raise UserError(f"{folder / name} is not of `mnif {command}`; choose another --output_dir")
    return False


@contextmanager
def output_folder_of(folder: Path, command: str) -> Iterator[None]:
    """Marks a folder as a command's until its own files do, and clears what a killed one was about to write.

    For commands whose own files come last (``encode``, ``eval``, ``compare-fit``), around all that they write. The
    folder is held for this command meanwhile (:func:`held_folder`).
    """
    with held_folder(folder):
        check_output_folder(folder, command)  # whoever has just left may have filled it
        remove_leftovers(folder)
        write_json(folder / BEGUN, {"command": command})
        try:
            yield
        except BaseException:
            if {path.name for path in folder.iterdir()} <= {BEGUN, LOCK}:
                (folder / BEGUN).unlink()
            raise
        (folder / BEGUN).unlink(missing_ok=True)


LOCK = ".mnif.lock"
"""Lies in a folder while a command writes to it, and says which."""

_HELD: dict[Path, int] = {}  # by this process, each with the descriptor of its lock


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Holds a folder for this command, so that no other one writes to it meanwhile; whoever reads is not asked.

    The kernel holds the lock (``flock``) on the file ``.mnif.lock``, for as long as this process lives: after a kill
    it is free, and the file that stays behind means nothing. Of the processes of one launch the main one holds it.
    Linux passes it on to the server of a network disk (NFS, from version 4 on or with its lock daemon), so it holds
    between machines; where a file system knows no locks, a line says so and nothing is held.

    Args:
        folder: made if it is missing, and removed again if nothing came into it.

    Raises:
        UserError: another command writes there, and which, or nothing can be written there.
    """
    place = folder.resolve()
    if place in _HELD or not is_main_process():
        yield
        return
    there = folder.exists()
    try:
        file = _HELD[place] = _locked_file(folder)
        try:
            yield
        finally:
            del _HELD[place]
            (folder / LOCK).unlink(missing_ok=True)  # while it is locked: whoever has opened it looks again
            os.close(file)
    finally:
        if not there:
            with contextlib.suppress(OSError):
                folder.rmdir()


T = TypeVar("T")


def holds_folder(flag: str, command: str | None = None) -> Callable[[Callable[[T], None]], Callable[[T], None]]:
    """Decorates a command that writes to the folder which ``flag`` names: it is held (:func:`held_folder`).

    A run folder that is missing is left to the command to complain of; a dry run writes nothing and holds nothing.

    Args:
        flag: field of the command's arguments.
        command: whose folder it must be (:func:`check_output_folder`); None: a run folder, which several fill.
    """

    def decorate(work: Callable[[T], None]) -> Callable[[T], None]:
        @functools.wraps(work)
        def worker(arguments: T) -> None:
            folder: Path = getattr(arguments, flag)
            if getattr(arguments, "dry_run", False) or (command is None and not folder.is_dir()):
                work(arguments)
                return
            if command is not None:
                check_output_folder(folder, command)
            with held_folder(folder):
                if command is not None:
                    check_output_folder(folder, command)  # whoever has just left may have filled it
                work(arguments)

        return worker

    return decorate


def _locked_file(folder: Path) -> int:
    """Opens and locks the file ``.mnif.lock``, and writes into it who holds it."""
    check_writable(folder)
    path = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:  # whoever held it has just removed the folder
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same_file(file, path):  # its holder has just removed it
                os.close(file)
                continue
            holder = {"pid": os.getpid(), "host": platform.node(), "command": command_line()}
            _rewrite(file, json.dumps(holder | {"since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{folder} is in use {_holder(path)}; wait for it, or choose another folder") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                path.unlink(missing_ok=True)
                os.close(file)
                raise UserError(f"{folder}: nothing can be written there ({error.strerror})") from None
            print(f"{folder}: its file system knows no locks; let no second command write there", file=sys.stderr)
        return file


def _is_same_file(file: int, path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file), path.stat())
    return False


def _rewrite(file: int, content: bytes) -> None:
    os.ftruncate(file, 0)
    os.pwrite(file, content, 0)


def _let_go() -> None:
    """In a child, such as one that loads data: it may outlive a kill of its parent, and is not to hold folders on."""
    for file in _HELD.values():
        os.close(file)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)


def _holder(path: Path) -> str:
    """Says who holds a lock since when, as far as the file tells."""
    holder = _content(path)
    if not holder:
        return "by another command"
    return (
        f"since {holder.get('since')} by process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')})"
    )


def _owner(folder: Path) -> tuple[str, str] | None:
    """The command whose folder it is, and the file that tells."""
    for command, file, entries in _MARKS:
        if entries & _content(folder / file).keys():
            return command, file
    begun = _content(folder / BEGUN).get("command")
    return (begun, BEGUN) if isinstance(begun, str) and begun in _WRITES else None


def _content(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it holds anything else or cannot be read."""
    with contextlib.suppress(OSError, UserError):
        return read_json(path)
    return {}
