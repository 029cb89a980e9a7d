"""Drawn shapes from files: what `mnif eval --samples` takes where the reference is of voxels.

Meshes are taken as they stand, in the cube [-1, 1]³ that `mnif decode` writes them in. Grids hold occupancies in
[0, 1] on that cube. Unlike shapes to learn from, drawn ones may be empty or full: they are counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evals.metrics.shapes import SHOWN, Surfaces, surface_points, surfaces_of_grids
from mnif.data.arrays import npy_array, npz_arrays
from mnif.data.images import files_by_name
from mnif.data.voxel_formats import MESH_SUFFIXES, read_binvox, read_mesh
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file, sha256_of_folder

_GRID_SUFFIXES = (".npz", ".npy", ".binvox")


_NEEDS = '"voxels" or "occupancy", occupancies in [0, 1], [R, R, R] or [N, R, R, R]'


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
        source = Path(self.source)
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
    if not path.is_dir():
        raise UserError(f"--samples {source}: no such folder, or file of {', '.join(_GRID_SUFFIXES)}")
    found = list(files_by_name(path, (*_GRID_SUFFIXES, *MESH_SUFFIXES)).values())
    meshes = {file.suffix.lower() in MESH_SUFFIXES for file in found}
    if not found:
        raise UserError(f"--samples {source}: no shapes here ({', '.join((*_GRID_SUFFIXES, *MESH_SUFFIXES))})")
    if len(meshes) > 1:
        raise UserError(f"--samples {source}: holds both grids and meshes; give a folder with one kind")
    return ShapeFiles(source, found, meshes.pop())


def _grids_in(path: Path) -> np.ndarray:
    """Reads grids [N, R, R, R] float32."""
    if path.suffix.lower() == ".binvox":
        return read_binvox(path)[None].astype(np.float32)
    if path.suffix.lower() == ".npy":
        grids = npy_array(path)
    else:
        arrays = npz_arrays(path, _NEEDS)
        name = next((name for name in ("voxels", "occupancy") if name in arrays), None)
        if name is None:
            raise UserError(f"{path}: needs {_NEEDS}; found {', '.join(arrays) or 'nothing'}")
        grids = arrays[name]
    shape = list(grids.shape)
    grids = grids[None] if grids.ndim == 3 else grids
    if grids.ndim != 4 or len(set(grids.shape[1:])) > 1 or not grids.size:
        raise UserError(f"{path}: the grids are {shape}; cubes [R, R, R] or [N, R, R, R] are needed")
    if grids.dtype.kind not in "buif" or not ((grids >= 0) & (grids <= 1)).all():  # NaN is neither
        raise UserError(f"{path}: holds values outside [0, 1]; occupancies are needed")
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
