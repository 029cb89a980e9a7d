"""Whose an output folder is: a command fills a folder that is free or its own, and refuses every other one."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnif.utils.errors import UserError
from mnif.utils.files import remove_leftovers, write_json
from mnif.utils.json_files import read_json

BEGUN = ".begun.json"
"""What tells whose a folder is while the command that fills it has none of its own files there."""


# Whose a folder is by a file in it that has one of these entries; the first that is found counts. Names alone do not
# tell: a web page has a manifest.json too, and several commands leave figures in a metrics.json.
_MARKS = (
    ("fit", "run.json", {"fit", "prior", "distill"}),
    ("compare-fit", "compare.json", {"runs"}),
    ("export", "manifest.json", {"decoder_fingerprint"}),
    ("sample", "samples.json", {"model_sha256"}),
    ("decode", "decode.json", {"decoder"}),
    ("eval", "comparison.json", {"evaluations"}),
    ("eval", "metrics.json", {"inputs"}),
    ("encode", "metrics.json", {"fitting_badly"}),
    ("fit", "decoder/config.json", {"_class_name"}),  # a model folder
)


# What a command writes whatever it is asked; in a folder without a mark they are somebody else's.
_WRITES: dict[str, tuple[str, ...]] = {
    "fit": ("run.json", "metrics.json", "metrics.jsonl", "latents.safetensors", "model", "checkpoints"),
    "compare-fit": ("compare.json", "compare.md", "curves.png"),
    "export": (),
    "sample": ("samples.json", "metrics.json", "preview"),
    "decode": ("decode.json", "metrics.json", "grid.png"),
    "eval": ("metrics.json", "metrics.md", "nearest.png", "comparison.json", "comparison.md", "comparison.png"),
    "encode": ("latents.safetensors", "metrics.json"),
}


# Folders inside that belong to what is around them.
_INSIDE = {
    "fit": ("model", "checkpoints", "samples", "pairs"),
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
            its own, or is no folder.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; choose another --output_dir")
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

    For commands whose own files come last (``encode``, ``eval``, ``compare-fit``), around all that they write.
    """
    there = folder.exists()
    remove_leftovers(folder)
    write_json(folder / BEGUN, {"command": command})
    try:
        yield
    except BaseException:
        if list(folder.iterdir()) == [folder / BEGUN]:
            (folder / BEGUN).unlink()
            if not there:
                folder.rmdir()
        raise
    (folder / BEGUN).unlink(missing_ok=True)


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
