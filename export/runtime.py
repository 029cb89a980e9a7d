"""A bundle at work without torch: noise to pictures, coefficients to pictures, a baked instance at any resolution.

    bundle = load_bundle("bundle")
    values = Sampler(bundle)(num_samples=16, seed=0)

Graphs run in TensorRT, ONNX Runtime or OpenVINO (``export/backends.py``), with the same results within the manifest's
tolerances. This file stands by itself (Python 3.8, NumPy) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from export.backends import load_graph
from export.bundle_folder import BundleError, BundleFolder, check_least, entry
from export.pixels import axis_cells, blended, cell_points


def load_bundle(folder: str | Path, backend: str = "auto", threads: int = 0) -> Bundle:
    """Opens a bundle.

    Args:
        folder: as `mnif export` wrote it.
        backend: ``"tensorrt"``, ``"onnxruntime"``, ``"openvino"``, or ``"auto"`` for the best that is there.
        threads: of a backend on the CPU; 0 lets it choose.

    Raises:
        BundleError: the manifest is missing, of another schema, or changed.
    """
    check_least("threads", threads, 0)
    return Bundle(BundleFolder(folder), backend, threads)


class Bundle:
    """A bundle ready to run; a graph is checked against the manifest and loaded at first use.

    Args:
        folder: the bundle.
        backend: as :func:`load_bundle` has it.
        threads: likewise.
    """

    def __init__(self, folder: BundleFolder, backend: str = "auto", threads: int = 0):
        self.folder, self.manifest = folder, folder.manifest
        self._backend, self._threads = backend, threads
        self._graphs: dict[str, Any] = {}

    def run(self, name: str, *arrays: np.ndarray) -> list[np.ndarray]:
        """Runs a graph.

        Args:
            name: of the graph.
            arrays: its inputs in order, taken as float32.

        Raises:
            BundleError: there is no such graph, a shape does not fit, or the file is missing or changed.
        """
        inputs = entry(self.folder.graph(name), "inputs", kind=list)
        if len(arrays) != len(inputs):
            raise BundleError(f"{name} takes {', '.join(each['name'] for each in inputs)}, not {len(arrays)} arrays")
        given = {}
        sizes: dict[str, int] = {}
        for tensor, array in zip(inputs, arrays):
            array = np.ascontiguousarray(array, dtype=np.float32)
            shape = tensor["shape"]
            fits = array.ndim == len(shape) and all(
                size == (axis if isinstance(axis, int) else sizes.setdefault(axis, size))
                for axis, size in zip(shape, array.shape)
            )
            if not fits:
                raise BundleError(f"{name}: {tensor['name']} must be of shape {shape}, not {list(array.shape)}")
            given[tensor["name"]] = array
        return self.graph(name)(given)

    def graph(self, name: str) -> Any:
        """The loaded graph (:func:`export.backends.load_graph`)."""
        if name not in self._graphs:
            self._graphs[name] = load_graph(self.folder, name, self._backend, self._threads)
        return self._graphs[name]

    def cut(self, values: np.ndarray) -> np.ndarray:
        """Values without the channels that only fill up to four."""
        return values[..., : entry(self.manifest, "values", "channels", kind=int)]


class Decoder:
    """Mixture coefficients → values on the bundle's grid.

    Args:
        bundle: what to run.
        precision: ``"fp32"`` or ``"mixed"``; None takes what is there, float32 first.
    """

    def __init__(self, bundle: Bundle, precision: str | None = None):
        self._bundle, self.name = bundle, bundle.folder.find_graphs("decoder", precision=precision)[0]

    def __call__(self, coefficients: np.ndarray) -> np.ndarray:
        """Coefficients [B, cells, layers, bases] → values [B, resolution, ..., channels] in about [-1, 1]."""
        return self._bundle.cut(self._bundle.run(self.name, coefficients)[0])


class Sampler:
    """Noise → new instances.

    Args:
        bundle: what to run.
        precision: ``"fp32"`` or ``"mixed"``; None takes what is there, float32 first.
        steps: evaluations of the denoiser; None takes the sampler with the most.
    """

    def __init__(self, bundle: Bundle, precision: str | None = None, steps: int | None = None):
        names = bundle.folder.find_graphs("sampler", precision=precision, steps=steps)
        self._bundle, self.name = bundle, max(names, key=lambda name: bundle.folder.graph(name)["steps"])
        self._latent_dim = entry(bundle.manifest, "sampling", "latent_dim", kind=int)
        self._gives_values = bundle.folder.graph(self.name)["outputs"][0]["name"] == "values"

    def __call__(self, num_samples: int, seed: int = 0, start: int = 0, batch_size: int = 16) -> np.ndarray:
        """Samples ``start`` to ``start + num_samples - 1`` of ``seed``.

        Returns:
            Values [N, resolution, ..., channels] in about [-1, 1]; of a radiance field coefficients
            [N, cells, layers, bases], for its rays.

        Raises:
            BundleError: a number is out of range, or the graph's file is missing or changed.
        """
        for name, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0), ("start", start, 0)):
            check_least(name, value, least)
        check_least("batch_size", batch_size, 1)
        parts = []
        end = start + num_samples
        for begin in range(start, end, batch_size):
            noise = initial_noise(seed, range(begin, min(begin + batch_size, end)), self._latent_dim)
            parts.append(self._bundle.run(self.name, noise)[0])
        values = np.concatenate(parts)
        return self._bundle.cut(values) if self._gives_values else values


class BakedInstance:
    """One instance as coordinate networks of its own, at any resolution.

    Args:
        bundle: what to run.
        name: of the graph, such as ``"baked_0000"``.
    """

    def __init__(self, bundle: Bundle, name: str):
        if bundle.folder.graph(name).get("kind") != "baked":
            raise BundleError(f"{name} is not a baked instance")
        self._bundle, self.name = bundle, name

    def __call__(self, resolution: int | list[int]) -> np.ndarray:
        """Values [resolution, ..., channels] in about [-1, 1]; one number is pixels along every axis."""
        grid = entry(self._bundle.manifest, "grid", kind=dict)
        cells, dimensions = entry(grid, "cells", kind=int), entry(grid, "dimensions", kind=int)
        sizes = [resolution] * dimensions if isinstance(resolution, int) else resolution
        axes = [axis_cells(size, cells, float(grid["overlap"])) for size in sizes]
        return self._bundle.cut(blended(self._bundle.run(self.name, cell_points(axes))[0], axes))


def initial_noise(seed: int, indices: range, latent_dim: int) -> np.ndarray:
    """Standard normal noise for samples ``indices`` of ``seed``: [N, latent_dim] float32.

    Sample i depends on seed and i alone, so pictures do not change with the batch size.
    """
    return np.stack([np.random.default_rng([seed, i]).standard_normal(latent_dim, dtype=np.float32) for i in indices])
