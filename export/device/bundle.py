"""The bundle as a folder: its manifest and files, checked before anything of them is used."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import struct
import tokenize
import zipfile
import zlib
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .graph_file import check_graph_file
from .json_files import check_form, read_json

MANIFEST = "manifest.json"

SCHEMA = 2

UNFINISHED = "unfinished"


def manifest_digest(manifest: dict) -> str:
    """Hashes a manifest without its own ``digest`` (SHA-256); it finds damage, it does not prove an origin."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


_POINTS = 1 << 26  # of a grid

T = TypeVar("T")

ENGINES = "engines"  # where plans lie; the manifest does not list what a device builds

_GRAPH_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


_WHY_NOT = {
    "sampler": "samplers need a model with a prior",
    "rays": "rays and points need a model of radiance fields",
    "points": "rays and points need a model of radiance fields",
    "encoder": "`mnif export --encoder` adds it, for models of `mnif fit --method encoder`",
}


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


_SIZE, _AXES = range(1, 1 << 24), [range(1, 1 << 16)]
_TENSOR = {"name": str, "type": str, "shape": [(range(1, 1 << 24), str)]}
_GRAPH = {
    "kind": str,
    "precision": str,
    "storage": str,
    "file": str,
    "opset": range(1, 100),
    "inputs": [_TENSOR],
    "outputs": [_TENSOR],
    "profile": {str: {str: [_SIZE]}},
    "steps": (range(1, 10001), None),
    "instance": (dict, None),
    "half": [str],
    "reference": (str, None),
    "psnr": (float, None),
    "tolerance": ({"max_abs": float, "psnr": float}, None),
}
_RADIANCE = {"size": _AXES, "intrinsics": [float], "camera_distance": float}
_PROFILE = {
    "data": str,
    "instances": _SIZE,
    "false_alarm_rate": float,
    "patches": [range(1, 1 << 12)],
}
_MANIFEST = {
    "signal": str,
    "decoder_fingerprint": str,
    "package": {"name": str, "version": str},
    "grid": {"dimensions": range(1, 9), "resolution": _AXES, "cells": range(1, 1 << 16), "overlap": float},
    "values": {"channels": range(1, 65), "padded_channels": range(1, 65)},
    "radiance": (_RADIANCE, None),
    "sampling": ({"latent_dim": range(1, 1 << 20), "num_inference_steps": [range(1, 10001)]}, None),
    "profile": (_PROFILE, None),
    "field": ({"sizes": _AXES, "last_layer": str}, None),
    "graphs": {str: _GRAPH},
    "files": {str: {"sha256": str, "bytes": range(1 << 40)}},
}


def _check_manifest(manifest: dict) -> None:
    """Checks what a form cannot say. Raises a ValueError."""
    grid, values, files = manifest["grid"], manifest["values"], manifest["files"]
    if len(grid["resolution"]) != grid["dimensions"] or math.prod(grid["resolution"]) > _POINTS:
        raise ValueError(f"grid.resolution {grid['resolution']} is not for {grid['dimensions']} axes, or too large")
    if grid["cells"] ** grid["dimensions"] > 1 << 16 or not 0 <= grid["overlap"] <= 0.5:
        raise ValueError(f"grid: {grid['cells']} cells per axis that overlap by {grid['overlap']}")
    if values["channels"] > values["padded_channels"]:
        raise ValueError(f"values.channels {values['channels']} are more than are padded to")
    radiance = manifest["radiance"]
    if radiance is not None and (
        len(radiance["size"]) != 2 or len(radiance["intrinsics"]) != 4 or min(radiance["intrinsics"][:2]) <= 0
    ):
        raise ValueError("radiance: two sizes and four intrinsics are needed")
    for name, graph in manifest["graphs"].items():
        if not _GRAPH_NAME.fullmatch(name):  # plans are named after graphs
            raise ValueError(f"a graph cannot be named {name!r}")
        if graph["file"] not in files:
            raise ValueError(f"files has no {graph['file']}")
        if not graph["outputs"] or not all(each["shape"] for each in graph["inputs"] + graph["outputs"]):
            raise ValueError(f"graphs.{name} has no outputs, or tensors without a shape")
        if graph["kind"] == "sampler" and (graph["steps"] is None or manifest["sampling"] is None):
            raise ValueError(f"graphs.{name} is a sampler without steps")


_DAMAGED_ARCHIVE = (
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    SyntaxError,
    tokenize.TokenError,
    MemoryError,
    OverflowError,
    RuntimeError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


def _check_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises a ValueError unless an array is as large as its header says, and fits into memory."""
    with archive.open(member) as file:
        np.lib.format.read_magic(file)
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
        size = math.prod(shape) * kind.itemsize
        if kind.kind not in "fiu" or size != member.file_size - file.tell() or size > 1 << 28:
            raise ValueError(f"{member.filename} should hold {kind} {list(shape)}")


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
        file = self.path / MANIFEST
        try:
            manifest = read_json(file)
        except OSError as error:
            raise BundleError(f"{file}: {error.strerror}; `mnif export` writes a bundle") from None
        except ValueError as error:
            raise BundleError(f"{file}: not JSON ({error}); export the bundle again") from None
        if isinstance(manifest, dict) and manifest.get("schema") == UNFINISHED:
            raise BundleError(f"{file}: the export was stopped half-way; run `mnif export` again")
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            raise BundleError(f"{file}: not a bundle of schema {SCHEMA}; export again with this version")
        if manifest.get("digest") != manifest_digest(manifest):
            raise BundleError(f"{file}: was changed after the export; export the bundle again")
        try:
            check_form({"profile": None, "field": None, **manifest}, _MANIFEST)  # earlier versions have neither
            _check_manifest(manifest)
        except ValueError as error:
            raise BundleError(f"{file}: {error}; export the bundle again") from None
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
            none = "none was exported: " + _WHY_NOT.get(kind, "another model, or other flags of `mnif export`")
            there = f"there are {', '.join(names)}" if names else none
            raise BundleError(f"{self.path}: no graph of kind {kind}{wish}; {there}")
        return found

    def onnx_sha256(self, name: str) -> str:
        """Looks up the hash of a graph's file in the manifest."""
        return entry(self.manifest, "files", entry(self.graph(name), "file", kind=str), "sha256", kind=str)

    def onnx(self, name: str) -> bytes:
        """Reads a graph's file.

        Raises:
            BundleError: it holds something that no export writes (:func:`check_graph_file`).
        """
        graph = self.graph(name)
        content = self.read(graph["file"])
        try:
            check_graph_file(content, graph)
        except (ValueError, IndexError, struct.error) as error:
            raise BundleError(f"{self.path / graph['file']}: not a usable graph ({error})") from None
        return content

    def reference(self) -> dict[str, np.ndarray]:
        """Reads fixed inputs and their outputs in float64, by the names the manifest explains."""
        return self.arrays("reference.npz")

    def arrays(self, file: str) -> dict[str, np.ndarray]:
        """Reads the arrays of an ``.npz`` file, by name.

        Raises:
            BundleError: it is damaged, or its hash is not the manifest's.
        """
        content = io.BytesIO(self.read(file))
        try:
            with zipfile.ZipFile(content) as archive:
                for member in archive.infolist():
                    _check_array(archive, member)
            content.seek(0)
            with np.load(content, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except _DAMAGED_ARCHIVE as error:
            raise BundleError(f"{self.path / file}: damaged ({error}); export the bundle again") from None

    def read(self, file: str) -> bytes:
        """Reads a file's bytes, the very ones that were hashed.

        Args:
            file: path inside the bundle, as the manifest lists it.

        Raises:
            BundleError: it is missing, lies outside, or its hash is not the manifest's.
        """
        try:
            path = (self.path / file).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise BundleError(f"{self.path}: the manifest names no file ({error})") from None
        if self.path.resolve() not in path.parents:
            raise BundleError(f"{self.path}: the manifest points outside the bundle ({file})")
        size = entry(self.manifest, "files", file, "bytes", kind=int)
        try:
            if path.stat().st_size != size:
                raise BundleError(f"{path}: differs from what was exported ({size} bytes); export the bundle again")
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
