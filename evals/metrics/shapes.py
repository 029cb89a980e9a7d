"""Points on the surfaces of shapes, by which shapes are compared.

A surface comes from values on a grid by marching cubes, or from a mesh as it is, in the cube [-1, 1]³ that the grid
fills; it is neither moved nor scaled. Points lie on it at random, evenly by area. Which points depends on the shape's
name and the seed alone, so no number of processes and no batch moves a distance, and two shapes never share draws: a
copy of a shape is as far from it as a second look at the same surface would be (``chamfer_floor``).
"""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from evals.metrics.uncertainty import standard_error
from mnif.utils.errors import UserError
from mnif.utils.meshes import mesh_from_values
from mnif.utils.process import progress_bar

POINTS = 2048

SHOWN = 12

Mesh = tuple[np.ndarray, np.ndarray]
"""Vertices [V, 3] and faces [F, 3], as :mod:`mnif.utils.meshes` has them."""

_NO_MESH: Mesh = (np.empty((0, 3)), np.empty((0, 3), dtype=np.int64))


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Points on the surfaces of N shapes.

    Attributes:
        points: [N, POINTS, 3] float32 in [-1, 1]; NaN for a shape without a surface.
        empty: how many shapes have no inside.
        full: how many shapes fill the whole grid; those have no surface either.
        meshes: of the first shapes, at most SHOWN, to look at; one without faces stands for a missing surface.
    """

    points: np.ndarray
    empty: int = 0
    full: int = 0
    meshes: tuple[Mesh, ...] = ()

    @property
    def present(self) -> np.ndarray:
        """Which shapes have a surface, [N] bool."""
        return ~np.isnan(self.points[:, 0, 0])

    def __len__(self) -> int:
        return len(self.points)


def surfaces_of_grids(grids: Iterable[np.ndarray], names: list[str], level: float, seed: int = 0) -> Surfaces:
    """Samples points on the surfaces of values on grids.

    Args:
        grids: N of [R, R, R], larger inside.
        names: N, each of one shape of the evaluation; they choose the points.
        level: the value on the surface: 0.5 for occupancies of 0 and 1, 0 for -1 and 1.
        seed: other points for the same names.

    Raises:
        UserError: a grid is no cube or holds NaN.
    """
    points = np.full((len(names), POINTS, 3), np.nan, dtype=np.float32)
    empty = full = 0
    shown: list[Mesh] = []
    for row, (name, values) in enumerate(zip(names, grids, strict=True)):
        if not np.isfinite(values).all():
            raise UserError(f"{name}: the values hold NaN or infinity; look at the model they come from")
        inside = values > level
        mesh = _NO_MESH
        if inside.any() and not inside.all():
            mesh = mesh_from_values(values, level)
            points[row] = surface_points(mesh, name, seed)
        else:
            empty, full = empty + (not inside.any()), full + bool(inside.any())
        if row < SHOWN:
            shown.append(mesh)
    return Surfaces(points, empty, full, tuple(shown))


def surface_points(mesh: Mesh, name: str, seed: int = 0) -> np.ndarray:
    """Samples points on a mesh's faces, chosen by name and seed: [POINTS, 3] float32.

    Raises:
        UserError: the faces have no area.
    """
    import trimesh

    solid = trimesh.Trimesh(*mesh, process=False)
    if not solid.area > 0:
        raise UserError(f"{name}: its faces have no area; remove it")
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.asarray(trimesh.sample.sample_surface(solid, POINTS, seed=generator)[0], dtype=np.float32)


Metric = Literal["chamfer", "emd"]

Exact = Literal["all", "minima", "row minima"]

_MAP = 16  # nodes per axis of a map of distances over [-1, 1]³; finer maps cost more than they save

_LEAF = 16  # points in a leaf of a tree; the fastest of 8 to 64


def chamfer_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the distance between point sets [P, 3] and [Q, 3], in squared units of their coordinates.

    Raises:
        UserError: a set is empty or not three-dimensional, or holds NaN or infinity.
    """
    return _Shape(a).chamfer(_Shape(b))


def earth_movers_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Computes the distance between point sets [P, 3], in units of their coordinates, exactly.

    Raises:
        UserError: as :func:`chamfer_distance`, or different numbers of points.
    """
    return _Shape(a).emd(_Shape(b))


def distance_matrix(
    a: np.ndarray, b: np.ndarray | None = None, metric: Metric = "chamfer", exact: Exact = "all", title: str = ""
) -> np.ndarray:
    """Computes distances of every shape of ``a`` (rows) to every shape of ``b`` (columns).

    Args:
        a: [N, P, 3] points; a shape whose points are all NaN has no surface, and is infinitely far from every other.
        b: [M, Q, 3] likewise; None: the shapes of ``a`` among themselves, each infinitely far from itself.
        metric: "chamfer" or "emd".
        exact: "all": every entry is a distance. "minima": the least entry of each row and of each column is a
            distance, and no other is less; the others may be lower bounds of distances. "row minima": the same of
            rows alone.
        title: of the progress bar.

    Returns:
        [N, M] float64. Neither the number of threads nor the other shapes change a distance.

    Raises:
        UserError: other shapes of arrays, some but not all points of a shape are NaN, or there is infinity.
    """
    rows = _shapes(a)
    columns = rows if b is None else _shapes(b)
    unknown = np.array([[bool(row and column) for column in columns] for row in rows]).reshape(len(rows), len(columns))
    if b is None:
        np.fill_diagonal(unknown, False)
    matrix = np.where(unknown, 0.0, np.inf)
    if exact != "all" and unknown.any():
        matrix[unknown] = _lower_bounds(rows, columns, metric)[unknown]

    def distance(pair: np.ndarray) -> float:
        row, column = rows[pair[0]], columns[pair[1]]
        return getattr(row, metric)(column)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads, progress_bar(desc=title, unit="pair") as bar:
        while (chosen := _worth_knowing(matrix, unknown, exact)).any():
            pairs = np.argwhere(np.triu(chosen | chosen.T) if b is None else chosen)
            for (row, column), found in zip(pairs, threads.map(distance, pairs), strict=True):
                places = ([row, column], [column, row]) if b is None else (row, column)
                matrix[places], unknown[places] = found, False
                bar.update()
    return matrix


def _worth_knowing(matrix: np.ndarray, unknown: np.ndarray, exact: Exact) -> np.ndarray:
    """Chooses the pairs to measure next, [N, M] bool; none once the matrix is as exact as is wanted.

    Of the unknown pairs whose bounds do not exceed the least known distance of their row or column, the most promising
    one of each: what it turns out to be rules many others out.
    """
    if exact == "all" or not unknown.any():
        return unknown
    known = np.where(unknown, np.inf, matrix)
    chosen = np.zeros(matrix.shape, dtype=bool)
    for axis in (1, 0) if exact == "minima" else (1,):
        promising = unknown & (matrix <= known.min(axis=axis, keepdims=True))
        best = np.where(promising, matrix, np.inf).argmin(axis=axis, keepdims=True)
        most = np.zeros(matrix.shape, dtype=bool)
        np.put_along_axis(most, best, True, axis=axis)
        chosen |= most & promising
    return chosen


class _Shape:
    """Points [P, 3] on one surface."""

    def __init__(self, points: np.ndarray):
        self.points = np.asarray(points, dtype=np.float64)
        if self.points.ndim != 2 or self.points.shape[1] != 3 or not len(self.points):
            raise UserError(f"distance of shapes: points are {list(self.points.shape)}; [points, 3] is needed")
        if not np.isfinite(self.points).all():
            raise UserError("distance of shapes: points hold NaN or infinity; look at the meshes they come from")

    @cached_property
    def tree(self) -> KDTree:
        return KDTree(self.points, leafsize=_LEAF)

    @cached_property
    def map(self) -> np.ndarray:
        """The distance from each of :func:`_nodes` to the nearest point."""
        return self.tree.query(_nodes())[0]

    @cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """The node nearest to each point, [P] int64, and how far away it is, [P]."""
        index = np.clip((self.points + 1) * (_MAP / 2), 0, _MAP - 1).astype(np.int64)
        node = index @ np.array([_MAP * _MAP, _MAP, 1])
        return node, np.linalg.norm(self.points - _nodes()[node], axis=-1)

    def chamfer(self, other: "_Shape") -> float:
        there, back = other.tree.query(self.points)[0], self.tree.query(other.points)[0]
        return float(np.square(there).mean() + np.square(back).mean())

    def emd(self, other: "_Shape") -> float:
        if len(self.points) != len(other.points):
            raise UserError(
                f"earth mover's distance: {len(self.points)} points against {len(other.points)}; as many are needed"
            )
        distances = cdist(self.points, other.points)
        return float(distances[linear_sum_assignment(distances)].mean())

    def bound_towards(self, other: "_Shape", power: int) -> float:
        """Bounds from below the mean distance, to a power, from these points to the nearest of the other's.

        A point x near a node c of the map is no nearer to a shape than d(c) − |x − c|.
        """
        node, away = self.places
        return float((np.maximum(other.map[node] - away, 0) ** power).mean())


def _lower_bounds(rows: list[_Shape | None], columns: list[_Shape | None], metric: Metric) -> np.ndarray:
    """Bounds the distances from below, [N, M]; 0 where a shape is missing.

    In a matching no point is nearer to its partner than to the nearest one.
    """
    power, join = (2, np.add) if metric == "chamfer" else (1, np.maximum)

    def bounds(one: list[_Shape | None], other: list[_Shape | None]) -> np.ndarray:
        return np.array([[a.bound_towards(b, power) if a and b else 0.0 for b in other] for a in one])

    there = bounds(rows, columns)
    back = there if columns is rows else bounds(columns, rows)
    return join(there, back.T) * (1 - 1e-12)  # rounding must not lift a bound over the distance


def _shapes(points: np.ndarray) -> list[_Shape | None]:
    """Checks points [N, P, 3]; None stands for a shape without a surface."""
    points = np.asarray(points)
    if points.ndim != 3:
        raise UserError(f"distance of shapes: points are {list(points.shape)}; [shapes, points, 3] is needed")
    return [None if len(shape) and np.isnan(shape).all() else _Shape(shape) for shape in points]


@cache
def _nodes() -> np.ndarray:
    """Returns the middles of the cells of [-1, 1]³, [_MAP³, 3]."""
    axis = (np.arange(_MAP) + 0.5) * (2 / _MAP) - 1
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)


def minimum_matching_distances(to_real: np.ndarray) -> np.ndarray:
    """Finds the distance of each real shape to the nearest drawn one, [R]; their mean is MMD.

    Args:
        to_real: [S, R] distances from drawn shapes to real ones, inf for a shape without a surface.
    """
    _check(to_real)
    return to_real.min(axis=0)


def coverage(to_real: np.ndarray) -> np.ndarray:
    """Tells which real shapes are the nearest one of some drawn shape, [R] bool; their share is COV.

    Args:
        to_real: as in :func:`minimum_matching_distances`. A drawn shape without a surface covers nothing.
    """
    _check(to_real)
    found = np.zeros(to_real.shape[1], dtype=bool)
    found[to_real.argmin(axis=1)[np.isfinite(to_real).any(axis=1)]] = True
    return found


def one_nn_accuracy(to_real: np.ndarray, among_drawn: np.ndarray, among_real: np.ndarray) -> np.ndarray:
    """Tells which shapes' nearest neighbours are of their kind, [S + R] bool, drawn ones first; the share is 1-NNA.

    Args:
        to_real: [S, R], as in :func:`minimum_matching_distances`.
        among_drawn: [S, S] distances; the diagonal is not looked at.
        among_real: [R, R] likewise.

    Returns:
        True for a drawn shape without a surface too: nothing is told apart more easily. Of two equally near
        neighbours one of the other kind counts.

    Raises:
        UserError: shapes that do not fit, or different numbers of drawn and real shapes, with which one half would not
            be the best value.
    """
    _check(to_real)
    drawn, real = to_real.shape
    if among_drawn.shape != (drawn, drawn) or among_real.shape != (real, real):
        raise UserError(
            f"1-NNA: {list(to_real.shape)} distances with {list(among_drawn.shape)} and {list(among_real.shape)}; "
            "[S, R], [S, S] and [R, R] are needed"
        )
    if drawn != real:
        raise UserError(f"1-NNA: {drawn} drawn and {real} real shapes; as many of each are needed")
    own = np.concatenate([_to_another(among_drawn), _to_another(among_real)])
    other = np.concatenate([to_real.min(axis=1), to_real.min(axis=0)])
    return (own < other) | (np.isinf(own) & np.isinf(other))


def set_metrics(to_real: np.ndarray, among_drawn: np.ndarray, among_real: np.ndarray) -> dict[str, float]:
    """Computes ``mmd``, ``cov`` and ``nna`` with their standard errors ``mmd_std`` … from matrices of distances.

    Args:
        to_real: [drawn, real], as in :func:`one_nn_accuracy`; here and below, entries that are not the least of their
            row or column may be any lower bound that exceeds these.
        among_drawn: [drawn, drawn], likewise.
        among_real: [real, real], likewise.
    """
    scores = {
        "mmd": minimum_matching_distances(to_real),
        "cov": coverage(to_real),
        "nna": one_nn_accuracy(to_real, among_drawn, among_real),
    }
    means = {name: float(values.mean()) for name, values in scores.items()}
    with np.errstate(invalid="ignore"):  # infinite distances have no spread
        return means | {f"{name}_std": standard_error(values) for name, values in scores.items()}


def _to_another(among: np.ndarray) -> np.ndarray:
    """Finds the distance of each shape to the nearest other one of its kind, [N]."""
    others = among.astype(np.float64, copy=True)
    np.fill_diagonal(others, np.inf)
    return others.min(axis=1)


def _check(distances: np.ndarray) -> None:
    if distances.ndim != 2 or 0 in distances.shape or np.isnan(distances).any():
        raise UserError(f"distances of shapes are {list(distances.shape)}; [drawn, real] without NaN is needed")
