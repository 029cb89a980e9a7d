"""A data source as the user names it: which files it means, and what their names and headers tell.

A source is a file, a folder, or a folder with a pattern after it, ``chairs/**/*.solid.binvox``: ``*`` stands for any
part of a name, ``**`` for any number of folders. Of a folder, all files below it count but hidden ones and those of
the system; links are followed, and whatever they lead to is read once.
"""

import os
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from mnif.data.arrays import npy_array, npz_names
from mnif.utils.process import tell

_OF_THE_SYSTEM = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
_MAGIC = frozenset("*?[")


class DataSource:
    """A data source as the user named it: a path, or a name on the hub; what it holds is looked up once, if asked.

    Attributes:
        name: as given to ``--data``.
        path: the same as a path, without a pattern; it may not exist.
        pattern: what is wanted of a folder, name by name; None for all of it.
    """

    def __init__(self, name: str):
        self.name, self.path = name, Path(name)
        self.pattern: tuple[str, ...] | None = None
        if _MAGIC & set(name) and not self.path.exists():
            parts = self.path.parts
            first = next(place for place, part in enumerate(parts) if _MAGIC & set(part))
            self.path, self.pattern = Path(*parts[:first]), parts[first:]

    @property
    def suffix(self) -> str:
        """The suffix of a file; empty for a folder, and for what does not exist."""
        return self.path.suffix if self.path.is_file() else ""

    @cached_property
    def array_names(self) -> set[str]:
        """The names of the arrays in an ``.npz`` file; raises UserError if it is damaged."""
        return npz_names(self.path) if self.suffix == ".npz" else set()

    @cached_property
    def array_shape(self) -> tuple[int, ...] | None:
        """The shape of the array in an ``.npy`` file; raises UserError if it is damaged."""
        return npy_array(self.path).shape if self.suffix == ".npy" else None

    @cached_property
    def array_kind(self) -> str | None:
        """The kind of the numbers in an ``.npy`` file, as NumPy has it: ``b``, ``u``, ``f`` …"""
        return npy_array(self.path).dtype.kind if self.suffix == ".npy" else None

    @cached_property
    def files(self) -> list[Path]:
        """The files of a folder that the pattern wants, in the order of their names."""
        return [path for path in visible_files(self.path, Counter()) if self.wants(path)] if self.path.is_dir() else []

    @cached_property
    def file_names(self) -> Counter[str]:
        """How many files of each name a folder and the folders in it hold."""
        return Counter(path.name for path in self.files)

    @cached_property
    def file_suffixes(self) -> Counter[str]:
        """How many files of each suffix, in small letters, a folder and the folders in it hold."""
        return Counter(path.suffix.lower() for path in self.files)

    def wants(self, path: Path) -> bool:
        """Whether the pattern fits a file of the folder."""
        return self.pattern is None or _fits(path.relative_to(self.path).parts, self.pattern)


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern or not parts:
        return not parts and not pattern
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or _fits(parts[1:], pattern)
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def visible_files(folder: Path, left_out: Counter[str], stop_at: tuple[str, ...] = ()) -> list[Path]:
    """Lists the files below a folder, in the order of their names.

    Args:
        folder: where to look.
        left_out: gets what was left out: why, in words, and how often.
        stop_at: the folders in a folder that holds a file of one of these names are not searched.

    Raises:
        OSError: a folder cannot be opened.
    """
    found: list[Path] = []
    pending, links = [folder], list[Path]()
    read, above = set[str](), {*map(str, Path(os.path.realpath(folder)).parents)}
    while pending or links:
        current = pending.pop() if pending else links.pop()  # links last, so that a file keeps its own name
        target = os.path.realpath(current)
        if target in read | above:  # a link that leads around in a circle, or to what has its own place here
            left_out["link to what is read already"] += 1
            continue
        read.add(target)
        names, folders = _entries(current, left_out)
        found += (current / name for name in names)
        if not set(stop_at) & set(names):
            pending += (entry for entry in folders if not entry.is_symlink())
            links = sorted([*links, *(entry for entry in folders if entry.is_symlink())], reverse=True)
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or the system's own."""
    return name.startswith(".") or name in _OF_THE_SYSTEM


def _entries(folder: Path, left_out: Counter[str]) -> tuple[list[str], list[Path]]:
    """Lists the files, by name, and the folders directly in a folder."""
    names, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            linked = entry.is_symlink()
            if is_hidden(entry.name):
                left_out["hidden"] += 1
            elif os.path.isdir(entry.path) if linked else entry.is_dir():
                folders.append(folder / entry.name)
            elif os.path.isfile(entry.path) if linked else entry.is_file():
                names.append(entry.name)
            else:
                left_out["broken link" if linked else "no file"] += 1
    return names, folders


def files_by_name(
    source: str | Path, suffixes: tuple[str, ...], why_not: Callable[[Path], str | None] = lambda path: None
) -> dict[str, Path]:
    """Finds the files of a source with one of these suffixes, by their names below its folder.

    Where some lie directly in the folder and some in folders below it, those are taken that are more: a cover above
    folders of classes is no instance, nor is a preview below drawn pictures. One line tells what was left out and why.

    Args:
        source: a folder, or one with a pattern (:class:`DataSource`), which says by itself how deep to look.
        suffixes: in small letters.
        why_not: says in a word or two why a file is to be left out; None if it is not.
    """
    data, left_out = DataSource(str(source)), Counter[str]()
    wanted = [path for path in visible_files(data.path, left_out) if data.wants(path)] if data.path.is_dir() else []
    files = [path for path in wanted if path.suffix.lower() in suffixes]
    left_out.update(path.suffix.lower() or "without suffix" for path in wanted if path.suffix.lower() not in suffixes)
    reasons = {path: why_not(path) for path in _once(files, left_out)}
    left_out.update(reason for reason in reasons.values() if reason)
    files = [path for path, reason in reasons.items() if not reason]
    if data.pattern is None:
        files = _more_of_them(files, data.path, left_out)
    left_out = +left_out  # without zeros
    if files and left_out:
        counted = ", ".join(f"{count} {why}" for why, count in left_out.most_common())
        tell(f"{data.name}: {len(files)} files are read; left out are {counted}")
    return {file_id(path, data.path): path for path in files}


def _more_of_them(files: list[Path], folder: Path, left_out: Counter[str]) -> list[Path]:
    """Takes the files directly in a folder, or those in folders below it, whichever are more."""
    direct = [path for path in files if path.parent == folder]
    below = [path for path in files if path.parent != folder]
    if direct and len(direct) >= len(below):
        left_out["in folders below"] += len(below)
        return direct
    left_out["above the folders of the others"] += len(direct)
    return below


def _once(files: list[Path], left_out: Counter[str]) -> list[Path]:
    """Leaves out links to files that are there anyway: the same thing would be on both sides of a split."""
    links = {path for path in files if path.is_symlink()}
    seen = {os.path.realpath(path) for path in files if path not in links} if links else set()
    kept = []
    for path in files:
        if path in links:
            target = os.path.realpath(path)
            if target in seen:
                left_out["link to what is read already"] += 1
                continue
            seen.add(target)
        kept.append(path)
    return kept


def file_id(path: Path, folder: Path) -> str:
    """Names a file by its path below a folder, as :func:`readable`."""
    return readable(path.relative_to(folder).as_posix())


def readable(name: str) -> str:
    """Writes what is no UTF-8 in the name of a file as ``\\xNN``, so that it can be stored and shown."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def shared_groups(ids: list[str], designs: list[str]) -> list[str]:
    """Groups instances whose design is the same by its name, and leaves all others to themselves: their id."""
    counts = Counter(designs)
    return [design if counts[design] > 1 else id for id, design in zip(ids, designs, strict=True)]
