"""Meshes become occupancy grids, and objects that are one design become groups."""

import re

import numpy as np
from scipy.ndimage import binary_fill_holes

from furniture.catalogue import Item
from furniture.meshes import Mesh

RESOLUTION = 32
MARGIN = 2  # empty voxels around the grid while it is filled
COLOURS = {"black", "white", "red", "green", "blue", "yellow", "orange", "brown", "grey", "gray", "pink", "purple"}


def voxelise(mesh: Mesh) -> np.ndarray:
    """Which voxels of [-1, 1]³ an object's surface passes through or encloses: [32, 32, 32] bool, order x, y, z.

    Many models stand on the floor without the faces nobody sees there, so the lowest layer counts as closed while the
    inside is filled. (The same rule for the back, against a wall, would brick up windows.)
    """
    surface = _surface(mesh.corners)
    bottom = int(np.flatnonzero(surface.any(axis=(0, 2)))[0])
    padded = np.pad(surface[:, bottom:], MARGIN)
    padded[:, :MARGIN] = True  # the floor
    grid = surface.copy()
    grid[:, bottom:] |= binary_fill_holes(padded)[MARGIN:-MARGIN, MARGIN:-MARGIN, MARGIN:-MARGIN]
    return grid


def _surface(corners: np.ndarray) -> np.ndarray:
    """The voxels that hold a point of the surface, sampled eight times as finely as the grid."""
    grid = np.zeros((RESOLUTION,) * 3, dtype=bool)
    spacing = 2 / RESOLUTION / 8
    edges = np.roll(corners, -1, axis=1) - corners
    steps = np.ceil(np.linalg.norm(edges, axis=2).max(axis=1) / spacing).astype(np.int64) + 1
    for count in np.unique(steps):
        # Evenly spread barycentric coordinates, edges included.
        i, j = np.nonzero(np.tri(count + 1)[::-1])
        weights = np.stack([i, j, count - i - j], axis=1) / count
        triangles = corners[steps == count]
        for chunk in np.array_split(triangles, max(1, len(triangles) * len(weights) // 2_000_000)):
            points = np.einsum("wk,fkc->fwc", weights, chunk).reshape(-1, 3)
            index = np.floor((points + 1) * (RESOLUTION / 2)).astype(np.int64).clip(0, RESOLUTION - 1)
            grid[index[:, 0], index[:, 1], index[:, 2]] = True
    return grid


def find_groups(items: list[Item], grids: np.ndarray, overlap: float = 0.95) -> list[str]:
    """A name per object; variants of one design share it, so that a split by it does not leak.

    Two objects are one design if one maker gave both the same name, up to numbers and words for colours, or if their
    grids [N, 32, 32, 32] or one's mirror image (left and right versions) overlap by more than ``overlap``,
    intersection over union. A group is named after its first object.
    """
    parent = list(range(len(items)))

    def root(row: int) -> int:
        while parent[row] != row:
            row = parent[row]
        return row

    def join(a: int, b: int) -> None:
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    first: dict[tuple[str, str, str], int] = {}
    for row, item in enumerate(items):
        join(row, first.setdefault((item.library, item.credit, _plain(item.name)), row))
    flat = grids.reshape(len(grids), -1).astype(np.float32)
    size = flat.sum(axis=1)
    for other in (flat, grids[:, ::-1].reshape(len(grids), -1).astype(np.float32)):
        shared = flat @ other.T
        for a, b in np.argwhere(shared > overlap * (size[:, None] + size[None] - shared)):
            join(int(a), int(b))
    return [items[root(row)].id for row in range(len(items))]


def _plain(name: str) -> str:
    words = re.findall(r"[^\W\d_]+", name.lower())
    return " ".join(word for word in words if word not in COLOURS)
