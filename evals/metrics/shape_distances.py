"""Distances between shapes, each given as points on its surface, and matrices of them between sets of shapes.

    chamfer   mean over a of min over b |a − b|²  +  mean over b of min over a |a − b|²
    emd       min over matchings of A with B of the mean |a − b|

Chamfer distances (Fan et al., CVPR 2017) as a sum of two means of squares are what You et al. report; single ones come
from k-d trees. Earth mover's distances (Rubner et al., IJCV 2000) need as many points on both sides, and time that
grows with their cube.

A matrix of some hundred shapes has 10⁵ entries at several milliseconds each. Coverage, minimum matching distance and
nearest-neighbour tests look at the least of each row and column alone, so a matrix may hold lower bounds where a
distance cannot be the least (:func:`distance_matrix`); coarse maps of distances give the bounds.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.spatial import KDTree
from scipy.spatial.distance import cdist

from mnif.errors import UserError
from mnif.progress import progress_bar

Metric = Literal["chamfer", "emd"]
Exact = Literal["all", "minima", "row minima"]

_MAP = 16  # nodes per axis of a map of distances over [-1, 1]³; finer maps cost more than they save
_LEAF = 16  # points in a leaf of a tree; the fastest of 8 to 64


def chamfer_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between point sets [P, 3] and [Q, 3], in squared units of their coordinates.

    Raises:
        UserError: a set is empty or not three-dimensional, or holds NaN or infinity.
    """
    return _Shape(a).chamfer(_Shape(b))


def earth_movers_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Between point sets [P, 3], in units of their coordinates, exactly.

    Raises:
        UserError: as :func:`chamfer_distance`, or different numbers of points.
    """
    return _Shape(a).emd(_Shape(b))


def distance_matrix(
    a: np.ndarray, b: np.ndarray | None = None, metric: Metric = "chamfer", exact: Exact = "all", title: str = ""
) -> np.ndarray:
    """Distances of every shape of ``a`` (rows) to every shape of ``b`` (columns).

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
    """The pairs to measure next, [N, M] bool; none once the matrix is as exact as asked for.

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
        """At most the mean distance, to a power, from these points to the nearest of the other's.

        A point x near a node c of the map is no nearer to a shape than d(c) − |x − c|.
        """
        node, away = self.places
        return float((np.maximum(other.map[node] - away, 0) ** power).mean())


def _lower_bounds(rows: list[_Shape | None], columns: list[_Shape | None], metric: Metric) -> np.ndarray:
    """[N, M], 0 where a shape is missing. In a matching no point is nearer to its partner than to the nearest one."""
    power, join = (2, np.add) if metric == "chamfer" else (1, np.maximum)

    def bounds(one: list[_Shape | None], other: list[_Shape | None]) -> np.ndarray:
        return np.array([[a.bound_towards(b, power) if a and b else 0.0 for b in other] for a in one])

    there = bounds(rows, columns)
    back = there if columns is rows else bounds(columns, rows)
    return join(there, back.T) * (1 - 1e-12)  # rounding must not lift a bound over the distance


def _shapes(points: np.ndarray) -> list[_Shape | None]:
    """None for a shape without a surface."""
    points = np.asarray(points)
    if points.ndim != 3:
        raise UserError(f"distance of shapes: points are {list(points.shape)}; [shapes, points, 3] is needed")
    return [None if len(shape) and np.isnan(shape).all() else _Shape(shape) for shape in points]


@cache
def _nodes() -> np.ndarray:
    """The middles of the cells of [-1, 1]³, [_MAP³, 3]."""
    axis = (np.arange(_MAP) + 0.5) * (2 / _MAP) - 1
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
