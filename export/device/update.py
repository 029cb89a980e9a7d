"""`python3 device/update.py`: makes a newer bundle of this one by a delta, and goes back to the one before.

The new bundle is made whole in a folder beside the old one, every file checked against its hash; then the two folders
exchange their names. The folder beside is named after the bundle that is to come, so once that is in place, the name
says of which update it is the bundle before; one that fits no bundle in place is a leftover. Files that stay the same
have two names (hard links) and take no further room. What lies in the bundle and is not of it comes along, but for the
plans of graphs that changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path
from typing import Any, Iterable, Iterator, NamedTuple

from .bundle import ENGINES, MANIFEST, BundleError, BundleFolder
from .cli import Parser, run_command
from .delta import Delta, describe_bundle, name_bundle
from .files import REPLACED, can_link, check_writable, exchange_folders, flush_to_disk, link_or_copy, own_bytes


def make_parser() -> Parser:
    """Makes the command's flags."""
    parser = Parser("update", "Make a newer bundle of this one; a power cut leaves the one or the other, never a mix.")
    parser.add_bundle()
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--delta", type=Path, help="the folder that `mnif export --since` wrote")
    what.add_argument("--undo", action="store_true", help="go back to the bundle before the last update")
    parser.add_argument(
        "--check", action="store_true", help="do all but the last step, and leave everything as it was"
    )
    parser.add_argument("--no_keep", action="store_true", help="do not keep the bundle before, for --undo")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    return run_command(make_parser(), arguments, _update)


def _update(options: Any) -> int:
    if options.undo and options.no_keep:
        raise BundleError("--no_keep: is for --delta; --undo keeps nothing")
    place = options.bundle.resolve()
    _mend(place)
    with _held(place):
        old = BundleFolder(place)
        delta = None if options.undo else Delta(options.delta)
        if delta is not None and old.manifest["digest"] == delta.bundle["digest"]:
            print(f"{place}: is the bundle {name_bundle(delta.bundle)} already; nothing to do")
            return 0
        if delta is not None:
            delta.check_base(old)
        check_writable(place.parent)
        _remove_leftovers(place)
        try:
            if delta is None:
                _undo(old, options.check)
            else:
                _apply(delta, old, options.check, options.no_keep)
        finally:
            _remove_leftovers(place)
    return 0


def path_before(place: Path, digest: str) -> Path:
    """Names the folder of the bundle that was at ``place`` before the one with this digest."""
    return place.with_name(f"{place.name}.before-{digest[:12]}")


def _beside(place: Path, behind: str = "") -> list[Path]:
    """Finds the folders beside that bear the name of a bundle before."""
    named = re.compile(re.escape(place.name) + r"\.before-[0-9a-f]{12}" + re.escape(behind))
    return sorted(path for path in place.parent.iterdir() if named.fullmatch(path.name))


def _mend(place: Path) -> None:
    """Ends an exchange of names that was cut off, where it takes two steps."""
    for replaced in _beside(place, REPLACED) if place.parent.is_dir() else ():
        with _held(replaced):  # whoever is between the two steps holds it
            replaced.rename(replaced.with_suffix("") if place.exists() else place)


def _remove_leftovers(place: Path) -> None:
    """Removes the folders beside that are not of the bundle before this one: half made, or no longer needed."""
    kept = path_before(place, BundleFolder(place).manifest["digest"])
    for path in _beside(place):
        if path != kept:
            shutil.rmtree(str(path))


@contextlib.contextmanager
def _held(place: Path) -> Iterator[None]:
    """Holds a bundle, so that it is updated once at a time; the kernel lets go of it with this process."""
    try:
        handle = os.open(str(place), os.O_RDONLY)
    except OSError as error:
        raise BundleError(f"{place}: {error.strerror}; `mnif export` writes a bundle") from None
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BundleError(f"{place}: is being updated by another process; wait for it") from None
        yield
    finally:
        os.close(handle)


def _apply(delta: Delta, old: BundleFolder, check: bool, no_keep: bool) -> None:
    place = old.path
    beside = path_before(place, delta.bundle["digest"])
    beside.mkdir()
    shutil.copymode(str(place), str(beside))
    _check_room(delta, old, beside)
    made = sum(_write(beside / name, pieces) for name, pieces in delta.rebuilt(old))
    new = BundleFolder(beside)
    same = delta.check_made(new, old)
    for name in same:
        old.read(name)
        link_or_copy(place / name, beside / name)
    plans = _carry_others(old, new)
    if not check:
        _put_in_place(beside, place)
    gone = len(set(old.manifest["files"]) - set(new.manifest["files"]))
    print(f"{place}: {'would become' if check else 'is now'} the bundle {name_bundle(delta.bundle)}")
    print(f"{len(delta.files)} files made ({made / 1e6:.1f} MB), {len(same)} as before, {gone} gone; all hashes fit")
    _print_plans(plans)
    if no_keep and not check:
        shutil.rmtree(str(beside))
    elif not check:
        megabytes = own_bytes(beside) / 1e6
        print(
            f"{beside}: the bundle before, for --undo; {megabytes:.1f} MB that it alone takes, until the next update"
        )


def _write(path: Path, pieces: Iterable[bytes]) -> int:
    """Writes a file to the disk, and returns how many bytes it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        size = sum(file.write(piece) for piece in pieces)
        file.flush()
        os.fsync(file.fileno())
    return size


def _undo(now: BundleFolder, check: bool) -> None:
    place = now.path
    beside = path_before(place, now.manifest["digest"])
    if not beside.is_dir():
        raise BundleError(f"{place}: nothing to undo, no bundle before it is kept")
    before = BundleFolder(beside)
    for name in before.manifest["files"]:
        before.read(name)
    described = name_bundle(describe_bundle(before.manifest))
    if check:
        print(f"{place}: would become the bundle {described} again; all hashes fit")
        return
    plans = _carry_others(now, before)
    _put_in_place(beside, place)
    print(f"{place}: is the bundle {described} again; the delta makes the newer one once more")
    _print_plans(plans)


def _check_room(delta: Delta, old: BundleFolder, beside: Path) -> None:
    """Refuses to begin where the new bundle does not fit beside the old one. Raises a BundleError."""
    needed = sum(file["bytes"] for file in delta.files.values())
    if not can_link(old.path / MANIFEST, beside):
        needed += sum(path.stat().st_size for path in old.path.rglob("*") if path.is_file())
    free = shutil.disk_usage(str(beside)).free
    if needed > free:
        raise BundleError(
            f"{beside.parent}: the new bundle takes {needed / 1e6:.1f} MB beside the old one, and "
            f"{free / 1e6:.1f} MB are free; make room"
        )


_PLAN = re.compile(rf"{ENGINES}/(.+)\.plan(?:\.json|\.log)?|triton/([^/]+)/1/model\.plan")


class _Plans(NamedTuple):
    """Plans of a bundle after an update, by the files' names."""

    kept: list[str]
    left_out: list[str]


def _carry_others(source: BundleFolder, target: BundleFolder) -> _Plans:
    """Brings what lies in a bundle and is not of it into another one, but for plans of graphs that differ.

    Raises:
        BundleError: one of the other bundle's own files has its name.
    """
    plans = _Plans([], [])
    for path in sorted(source.path.rglob("*")):
        inside = path.relative_to(source.path)
        name = inside.as_posix()
        is_own = name in source.manifest["files"] or name == MANIFEST or "__pycache__" in inside.parts
        if is_own or not (path.is_symlink() or path.is_file()):
            continue
        match = _PLAN.fullmatch(name)
        graph = match and (match[1] or match[2])
        differs = graph is not None and _built_from(source.manifest, graph) != _built_from(target.manifest, graph)
        if graph is not None and name.endswith(".plan"):
            (plans.left_out if differs else plans.kept).append(name)
        if not differs:
            _carry(path, target.path / name, name in target.manifest["files"] or name == MANIFEST)
    return plans


def _carry(path: Path, target: Path, taken: bool) -> None:
    try:
        if taken or target.is_dir():
            raise FileExistsError
        if os.path.lexists(str(target)):  # there since the update that is undone
            target.unlink()
        link_or_copy(path, target)
    except (FileExistsError, NotADirectoryError):
        raise BundleError(f"{path}: is not of the bundle, and in the way of the other one's file; move it") from None


def _built_from(manifest: dict[str, Any], name: str) -> Any:
    """Names what a plan of a graph is built from beside machine and flags; None where there is no such graph."""
    graph = manifest["graphs"].get(name)
    return graph and (manifest["files"][graph["file"]]["sha256"], graph["half"], graph["profile"])


def _print_plans(plans: _Plans) -> None:
    if plans.kept:
        print(f"{len(plans.kept)} plans kept, of graphs that are the same to the byte")
    if plans.left_out:
        names = ", ".join(plans.left_out)
        print(f"{len(plans.left_out)} plans of graphs that changed are to be built again (device/build.py): {names}")


def _put_in_place(beside: Path, place: Path) -> None:
    """Exchanges the names of two folders when all of ``beside`` is on the disk; what root made is the owner's."""
    owner = place.stat()
    for path in (beside, *beside.rglob("*")):
        if os.geteuid() == 0 and (path.is_dir() or path.lstat().st_nlink == 1):
            os.chown(str(path), owner.st_uid, owner.st_gid, follow_symlinks=False)
        if path.is_dir() and not path.is_symlink():
            flush_to_disk(path)
    is_inside = _is_at_work_in(place)
    exchange_folders(beside, place)
    if is_inside:
        print(f"a shell that was in the bundle is still in the one before: cd {place}")


def _is_at_work_in(folder: Path) -> bool:
    try:
        return folder in (Path.cwd(), *Path.cwd().parents)
    except OSError:  # the shell's folder is gone
        return False
