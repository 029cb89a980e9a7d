"""Meshes as voxel grids: the surface's cells, and whatever they enclose."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes

from mnif.errors import UserError

MESH_SUFFIXES = (".obj", ".glb", ".stl", ".ply", ".off")
LONGEST_SIDE = 0.9
"""Of a mesh's bounding box, as a share of the cube's side."""


def voxelise_mesh(path: Path, resolution: int) -> np.ndarray:
    """The cells that a mesh's surface passes through, and those it encloses: [R, R, R] bool, indexed x, y, z.

    The mesh's bounding box is centred in the cube and its longest side made 0.9 of the cube's; axes stay as the file
    has them. A surface with gaps wider than a cell encloses nothing and stays a shell.

    Args:
        path: .obj, .glb, .stl, .ply or .off; the parts of a scene are taken together.
        resolution: cells per axis.

    Raises:
        UserError: as :func:`read_mesh`, or the mesh is one point.
    """
    vertices, faces = read_mesh(path)
    used = vertices[faces.ravel()]
    low, high = used.min(axis=0), used.max(axis=0)
    longest = (high - low).max()
    if not longest > 0:
        raise UserError(f"{path}: all its corners are one point; remove it")
    # A hair smaller, so that faces exactly between two cells count to the inner one on both sides.
    scale = LONGEST_SIDE * (1 - 1e-6) * resolution / longest
    triangles = (used - (low + high) / 2).reshape(-1, 3, 3) * scale + resolution / 2
    surface = np.zeros((resolution,) * 3, dtype=bool)
    for points in _surface_points(triangles):
        surface[tuple(np.floor(points).astype(int).T)] = True
    return binary_fill_holes(surface)


def _surface_points(triangles: np.ndarray) -> Iterator[np.ndarray]:
    """Points that cover triangles [F, 3, 3], no place of them farther than half a cell from one; batches [P, 3].

    That is close enough to leave no gap: where the line between two neighbouring cells' centres meets the surface, a
    point nearer than half a cell lies in one of the two.
    """
    edges = np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2).max(axis=1)
    steps = np.maximum(1, np.exp2(np.ceil(np.log2(np.maximum(edges, 0.5) / 0.5)))).astype(int)
    for count in np.unique(steps):
        first, second = np.triu_indices(count + 1)
        weights = np.stack([first, second - first, count - second], axis=1) / count  # barycentric
        chosen = triangles[steps == count]
        batch = max(1, 2_000_000 // len(weights))
        for start in range(0, len(chosen), batch):
            yield np.einsum("pk,fkd->fpd", weights, chosen[start : start + batch]).reshape(-1, 3)


def read_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Vertices [V, 3] float64 and faces [F, 3], at least one; those used by a face are finite.

    Raises:
        UserError: trimesh is not installed, or the file is damaged, has no faces, or a corner is NaN or infinite.
    """
    try:
        import trimesh
    except ImportError:
        raise UserError(f'{path}: "trimesh" is missing; run: pip install "mnif-diffusion[voxels]"') from None
    try:
        mesh: Any = trimesh.load_mesh(path, process=False, skip_materials=True)
    except Exception as error:  # what its loaders raise is no closed list
        raise UserError(f"{path}: unreadable mesh ({type(error).__name__}: {error}); remove or replace it") from None
    if not hasattr(mesh, "faces") or not len(mesh.faces):
        raise UserError(f"{path}: has no faces, so no surface; remove it")
    vertices, faces = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces)
    if not np.isfinite(vertices[faces]).all():
        raise UserError(f"{path}: a corner is NaN or infinite; mend or remove it")
    return vertices, faces
