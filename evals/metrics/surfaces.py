"""Points on the surfaces of shapes, by which shapes are compared.

A surface comes from values on a grid by marching cubes, or from a mesh as it is, in the cube [-1, 1]³ that the grid
fills; it is neither moved nor scaled. Points lie on it at random, evenly by area. Which points depends on the shape's
name and the seed alone, so no number of processes and no batch moves a distance, and two shapes never share draws: a
copy of a shape is as far from it as a second look at the same surface would be (``chamfer_floor``).
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mnif.errors import UserError
from mnif.meshes import mesh_from_values

POINTS = 2048
SHOWN = 12

Mesh = tuple[np.ndarray, np.ndarray]
"""Vertices [V, 3] and faces [F, 3], as :mod:`mnif.meshes` has them."""

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
    """Of values on grids.

    Args:
        grids: N of [R, R, R], larger inside.
        names: N, each of one shape of the evaluation; they choose the points.
        level: the value on the surface: 0.5 for occupancies of 0 and 1, 0 for -1 and 1.
        seed: other points for the same names.

    Raises:
        UserError: a grid is no cube or holds NaN, or scikit-image or trimesh is missing.
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
    """[POINTS, 3] float32 on a mesh's faces, chosen by name and seed.

    Raises:
        UserError: the faces have no area, or trimesh is missing.
    """
    try:
        import trimesh
    except ImportError:
        raise UserError('surfaces: "trimesh" is missing; run: pip install "mnif-diffusion[voxels]"') from None
    solid = trimesh.Trimesh(*mesh, process=False)
    if not solid.area > 0:
        raise UserError(f"{name}: its faces have no area; remove it")
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    return np.asarray(trimesh.sample.sample_surface(solid, POINTS, seed=generator)[0], dtype=np.float32)
