"""Puts the files of a new bundle into a folder: an older bundle's go, everything else in it stays as it is."""

import contextlib
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

from export.bundle_folder import ENGINES
from export.manifest import UNFINISHED
from mnif.errors import UserError
from mnif.files import flush_to_disk, read_json, sha256_of_file, write_json

MANIFEST = "manifest.json"


def put_in_place(new: Path, output: Path) -> list[str]:
    """Moves a whole bundle into ``output``.

    While files are moved, the manifest there is an unfinished one, which nothing reads as a bundle and which names the
    files of both, so that whatever a killed command leaves is known to the next. The new manifest comes last.

    Args:
        new: the bundle, on the same file system; emptied.
        output: gets it; may be missing, empty, or a bundle, finished or not.

    Returns:
        The files there that are not the bundle's, plans left out.

    Raises:
        UserError: a file that no manifest names is in the way; nothing has been touched.
    """
    manifest = read_json(new / MANIFEST)
    files, before = manifest["files"], _files_of_bundle(output)
    changed = [name for name in files if not is_as_written(output / name, files[name])]
    for name in changed:
        _check_way(output, name, name in before)
    write_json(
        output / MANIFEST,
        {"schema": UNFINISHED, "decoder_fingerprint": manifest["decoder_fingerprint"], "files": before | files},
    )
    for name in changed:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).chmod(0o644)  # safetensors keeps what it makes from other users
        flush_to_disk(new / name)
        shutil.move(new / name, output / name)
    for name in before.keys() - files.keys():
        _remove(output, name)
    for folder in {output, *(path for name in changed for path in (output / name).parents if output in path.parents)}:
        flush_to_disk(folder)
    shutil.move(new / MANIFEST, output / MANIFEST)
    flush_to_disk(output)
    there = (path.relative_to(output) for path in sorted(output.rglob("*")) if not path.is_dir())
    others = [path.as_posix() for path in there if path.parts[0] != ENGINES]
    return [name for name in others if name not in files and name != MANIFEST]


def is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    """Whether a file is there and what a manifest's entry says of it."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of_file(path) == entry["sha256"]


def _files_of_bundle(output: Path) -> dict[str, Any]:
    """What the manifest there names, as far as it lies below the folder; nothing where there is none."""
    manifest = read_json(output / MANIFEST) if (output / MANIFEST).is_file() else {}
    files = manifest.get("files") if isinstance(manifest, dict) else {}
    return {name: entry for name, entry in files.items() if _is_inside(name)} if isinstance(files, dict) else {}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.parts[0] != ENGINES


def _check_way(output: Path, name: str, own: bool) -> None:
    """Refuses to write over what no manifest names, or where no file can be."""
    path = output / name
    around = [output / each for each in Path(name).parents]
    in_the_way = next((each for each in around if each.exists() and not each.is_dir()), None)
    if in_the_way is None and (path.is_dir() or (not own and (path.exists() or path.is_symlink()))):
        in_the_way = path
    if in_the_way is not None:
        raise UserError(f"{in_the_way} is not of the bundle and in its way; move it, or choose another --output_dir")


def _remove(output: Path, name: str) -> None:
    """Removes a file, and the folders that are empty then."""
    if (output / name).is_dir():
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (output / name).unlink()
    for folder in Path(name).parents[:-1]:
        with contextlib.suppress(OSError):
            (output / folder).rmdir()
