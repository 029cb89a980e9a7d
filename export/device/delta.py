"""A delta: what makes a newer bundle of an older one, as `mnif export --since` writes it.

``delta.json`` says which bundle it applies to and which one it makes, and of what each file that the older one lacks
is put together: pieces of the older bundle's files, and of ``delta.bin``, one zlib stream of all that is new. Files
that it does not name are those of the older bundle. It is about bytes and knows nothing of graphs.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Iterator

from .bundle import ENGINES, MANIFEST, BundleError, BundleFolder, manifest_digest
from .json_files import check_form, read_json

DELTA, DATA = "delta.json", "delta.bin"

DELTA_SCHEMA = 1

_LARGEST = 1 << 31  # bytes of a file; a graph cannot have more
_PIECE = 1 << 20

_BUNDLE = {"digest": str, "decoder_fingerprint": str, "version": str}
# A step is [length], as many of the new bytes, or [source, offset, length], a piece of a file of the older bundle.
_FILE = {"sha256": str, "bytes": range(_LARGEST), "steps": [[range(_LARGEST)]]}
_FORM = {
    "base": _BUNDLE,
    "bundle": _BUNDLE,
    "sources": [str],
    "files": {str: _FILE},
    "data": {"sha256": str, "bytes": range(_LARGEST)},
}


def describe_bundle(manifest: dict[str, Any]) -> dict[str, str]:
    """Says which bundle a manifest is of, as a delta notes it."""
    return {
        "digest": manifest["digest"],
        "decoder_fingerprint": manifest["decoder_fingerprint"],
        "version": manifest["package"]["version"],
    }


def name_bundle(described: dict[str, str]) -> str:
    """Names a bundle in a message."""
    model = described["decoder_fingerprint"][:12]
    return f"{described['digest'][:12]} (model {model}, written by mnif {described['version']})"


class Delta:
    """A delta whose two files are checked: form, hashes, names, and that every step lies where it says.

    Args:
        path: the folder that `mnif export --since` wrote.

    Attributes:
        base: the bundle it applies to: digest, decoder_fingerprint and version.
        bundle: the one it makes, likewise.
        files: for each file that the older one lacks its sha256, bytes and steps; the manifest is one of them.

    Raises:
        BundleError: it is incomplete, changed, of another schema, or asks for what no delta does.
    """

    def __init__(self, path: Path):
        self.path = path
        file = path / DELTA
        try:
            content = read_json(file)
        except OSError as error:
            raise BundleError(f"{file}: {error.strerror}; `mnif export --since` writes a delta") from None
        except ValueError as error:
            raise BundleError(f"{file}: not JSON ({error}); transfer the delta again") from None
        if not isinstance(content, dict) or content.get("schema") != DELTA_SCHEMA:
            raise BundleError(f"{file}: not a delta of schema {DELTA_SCHEMA}; export it again with this version")
        if content.get("digest") != manifest_digest(content):
            raise BundleError(f"{file}: was changed after the export; transfer the delta again")
        try:
            check_form(content, _FORM, "the delta")
            _check_steps(content)
        except ValueError as error:
            raise BundleError(f"{file}: {error}; export the delta again") from None
        self.base: dict[str, str] = content["base"]
        self.bundle: dict[str, str] = content["bundle"]
        self.files: dict[str, dict[str, Any]] = content["files"]
        self._sources: list[str] = content["sources"]
        _check_file(path / DATA, content["data"])

    def check_base(self, folder: BundleFolder) -> None:
        """Refuses a bundle that this delta does not apply to.

        Raises:
            BundleError: it is another one, or lacks a file that the delta takes pieces of.
        """
        here = describe_bundle(folder.manifest)
        if here["digest"] != self.base["digest"]:
            raise BundleError(
                f"{self.path} applies to the bundle {name_bundle(self.base)}; {folder.path} is {name_bundle(here)}"
            )
        for name in self._sources:
            if name not in folder.manifest["files"] and name != MANIFEST:
                raise BundleError(f"{self.path / DELTA}: the bundle it applies to has no {name}; export it again")

    def rebuilt(self, folder: BundleFolder) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Puts together the files that the older bundle lacks, one after the other.

        Args:
            folder: the bundle it applies to (:meth:`check_base`).

        Yields:
            A file's name, and its content in pieces, to be taken before the next file is asked for.

        Raises:
            BundleError: a file of the older bundle differs from what was exported, or one that was put together from
                what the delta states.
        """
        sources = [
            (folder.path / name).read_bytes() if name == MANIFEST else folder.read(name) for name in self._sources
        ]
        with (self.path / DATA).open("rb") as file:
            new = _NewBytes(file, self.path / DATA)
            for name in sorted(self.files):
                yield name, self._pieces(name, sources, new)

    def _pieces(self, name: str, sources: list[bytes], new: _NewBytes) -> Iterator[bytes]:
        digest = hashlib.sha256()
        for step in self.files[name]["steps"]:
            for piece in new.take(step[0]) if len(step) == 1 else _pieces_of(sources[step[0]], *step[1:]):
                digest.update(piece)
                yield piece
        if digest.hexdigest() != self.files[name]["sha256"]:
            raise BundleError(f"{self.path}: {name} becomes another file than was exported; export the delta again")

    def check_made(self, new: BundleFolder, old: BundleFolder) -> list[str]:
        """Makes sure that a manifest that was put together is the one the delta is for.

        Returns:
            The files of the new bundle that are those of the old one.

        Raises:
            BundleError: it is of another bundle, or names files that are neither in the delta nor in the old bundle.
        """
        wanted, there = new.manifest["files"], old.manifest["files"]
        made = {name: file for name, file in self.files.items() if name != MANIFEST}
        same = [name for name in wanted if name not in made]
        fits = new.manifest["digest"] == self.bundle["digest"] and all(wanted.get(name) for name in made)
        fits = fits and all(wanted[name]["sha256"] == made[name]["sha256"] for name in made)
        if not fits or any(there.get(name) != wanted[name] or not _is_inside(name) for name in same):
            raise BundleError(f"{self.path}: its manifest is of other files than it makes; export the delta again")
        return same


def _check_steps(content: dict[str, Any]) -> None:
    """Raises a ValueError for what a form cannot say: names that lead elsewhere, and steps that do not fill a file."""
    if MANIFEST not in content["files"] and content["files"]:
        raise ValueError(f"it makes files and no {MANIFEST}")
    for name, file in content["files"].items():
        if not _is_inside(name):
            raise ValueError(f"it makes {name[:80]!r}, which is no file of a bundle")
        for step in file["steps"]:
            if len(step) not in (1, 3) or (len(step) == 3 and step[0] >= len(content["sources"])):
                raise ValueError(f"{name} has the step {step[:4]}")
        if sum(step[-1] for step in file["steps"]) != file["bytes"]:
            raise ValueError(f"the steps of {name} do not make {file['bytes']} bytes")


def _is_inside(name: str) -> bool:
    """Tells whether a name is that of a file which a bundle can have, written in the one way it can be."""
    path = PurePosixPath(name)
    usual = bool(path.parts) and path.as_posix() == name and "\0" not in name and "\\" not in name
    return usual and not path.is_absolute() and ".." not in path.parts and path.parts[0] != ENGINES


def _check_file(path: Path, stated: dict[str, Any]) -> None:
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        if size == stated["bytes"]:
            with path.open("rb") as file:
                for piece in iter(lambda: file.read(_PIECE), b""):
                    digest.update(piece)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; transfer the delta again") from None
    if size != stated["bytes"] or digest.hexdigest() != stated["sha256"]:
        raise BundleError(f"{path}: differs from what was exported; transfer the delta again")


def _pieces_of(source: bytes, offset: int, length: int) -> Iterator[bytes]:
    if offset + length > len(source):
        raise BundleError(f"the delta takes bytes {offset} to {offset + length} of a file of {len(source)}")
    for begin in range(offset, offset + length, _PIECE):
        yield source[begin : min(begin + _PIECE, offset + length)]


class _NewBytes:
    """What ``delta.bin`` holds, unpacked as it is asked for and never further."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._path = file, path
        self._unpacker, self._packed = zlib.decompressobj(), b""

    def take(self, length: int) -> Iterator[bytes]:
        """Yields the next ``length`` bytes. Raises a BundleError where there are fewer."""
        while length:
            try:
                piece = self._unpacker.decompress(self._packed, min(length, _PIECE))
            except zlib.error as error:
                raise BundleError(f"{self._path}: damaged ({error}); export the delta again") from None
            self._packed = self._unpacker.unconsumed_tail
            if piece:
                length -= len(piece)
                yield piece
            elif not self._packed:  # else only a header was read
                self._packed = self._file.read(_PIECE)
                if not self._packed or self._unpacker.eof:
                    raise BundleError(f"{self._path}: ends too early; export the delta again")
