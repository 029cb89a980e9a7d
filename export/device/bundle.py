"""The bundle as a folder: its manifest, checked, and files written so that a power cut leaves the old or the new."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np


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


SCHEMA = 2


UNFINISHED = "unfinished"


def manifest_digest(manifest: dict) -> str:
    """Hashes a manifest without its own ``digest`` (SHA-256); it finds damage, it does not prove an origin."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


T = TypeVar("T")


ENGINES = "engines"  # where plans lie; the manifest does not list what a device builds


_GRAPH_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class BundleError(Exception):
    """A bundle that is incomplete, changed or unusable, or a wish it cannot meet: one line for the user."""


class BackendMissing(BundleError):  # noqa: N818
    """A backend that cannot be had on this machine."""


def import_backend(name: str) -> Any:
    """Imports a package that may be missing, or broken in whatever way.

    Raises:
        BackendMissing: it cannot be imported; the line has the real reason, such as a library that it lacks.
    """
    try:
        return import_module(name)
    except Exception as error:  # on a board: ImportError, AttributeError (a newer numpy), OSError (a library), ...
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise BackendMissing(f"{name} is not installed") from None
        reason = " ".join(str(error).split()) or "no reason given"
        raise BackendMissing(f"{name} cannot be imported: {type(error).__name__}: {reason}") from None


class BundleFolder:
    """A bundle with a checked manifest.

    Args:
        path: the folder `mnif export` wrote.

    Attributes:
        path: the same.
        manifest: its content, of the schema in ``export/device/bundle.py``.

    Raises:
        BundleError: the manifest is missing, of another schema, or was changed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / "manifest.json"
        try:
            manifest = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise BundleError(f"{file}: {error.strerror}; `mnif export` writes a bundle") from None
        except ValueError:
            raise BundleError(f"{file}: not JSON; export the bundle again") from None
        if isinstance(manifest, dict) and manifest.get("schema") == UNFINISHED:
            raise BundleError(f"{file}: the export was stopped half-way; run `mnif export` again")
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise BundleError(f"{file}: not a bundle of schema {SCHEMA}; export again with this version")
        if manifest.get("digest") != manifest_digest(manifest):
            raise BundleError(f"{file}: was changed after the export; export the bundle again")
        for name in entry(manifest, "graphs", kind=dict):
            if not _GRAPH_NAME.fullmatch(name):  # plans are named after graphs
                raise BundleError(f"{file}: a graph cannot be named {name!r}; export the bundle again")
        self.manifest: dict[str, Any] = manifest

    def graph(self, name: str) -> dict[str, Any]:
        """Looks up what the manifest says of a graph.

        Raises:
            BundleError: there is no such graph.
        """
        graphs = entry(self.manifest, "graphs", kind=dict)
        if name not in graphs:
            raise BundleError(f"{self.path}: no graph {name}; there are {', '.join(sorted(graphs))}")
        return entry(graphs, name, kind=dict)

    def find_graphs(self, kind: str, **wanted: Any) -> list[str]:
        """Names the graphs that take any instance, at least one.

        Args:
            kind: such as ``"decoder"``.
            wanted: further entries they must have, such as ``steps=4``; None lets any do.

        Raises:
            BundleError: there is none; the line lists those of that kind.
        """
        graphs = entry(self.manifest, "graphs", kind=dict)
        names = [name for name in sorted(graphs) if graphs[name].get("kind") == kind and not graphs[name]["instance"]]
        conditions = {key: value for key, value in wanted.items() if value is not None}
        found = [name for name in names if all(graphs[name].get(key) == each for key, each in conditions.items())]
        if not found:
            wish = "".join(f", {key} {value}" for key, value in conditions.items())
            none = "none was exported: samplers need a model with a prior, rays and points one of radiance fields"
            there = f"there are {', '.join(names)}" if names else none
            raise BundleError(f"{self.path}: no graph of kind {kind}{wish}; {there}")
        return found

    def onnx_sha256(self, name: str) -> str:
        """Looks up the hash of a graph's file in the manifest."""
        return entry(self.manifest, "files", entry(self.graph(name), "file", kind=str), "sha256", kind=str)

    def onnx(self, name: str) -> bytes:
        """Reads a graph's file."""
        return self.read(entry(self.graph(name), "file", kind=str))

    def reference(self) -> dict[str, np.ndarray]:
        """Reads fixed inputs and their outputs in float64, by the names the manifest explains."""
        with np.load(io.BytesIO(self.read("reference.npz")), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def read(self, file: str) -> bytes:
        """Reads a file's bytes, the very ones that were hashed.

        Args:
            file: path inside the bundle, as the manifest lists it.

        Raises:
            BundleError: it is missing, lies outside, or its hash is not the manifest's.
        """
        path = (self.path / file).resolve()
        if self.path.resolve() not in path.parents:
            raise BundleError(f"{self.path}: the manifest points outside the bundle ({file})")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; export the bundle again") from None
        if hashlib.sha256(content).hexdigest() != entry(self.manifest, "files", file, "sha256", kind=str):
            raise BundleError(f"{path}: differs from what was exported (SHA-256); export the bundle again")
        return content


def entry(table: dict[str, Any], *keys: str, kind: type[T]) -> T:
    """Looks up what a manifest holds under ``keys``, which must be of ``kind``.

    Raises:
        BundleError: there is nothing of that kind.
    """
    found: object = table
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, kind):
        raise BundleError(f"the manifest has no usable {' → '.join(keys)}; export the bundle again")
    return found


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuses a number that is too small.

    Raises:
        BundleError: it is below ``least``.
    """
    if value < least:
        raise BundleError(f"{name} {value}: must be at least {least}")
