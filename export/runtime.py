"""Pictures from an exported bundle with NumPy and ONNX Runtime alone.

This file stands by itself: it imports nothing but these two, a copy of it lies in every bundle, and it runs on the
Python 3.8 of older boards.

    python runtime.py --num_samples 16 --seed 0 --output_dir out
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
import onnxruntime

SCHEMA = 1
T = TypeVar("T")


class BundleError(Exception):
    """A bundle that is incomplete, changed or unusable, or a wish it cannot meet: one line for the user."""


def initial_noise(seed: int, indices: range, latent_dim: int) -> np.ndarray:
    """Standard normal noise for samples ``indices`` of ``seed``: [N, latent_dim] float32.

    Sample i depends on seed and i alone, so pictures do not change with the batch size.
    """
    return np.stack([np.random.default_rng([seed, i]).standard_normal(latent_dim, dtype=np.float32) for i in indices])


def to_pixels(values: np.ndarray) -> np.ndarray:
    """Values in about [-1, 1] → uint8 of the same shape, clipped and rounded."""
    return np.round(np.clip(values, -1, 1) * 127.5 + 127.5).astype(np.uint8)


def manifest_digest(manifest: dict) -> str:
    """The SHA-256 of a manifest without its own ``digest``; it finds damage, it does not prove where it came from."""
    rest = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Bundle:
    """A bundle folder ready to run; graphs are checked against the manifest and loaded at first use.

    Args:
        folder: the bundle.
        manifest: its checked manifest.
        threads: of ONNX Runtime; 0 lets it choose.
    """

    def __init__(self, folder: Path, manifest: dict, threads: int = 0):
        self.folder, self.manifest, self._threads = folder, manifest, threads
        self._sessions: dict[str, onnxruntime.InferenceSession] = {}

    def sample(self, num_samples: int, seed: int = 0, start: int = 0, batch_size: int = 16) -> np.ndarray:
        """Draws new pictures: samples ``start`` to ``start + num_samples - 1`` of ``seed``, [N, R, R, C] uint8.

        Raises:
            BundleError: a number is out of range, or the sampler's file is missing or changed.
        """
        _check_least("num_samples", num_samples, 1)
        _check_least("seed", seed, 0)
        _check_least("start", start, 0)
        _check_least("batch_size", batch_size, 1)
        latent_dim = _entry(self.manifest, "sampling", "latent_dim", kind=int)
        parts = []
        end = start + num_samples
        for begin in range(start, end, batch_size):
            noise = initial_noise(seed, range(begin, min(begin + batch_size, end)), latent_dim)
            parts.append(to_pixels(self.run("sampler", noise)))
        return np.concatenate(parts)

    def decode(self, coefficients: np.ndarray) -> np.ndarray:
        """Mixture coefficients [B, cells, layers, bases] → values [B, R, R, C] float32 in about [-1, 1]."""
        return self.run("decoder", coefficients)

    def baked(self, name: str, resolution: int) -> np.ndarray:
        """A baked sample, such as ``"baked_0000"``, at any resolution: values [R, R, C] float32 in about [-1, 1].

        Raises:
            BundleError: there is no such graph, or the resolution is below 1.
        """
        if not name.startswith("baked"):
            raise BundleError(f"{name} is not a baked sample")
        grid = _entry(self.manifest, "grid", kind=dict)
        cells, dimensions = _entry(grid, "cells", kind=int), _entry(grid, "dimensions", kind=int)
        coordinates, first, second, weight = axis_cells(resolution, cells, _entry(grid, "overlap", kind=float))
        values = self.run(name, _all_points(coordinates, dimensions))
        return _blended(values, first, second, weight, dimensions)

    def run(self, name: str, array: np.ndarray) -> np.ndarray:
        """Runs a graph of the manifest on its one input, given as float32 of the shape the manifest names."""
        session = self._session(name)
        entry = session.get_inputs()[0]
        array = np.ascontiguousarray(array, dtype=np.float32)
        fixed = [axis for axis, size in enumerate(entry.shape) if isinstance(size, int)]
        if array.ndim != len(entry.shape) or any(array.shape[axis] != entry.shape[axis] for axis in fixed):
            raise BundleError(f"{name}: {entry.name} must be of shape {entry.shape}, not {list(array.shape)}")
        return session.run(None, {entry.name: array})[0]

    def _session(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self._sessions:
            graphs = _entry(self.manifest, "graphs", kind=dict)
            if name not in graphs:
                raise BundleError(f"{self.folder}: no graph {name}; there are {', '.join(sorted(graphs))}")
            file = _entry(graphs, name, "file", kind=str)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            content = self._checked(file)  # the very bytes that were hashed are run
            try:
                session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            except Exception as error:  # ONNX Runtime's errors have no common class
                raise BundleError(f"{self.folder / file}: not a usable graph ({str(error).splitlines()[0]})") from None
            self._sessions[name] = session
        return self._sessions[name]

    def _checked(self, file: str) -> bytes:
        """A file's bytes, if it lies in the bundle and its hash is the manifest's."""
        path = (self.folder / file).resolve()
        if self.folder.resolve() not in path.parents:
            raise BundleError(f"{self.folder}: the manifest points outside the bundle ({file})")
        try:
            content = path.read_bytes()
        except OSError as error:
            raise BundleError(f"{path}: {error.strerror}; export the bundle again") from None
        if hashlib.sha256(content).hexdigest() != _entry(self.manifest, "files", file, "sha256", kind=str):
            raise BundleError(f"{path}: differs from what was exported (SHA-256); export the bundle again")
        return content


def load_bundle(folder: str | Path, threads: int = 0) -> Bundle:
    """Opens a bundle.

    Args:
        folder: as `mnif export` wrote it.
        threads: of ONNX Runtime within an operator; 0 lets it choose.

    Raises:
        BundleError: the manifest is missing, of another version, or changed.
    """
    _check_least("threads", threads, 0)
    path = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; `mnif export` writes a bundle") from None
    except ValueError:
        raise BundleError(f"{path}: not JSON; export the bundle again") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        raise BundleError(f"{path}: not a bundle of schema {SCHEMA}; export again with this version")
    if manifest.get("digest") != manifest_digest(manifest):
        raise BundleError(f"{path}: was changed after the export; export the bundle again")
    return Bundle(Path(folder), manifest, threads)


def axis_cells(resolution: int, cells: int, overlap: float) -> tuple:
    """One axis of pixels as its cells see it.

    Args:
        resolution: pixels along the axis, at least 1.
        cells: cells along the axis.
        overlap: how far a cell reaches over its borders, as a fraction of its width.

    Returns:
        ``coordinates`` [cells, points] in each cell's own [-1, 1]; for each pixel ``first`` and ``second``, the places
        of its two values among the flattened (cells, points), and ``weight``, the share of the second.
    """
    _check_least("resolution", resolution, 1)
    position = (np.arange(resolution) + 0.5) * cells / resolution
    reach = max(overlap - 1e-9, 0.0) if cells > 1 else 0.0  # a pixel on the very rim has weight 0 and is left out
    start = np.ceil((np.arange(cells) - reach) * resolution / cells - 0.5).astype(np.int64)
    stop = np.floor((np.arange(cells) + 1 + reach) * resolution / cells - 0.5).astype(np.int64) + 1
    points = max(int((stop - start).max()), 1)
    pixel = start[:, None] + np.arange(points)
    coordinates = ((pixel + 0.5) * cells / resolution - np.arange(cells)[:, None]) * 2 - 1

    inside = np.minimum(position.astype(np.int64), cells - 1)
    border = np.rint(position).astype(np.int64)
    distance = position - border
    blended = (border >= 1) & (border < cells) & (np.abs(distance) < reach)
    left, right = np.where(blended, border - 1, inside), np.where(blended, border, inside)
    ramp = np.clip(distance / (2 * overlap) + 0.5, 0, 1) if overlap > 0 else np.zeros(resolution)
    weight = np.where(blended, ramp, 0.0)
    row = np.arange(resolution)
    return coordinates, left * points + row - start[left], right * points + row - start[right], weight


def _all_points(coordinates: np.ndarray, dimensions: int) -> np.ndarray:
    """[cells, points] of one axis → [cells**d, points**d, d], the last axis of the picture running fastest."""
    count, points = coordinates.shape
    cell = np.array(list(itertools.product(range(count), repeat=dimensions)))
    point = np.stack(np.meshgrid(*[np.arange(points)] * dimensions, indexing="ij"), axis=-1).reshape(-1, dimensions)
    return coordinates[cell[:, None, :], point[None, :, :]]


def _blended(
    values: np.ndarray, first: np.ndarray, second: np.ndarray, weight: np.ndarray, dimensions: int
) -> np.ndarray:
    """[cells**d, points**d, channels] → [resolution, ..., resolution, channels]."""
    cells, points = (round(size ** (1 / dimensions)) for size in values.shape[:2])
    values = values.reshape([cells] * dimensions + [points] * dimensions + [-1])
    order = [axis + offset for axis in range(dimensions) for offset in (0, dimensions)]
    values = values.transpose([*order, 2 * dimensions]).reshape([cells * points] * dimensions + [-1])
    for axis in range(dimensions):
        share = weight.astype(np.float32).reshape([-1] + [1] * (dimensions - axis))
        ours, theirs = values.take(first, axis), values.take(second, axis)
        values = ours + share * (theirs - ours)
    return values


def _check_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise BundleError(f"{name} {value}: must be at least {least}")


def _entry(table: dict, *keys: str, kind: type[T]) -> T:
    """What a manifest holds under ``keys``, which must be of ``kind``."""
    found: object = table
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, kind):
        raise BundleError("the manifest has no usable {}; export the bundle again".format(" → ".join(keys)))
    return found


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes [height, width, 1 to 4] uint8: grey, grey and alpha, RGB, RGBA."""
    height, width, channels = pixels.shape
    if channels not in (1, 2, 3, 4):
        raise BundleError(f"values with {channels} channels are not a picture")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    temporary = path.with_name(path.name + ".tmp")  # a picture under its own name is a whole one
    temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    temporary.replace(path)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: list | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    parser = _Parser(prog="runtime.py", description="Draw pictures from a bundle, on the CPU, without torch.")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).parent, help="the folder (default: this file's)")
    parser.add_argument("--num_samples", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first sample")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 lets it choose")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args(arguments)
    try:
        bundle = load_bundle(options.bundle, options.threads)
        begun = time.perf_counter()
        images = bundle.sample(options.num_samples, options.seed, options.start, options.batch_size)
        seconds = time.perf_counter() - begun
        options.output_dir.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images, start=options.start):
            write_png(options.output_dir / f"{index:06d}.png", image)
    except (BundleError, OSError) as error:
        print(f"runtime.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.output_dir}: {len(images)} pictures drawn, {len(images) / seconds:.1f} images/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
