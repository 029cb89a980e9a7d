"""Occupancy grids of one size with ids, eight cells a byte."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnif.data.built_in import built_in_names, data_file
from mnif.data.cache import filled
from mnif.data.instances import Instances
from mnif.data.voxel_sources import VoxelSource, array_source, folder_source, hdf5_source, unpacked
from mnif.errors import UserError
from mnif.progress import progress_bar


@dataclass(frozen=True)
class VoxelData(Instances):
    """Occupancy grids of one size.

    Attributes:
        name: as the user gave it.
        packed: [N, R, R, ceil(R/8)] uint8, the cells' bits along the last axis as ``np.packbits`` orders them; the
            axes are x, y, z.
        resolution: R, cells per axis.
        ids: N unique names.
        groups: N names; shapes of one group stay on one side of the split.
    """

    name: str
    packed: np.ndarray
    resolution: int
    ids: list[str]
    groups: list[str]

    def arrays(self) -> dict[str, np.ndarray]:
        """The packed grids."""
        return {"packed": self.packed}

    def occupancy(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """[n, R, R, R] bool, indexed x, y, z, of the rows asked for."""
        return unpacked(self.packed[rows], self.resolution)


def load_voxels(source: str, resolution: int | None = None) -> VoxelData:
    """Loads occupancy grids.

    A finer grid is reduced by a whole factor: a cell is occupied if half of the cells in it are; a shape that would
    vanish so is kept, with every cell occupied in which it has any. Meshes are voxelised at ``resolution`` once and
    kept in the cache folder, as is what exceeds the memory limit (:func:`mnif.data.cache.filled`).

    Args:
        source: a built-in name (``furniture``); an ``.npz`` file with ``voxels`` or ``occupancy``, 0 and 1,
            [N, R, R, R], or ``packed`` and ``resolution`` as in :class:`VoxelData`, and optionally ``ids`` and
            ``groups``; such an array of 0 and 1 as ``.npy``, memory-mapped; IM-NET's ``.hdf5`` or ``.h5``
            (:mod:`mnif.data.imnet`); a folder of ``.binvox`` files or of meshes (:mod:`mnif.data.mesh_voxels`).
        resolution: cells per axis; default: as the source has it, 32 for meshes.

    Raises:
        UserError: the source is missing, damaged or empty, a grid is empty or holds something other than 0 and 1, or
            its size is not ``resolution`` times a whole number.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"--resolution {resolution}: at least 1 cell is needed")
    found = _source(source, resolution)
    cells = resolution or found.resolution
    if found.resolution % cells:
        raise UserError(
            f"--resolution {cells}: the grids of {source} have {found.resolution} cells per axis, which is no whole "
            f"multiple; leave --resolution out or divide {found.resolution}"
        )
    return VoxelData(source, _packed(source, found, cells), cells, found.ids, found.groups)


def _source(source: str, resolution: int | None) -> VoxelSource:
    path = Path(source)
    if source == "furniture":
        return array_source(data_file(source))
    if path.is_dir():
        return folder_source(path, resolution)
    if path.suffix in (".npz", ".npy") and path.is_file():
        return array_source(path)
    if path.suffix in (".hdf5", ".h5") and path.is_file():
        return hdf5_source(path, resolution)
    raise UserError(
        f"--data {source}: no such folder, .npz, .npy or .hdf5 file or built-in set of voxels "
        f"({built_in_names('voxels')})"
    )


def _packed(name: str, source: VoxelSource, cells: int) -> np.ndarray:
    def fill(packed: np.ndarray) -> None:
        for row in progress_bar(range(len(packed)), desc=f"reading {name}", unit="shape", leave=False):
            grid = _checked(source.read(row), f"{name}: shape {source.ids[row]!r}")
            packed[row] = np.packbits(_reduced(grid, source.resolution // cells), axis=-1)

    shape = (len(source.ids), cells, cells, -(-cells // 8))
    return filled(shape, fill, [*source.key, "voxels"], keep=source.slow)


def _checked(grid: np.ndarray, where: str) -> np.ndarray:
    """[R, R, R] bool."""
    if len(set(grid.shape)) > 1:
        raise UserError(f"{where} is {'×'.join(map(str, grid.shape))}; a cube is needed")
    if grid.dtype != bool:
        if grid.dtype.kind == "f" and not np.isfinite(grid).all():
            raise UserError(f"{where} holds NaN or infinity; remove or mend it")
        if not ((grid == 0) | (grid == 1)).all():
            raise UserError(f"{where} holds values other than 0 and 1 (up to {grid.max():g}); threshold it first")
        grid = grid == 1
    if not grid.any():
        raise UserError(f"{where} is empty: no cell is occupied; remove it")
    return grid


def _reduced(grid: np.ndarray, factor: int) -> np.ndarray:
    """[R, R, R] bool → [R/factor, …] bool by the rule of :func:`load_voxels`."""
    if factor == 1:
        return grid
    cells = len(grid) // factor
    counts = grid.reshape(cells, factor, cells, factor, cells, factor).sum(axis=(1, 3, 5))
    reduced = 2 * counts >= factor**3
    return reduced if reduced.any() else counts > 0
