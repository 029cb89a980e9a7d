"""Runs a bundle: decoder, sampler, baked instances and cameras, from noise or coefficients to values and pictures."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple, Sequence

import numpy as np

from .backends import load_graph
from .bundle import BundleError, BundleFolder, check_at_least, entry


class AxisCells(NamedTuple):
    """The points of one axis by cell, and how its pixels are blended.

    Attributes:
        coordinates: [cells, points], in each cell's own [-1, 1]; may reach past it by the overlap.
        first: [resolution], index of each pixel's value among the flattened (cells, points).
        second: [resolution], its neighbour's value.
        weight: [resolution] in [0, 1], the share of ``second``.
    """

    coordinates: np.ndarray
    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray


def axis_cells(resolution: int, cells: int, overlap: float) -> AxisCells:
    """Lays out the points each cell is asked at along one axis, and the one or two values that make each pixel.

    Args:
        resolution: pixels along the axis, at least 1.
        cells: cells along the axis.
        overlap: how far a cell reaches over its borders, as a fraction of its width.
    """
    check_at_least("resolution", resolution, 1)
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
    return AxisCells(coordinates, left * points + row - start[left], right * points + row - start[right], weight)


def cell_points(axes: Sequence[AxisCells]) -> np.ndarray:
    """Lists the points of all cells, [cells, points, dimensions] float32 over all axes, the last axis fastest."""
    counts, points = zip(*[axis.coordinates.shape for axis in axes])
    cell = np.array(list(itertools.product(*map(range, counts))))
    point = np.array(list(itertools.product(*map(range, points))))
    coordinates = [axis.coordinates[cell[:, k, None], point[None, :, k]] for k, axis in enumerate(axes)]
    return np.stack(coordinates, axis=-1).astype(np.float32)


def blend(values: np.ndarray, axes: Sequence[AxisCells]) -> np.ndarray:
    """Blends values at :func:`cell_points`, [cells, points, channels], to [resolution, ..., resolution, channels]."""
    dimensions = len(axes)
    counts, points = zip(*[axis.coordinates.shape for axis in axes])
    values = values.reshape([*counts, *points, values.shape[-1]])
    order = [axis + offset for axis in range(dimensions) for offset in (0, dimensions)]
    values = values.transpose([*order, 2 * dimensions])
    values = values.reshape([count * each for count, each in zip(counts, points)] + [values.shape[-1]])
    for k, axis in enumerate(axes):
        share = axis.weight.astype(np.float32).reshape([-1] + [1] * (dimensions - k))
        ours, theirs = values.take(axis.first, k), values.take(axis.second, k)
        values = ours + share * (theirs - ours)
    return values


def load_bundle(folder: str | Path, backend: str = "auto", threads: int = 0) -> Bundle:
    """Opens a bundle.

    Args:
        folder: as `mnif export` wrote it.
        backend: ``"tensorrt"``, ``"onnxruntime"``, ``"openvino"``, or ``"auto"`` for the best that is there.
        threads: of a backend on the CPU; 0 lets it choose.

    Raises:
        BundleError: the manifest is missing, of another schema, or changed.
    """
    check_at_least("threads", threads, 0)
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
        """Loads a graph (:func:`export.device.backends.load_graph`), once."""
        if name not in self._graphs:
            self._graphs[name] = load_graph(self.folder, name, self._backend, self._threads)
        return self._graphs[name]

    def cut(self, values: np.ndarray) -> np.ndarray:
        """Cuts off the channels that only fill up to four."""
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
        """Decodes coefficients [B, cells, layers, bases]: values [B, resolution, ..., channels] in about [-1, 1]."""
        return self._bundle.cut(self._bundle.run(self.name, coefficients)[0])


class Encoded(NamedTuple):
    """What an encoder makes of N observations.

    Attributes:
        latents: [N, latent_dim].
        coefficients: [N, cells, layers, bases], for :class:`Decoder`.
        fields: [N, cells, parameters], for :class:`Field`.
        cell_residuals: [N, cells], mean squared errors of what they decode to over what was seen of each cell.
        residual: [N], the same over all that was seen.
        patch_residuals: [N, patches], for :class:`export.device.gate.Gate`; None without a reference profile.
    """

    latents: np.ndarray
    coefficients: np.ndarray
    fields: np.ndarray
    cell_residuals: np.ndarray
    residual: np.ndarray
    patch_residuals: np.ndarray | None = None


class Encoder:
    """Observations → latents, coefficients, and what these miss of the observations.

    Args:
        bundle: what to run.
        precision: ``"fp32"`` or ``"mixed"``; None takes what is there, float32 first.

    Attributes:
        shape: of one observation, the points of each axis and then the channels.
        latent_dim: numbers in a latent.

    Raises:
        BundleError: the bundle has no encoder.
    """

    def __init__(self, bundle: Bundle, precision: str | None = None):
        self._bundle, self.name = bundle, bundle.folder.find_graphs("encoder", precision=precision)[0]
        graph = bundle.folder.graph(self.name)
        self.shape = tuple(entry(graph, "inputs", kind=list)[0]["shape"][1:])
        self.latent_dim = entry(graph, "outputs", kind=list)[0]["shape"][-1]

    def __call__(self, values: np.ndarray, mask: np.ndarray | None = None, batch_size: int = 16) -> Encoded:
        """Encodes observations.

        Args:
            values: [N, *grid, channels] in [-1, 1].
            mask: [1 or N, *grid], 1 for what was seen; None: all of it.
            batch_size: at a time; changes speed and memory, not the result.

        Raises:
            BundleError: a shape does not fit, or the graph's file is missing or changed.
        """
        check_at_least("batch_size", batch_size, 1)
        seen = np.broadcast_to(np.float32(1) if mask is None else mask, values.shape[:-1])
        parts = [
            self._bundle.run(self.name, values[begin : begin + batch_size], seen[begin : begin + batch_size])
            for begin in range(0, len(values), batch_size)
        ]
        return Encoded(*(np.concatenate(each) for each in zip(*parts)))


class Field:
    """One instance's baked networks, evaluated by NumPy alone at any resolution.

    Args:
        manifest: of the bundle.
        parameters: [cells, parameters], of :class:`Encoded`.

    Raises:
        BundleError: they are not of this bundle's fields.
    """

    def __init__(self, manifest: dict[str, Any], parameters: np.ndarray):
        self._grid = entry(manifest, "grid", kind=dict)
        field = entry(manifest, "field", kind=dict)
        sizes, self._output_sine = entry(field, "sizes", kind=list), entry(field, "last_layer", kind=str) == "sine"
        self._layers = []
        at = 0
        for inputs, outputs in zip(sizes, sizes[1:]):
            weights, at = parameters[:, at : at + inputs * outputs], at + inputs * outputs
            biases, at = parameters[:, at : at + outputs], at + outputs
            self._layers.append((weights, biases, inputs, outputs))
        if parameters.shape != (self._grid["cells"] ** self._grid["dimensions"], at):
            raise BundleError(f"parameters {list(parameters.shape)} are not those of a field of this bundle")

    def __call__(self, resolution: int | list[int]) -> np.ndarray:
        """Evaluates values [resolution, ..., channels] in about [-1, 1]; one number is pixels along every axis."""
        sizes = [resolution] * self._grid["dimensions"] if isinstance(resolution, int) else resolution
        axes = [axis_cells(size, self._grid["cells"], float(self._grid["overlap"])) for size in sizes]
        hidden = cell_points(axes)
        for index, (weights, biases, inputs, outputs) in enumerate(self._layers):
            hidden = hidden @ weights.reshape(-1, inputs, outputs) + biases[:, None]
            if self._output_sine or index + 1 < len(self._layers):
                hidden = np.sin(hidden)
        return blend(hidden, axes)


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
        """Draws samples ``start`` to ``start + num_samples - 1`` of ``seed``.

        Returns:
            Values [N, resolution, ..., channels] in about [-1, 1]; of a radiance field coefficients
            [N, cells, layers, bases], for its rays.

        Raises:
            BundleError: a number is out of range, or the graph's file is missing or changed.
        """
        for name, value, least in (("num_samples", num_samples, 1), ("seed", seed, 0), ("start", start, 0)):
            check_at_least(name, value, least)
        check_at_least("batch_size", batch_size, 1)
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
        """Evaluates values [resolution, ..., channels] in about [-1, 1]; one number is pixels along every axis."""
        grid = entry(self._bundle.manifest, "grid", kind=dict)
        cells, dimensions = entry(grid, "cells", kind=int), entry(grid, "dimensions", kind=int)
        sizes = [resolution] * dimensions if isinstance(resolution, int) else resolution
        axes = [axis_cells(size, cells, float(grid["overlap"])) for size in sizes]
        return self._bundle.cut(blend(self._bundle.run(self.name, cell_points(axes))[0], axes))


def initial_noise(seed: int, indices: range, latent_dim: int) -> np.ndarray:
    """Draws standard normal noise for samples ``indices`` of ``seed``: [N, latent_dim] float32.

    Sample i depends on seed and i alone, so pictures do not change with the batch size.
    """
    return np.stack([np.random.default_rng([seed, i]).standard_normal(latent_dim, dtype=np.float32) for i in indices])


_RAYS_AT_ONCE = 4096


class Camera:
    """A camera on a turntable around the y axis, looking at the origin; intrinsics and distance are the manifest's.

    Args:
        bundle: what to run.
        precision: ``"fp32"`` or ``"mixed"``; None takes what is there, float32 first.
        name: of a baked instance's graph of rays; None for the graph that takes coefficients.

    Raises:
        BundleError: the bundle is not of radiance fields.
    """

    def __init__(self, bundle: Bundle, precision: str | None = None, name: str | None = None):
        if bundle.manifest.get("radiance") is None:
            raise BundleError(f"{bundle.folder.path}: no bundle of radiance fields, it has no views")
        self._bundle = bundle
        self._radiance = entry(bundle.manifest, "radiance", kind=dict)
        self._name = name or bundle.folder.find_graphs("rays", precision=precision)[0]

    def __call__(self, coefficients: np.ndarray | None, azimuth: float, elevation: float = 30.0) -> np.ndarray:
        """Renders one view.

        Args:
            coefficients: [1, cells, layers, bases]; None for a baked instance.
            azimuth: degrees from +z towards +x.
            elevation: degrees above the plane y = 0.

        Returns:
            Colours [height, width, 3] in [-1, 1].
        """
        origins, directions = turntable_rays(
            azimuth, elevation, self._radiance["camera_distance"], self._radiance["intrinsics"], self._radiance["size"]
        )
        parts = []
        for begin in range(0, len(directions), _RAYS_AT_ONCE):
            rays = [each[begin : begin + _RAYS_AT_ONCE] for each in (origins, directions)]
            if coefficients is None:
                parts.append(self._bundle.run(self._name, *rays)[0])
            else:
                parts.append(self._bundle.run(self._name, coefficients, *[each[None] for each in rays])[0][0])
        return np.concatenate(parts).reshape(*self._radiance["size"], 3)


def turntable_rays(
    azimuth: float, elevation: float, distance: float, intrinsics: list[float], size: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Casts rays through the centres of all pixels, row by row: origins and directions [height · width, 3].

    Args:
        azimuth: degrees from +z towards +x.
        elevation: degrees above the plane y = 0.
        distance: to the origin.
        intrinsics: fx, fy, cx, cy in pixels; the centre of row r, column c lies at (c + 1/2, r + 1/2).
        size: height and width.
    """
    (height, width), (fx, fy, cx, cy) = size, intrinsics
    turn, rise = np.radians(azimuth), np.radians(elevation)
    right = np.array([np.cos(turn), 0.0, -np.sin(turn)])
    up = np.array([-np.sin(rise) * np.sin(turn), np.cos(rise), -np.sin(rise) * np.cos(turn)])
    backward = np.array([np.cos(rise) * np.sin(turn), np.sin(rise), np.cos(rise) * np.cos(turn)])
    columns, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    sideways, upwards = (columns - cx) / fx, (cy - rows) / fy  # rows count downwards
    directions = (sideways[..., None] * right + upwards[..., None] * up - backward).reshape(-1, 3)
    directions = directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.broadcast_to(distance * backward, directions.shape), directions
