"""Sets of shapes: drawn ones from files, and how they compare with real ones that the model never saw.

Meshes are taken as they stand, in the cube [-1, 1]³ that `mnif decode` writes them in. Grids hold occupancies in
[0, 1] on that cube; volumes as a bundle's `device/sample.py` draws them, about [-1, 1], become such. Unlike shapes to
learn from, drawn ones may be empty or full: they are counted.

All sets that are compared have the same number of shapes, since coverage and 1-NNA depend on it. The floor is what
real shapes from the training set score in the place of drawn ones: no model can hope for better.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.metrics.neighbours import novelty_ratio
from evals.metrics.shapes import (
    SHOWN,
    Metric,
    Surfaces,
    distance_matrix,
    set_metrics,
    surface_points,
    surfaces_of_grids,
)
from mnif.data.arrays import npy_array, npz_arrays, npz_names
from mnif.data.dataset import Split
from mnif.data.source import DataSource, files_by_name
from mnif.data.voxel_formats import grids_of_array, read_binvox
from mnif.data.voxels import VoxelData
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file, sha256_of_folder
from mnif.utils.meshes import MESH_SUFFIXES, read_mesh
from mnif.utils.process import progress_bar

_GRID_SUFFIXES = (".npz", ".npy", ".binvox")

_NEEDS = '"voxels" or "occupancy", occupancies in [0, 1], [R, R, R] or [N, R, R, R], or volumes [R, R, R, 1]'

_BOUND = 1 + 1e-3  # a mesh may leave the cube by its rounding


@dataclass(frozen=True)
class ShapeFiles:
    """Drawn shapes in files, in the order of their names.

    Attributes:
        source: as the user gave it.
        paths: the files.
        meshes: they hold meshes; else grids, one or several each.
    """

    source: str
    paths: list[Path]
    meshes: bool

    def fingerprint(self) -> str:
        """Hashes names and contents."""
        source = DataSource(self.source).path
        return sha256_of_folder(source) if source.is_dir() else sha256_of_file(source)

    def surfaces(self, count: int) -> Surfaces:
        """Samples the surfaces of the first ``count`` shapes, or of all if there are fewer.

        Raises:
            UserError: a file is damaged, holds something else or is of another size than the first; a mesh leaves the
                cube [-1, 1]³.
        """
        if self.meshes:
            chosen = self.paths[:count]
            points = [surface_points(_mesh_in_cube(path), f"drawn {row}") for row, path in enumerate(chosen)]
            return Surfaces(np.stack(points), meshes=tuple(_mesh_in_cube(path) for path in chosen[:SHOWN]))
        grids = [grid for _, grid in zip(range(count), self._grids(), strict=False)]
        return surfaces_of_grids(grids, [f"drawn {row}" for row in range(len(grids))], level=0.5)

    def _grids(self) -> Iterator[np.ndarray]:
        """Reads grids [R, R, R], all of one size."""
        first: tuple[Path, int] | None = None
        for path in self.paths:
            for grid in _grids_in(path):
                first = first or (path, len(grid))
                if len(grid) != first[1]:
                    raise UserError(f"{path}: {len(grid)}³ cells where {first[0].name} has {first[1]}³; give one size")
                yield grid


def shape_files(source: str) -> ShapeFiles:
    """Finds the drawn shapes of a folder (of its sub-folders, if it holds none itself), or of one file of grids.

    Raises:
        UserError: there are none, or both grids and meshes.
    """
    path = Path(source)
    if path.is_file() and path.suffix.lower() in _GRID_SUFFIXES:
        return ShapeFiles(source, [path], meshes=False)
    if not DataSource(source).path.is_dir():
        raise UserError(f"--samples {source}: no such folder, or file of {', '.join(_GRID_SUFFIXES)}")
    found = list(files_by_name(source, (*_GRID_SUFFIXES, *MESH_SUFFIXES)).values())
    meshes = {file.suffix.lower() in MESH_SUFFIXES for file in found}
    if not found:
        raise UserError(f"--samples {source}: no shapes here ({', '.join((*_GRID_SUFFIXES, *MESH_SUFFIXES))})")
    if len(meshes) > 1:
        raise UserError(
            f"--samples {source}: holds both grids and meshes; say which, such as '{source}/*{found[0].suffix}'"
        )
    return ShapeFiles(source, found, meshes.pop())


def _grids_in(path: Path) -> np.ndarray:
    """Reads grids [N, R, R, R] float32."""
    if path.suffix.lower() == ".binvox":
        return read_binvox(path)[None].astype(np.float32)
    if path.suffix.lower() == ".npy":
        grids = npy_array(path)
    else:
        arrays = npz_arrays(path, _NEEDS, ("voxels", "occupancy"))
        name = next((name for name in ("voxels", "occupancy") if name in arrays), None)
        if name is None:
            raise UserError(f"{path}: needs {_NEEDS}; found {', '.join(sorted(npz_names(path))) or 'nothing'}")
        grids = arrays[name]
    grids, signed = grids_of_array(grids, f"{path}: an array")
    if grids.dtype.kind not in "buif" or not np.isfinite(grids).all():
        raise UserError(f"{path}: holds something other than finite numbers; occupancies are needed")
    if signed:
        return (grids.astype(np.float32) / 2 + 0.5).clip(0, 1)
    if grids.min() < 0 or grids.max() > 1:
        raise UserError(
            f"{path}: holds values outside [0, 1], {grids.min():g} to {grids.max():g}; occupancies are needed, or "
            "volumes with a channel, [R, R, R, 1]"
        )
    return grids.astype(np.float32)


def _mesh_in_cube(path: Path) -> tuple[np.ndarray, np.ndarray]:
    vertices, faces = read_mesh(path)
    farthest = np.abs(vertices[faces]).max()
    if farthest > _BOUND:
        raise UserError(
            f"{path}: a corner has the coordinate {farthest:.3g}; drawn meshes lie in the cube [-1, 1]³, "
            "as `mnif decode` writes them"
        )
    return vertices, faces


LEAST = 8  # shapes in a set

_COPIED_QUANTILE = 0.05

_CHUNK = 1024  # training shapes whose surfaces are held at a time


@dataclass(frozen=True)
class RealShapes:
    """The real shapes of a comparison.

    Attributes:
        reference: [R, P, 3] points of shapes that drawn ones are compared with.
        floor: [F, P, 3] points of shapes that stand for perfect samples.
        part: what the reference is: "unseen" (held out or kept for a test) or "half" of the designs, where nothing or
            next to nothing was kept.
        left_out: real shapes of either that have no surface, since they fill the whole grid.
    """

    reference: np.ndarray
    floor: np.ndarray
    part: str
    left_out: int


def real_shapes(data: VoxelData, splits: np.ndarray) -> RealShapes:
    """Chooses reference and floor, whole designs on either side, in random order.

    Raises:
        UserError: there are too few shapes.
    """
    unseen, part = splits != Split.TRAIN, "unseen"
    if unseen.sum() < LEAST:
        unseen, part = data.held_out(0.5), "half"
    order = np.random.default_rng(0).permutation(len(data))
    reference, floor = order[unseen[order]], order[~unseen[order]]
    if min(len(reference), len(floor)) < LEAST:
        raise UserError(f"--reference {data.name}: {len(data)} shapes; at least {LEAST} each of two parts are needed")
    here, there = _points(data, reference), _points(data, floor[: len(reference)])
    kept, stand_ins = (points[~np.isnan(points[:, 0, 0])] for points in (here, there))
    return RealShapes(kept, stand_ins, part, len(here) + len(there) - len(kept) - len(stand_ins))


def comparison_metrics(
    drawn: Mapping[str, np.ndarray], real: RealShapes, metric: Metric, points: int | None = None
) -> dict[str, float]:
    """Measures MMD, COV and 1-NNA of each drawn set, and of the floor, with their standard errors.

    Args:
        drawn: what a set's metrics end with ("" for the samples, "_gaussian" …) → [S, P, 3] points.
        real: the real shapes.
        metric: of distances.
        points: take the first so many of each shape; default: all.

    Returns:
        ``mmd_chamfer``, ``cov_chamfer``, ``nna_chamfer`` … by ending; no ``mmd`` where no shape has a surface.
    """
    sets = {**drawn, "_floor": real.floor}
    count = set_size(drawn, real)
    reference = real.reference[:count, :points]
    among_real = distance_matrix(reference, metric=metric, exact="minima", title="real shapes")
    metrics: dict[str, float] = {}
    for ending, shapes in sets.items():
        some, title = shapes[:count, :points], f"{metric}{ending}"
        to_real = distance_matrix(some, reference, metric, "minima", title)
        among_drawn = distance_matrix(some, metric=metric, exact="minima", title=title)
        for name, value in set_metrics(to_real, among_drawn, among_real).items():
            if np.isfinite(value):
                measure, _, spread = name.partition("_")
                metrics[f"{measure}_{metric}{ending}" + (f"_{spread}" if spread else "")] = value
    return metrics


def set_size(drawn: Mapping[str, np.ndarray], real: RealShapes) -> int:
    """Returns how many shapes of each set are compared: as many as the smallest has."""
    return min(len(real.reference), len(real.floor), *(len(shapes) for shapes in drawn.values()))


def shape_novelty(drawn: np.ndarray, data: VoxelData, splits: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Compares drawn shapes [S, P, 3] with all training shapes; those without a surface do not count.

    Returns:
        ``nn_ratio``, the median distance of drawn shapes to their nearest training shapes over that of held-out shapes
        to theirs, with its standard error; ``nn_ratio_copies``, what copies of training shapes would score;
        ``copied_share``, the share of drawn shapes nearer than all but 5 % of held-out ones. Distances are roots of
        chamfer distances. All this is missing if nothing was held out. And the row of the nearest training shape for
        each drawn one, [S].

    Raises:
        UserError: there are no training shapes.
    """
    train, held_out = np.flatnonzero(splits == Split.TRAIN), np.flatnonzero(splits == Split.HELD_OUT)
    if not len(train):
        raise UserError(f"--reference {data.name}: no shape of it was trained on; lower --held_out_fraction")
    copies = _points(data, train[:: -(-len(train) // len(drawn))], "copy of ")
    queries = {"drawn": drawn, "held out": _points(data, held_out), "copies": copies}
    distances, nearest = _nearest(np.concatenate([*queries.values()]), data, train)
    ends = np.cumsum([len(points) for points in queries.values()])
    samples, unseen, again = (part[np.isfinite(part)] for part in np.split(distances, ends[:-1]))
    metrics: dict[str, float] = {}
    if len(unseen) and len(samples):
        unit = float(np.median(unseen))
        ratio, std = novelty_ratio(samples, unit)
        metrics = {
            "nn_ratio": ratio,
            "nn_ratio_std": std,
            "nn_ratio_copies": float(np.median(again)) / unit,
            "copied_share": float((samples < np.quantile(unseen, _COPIED_QUANTILE)).mean()),
        }
    return metrics, nearest[: len(drawn)]


def _nearest(queries: np.ndarray, data: VoxelData, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest training shape of each query: the root of its chamfer distance, and its row, [Q] each."""
    distances, nearest = np.full(len(queries), np.inf), np.full(len(queries), train[0])
    for start in range(0, len(train), _CHUNK):
        some = train[start : start + _CHUNK]
        matrix = distance_matrix(queries, _points(data, some), exact="row minima", title="nearest training shapes")
        least = matrix.min(axis=1)
        nearer = least < distances
        distances[nearer], nearest[nearer] = least[nearer], some[matrix.argmin(axis=1)[nearer]]
    return np.sqrt(distances), nearest


def _points(data: VoxelData, rows: np.ndarray, prefix: str = "") -> np.ndarray:
    """Samples points on the surfaces of real shapes, [rows, P, 3]."""
    shown = progress_bar(rows, desc="surfaces", unit="shape", leave=False)
    grids = (data.occupancy(slice(row, row + 1))[0].astype(np.float32) for row in shown)
    return surfaces_of_grids(grids, [prefix + data.ids[row] for row in rows], level=0.5).points
