"""Occupancy grids of one size with ids, eight cells a byte, from arrays, HDF5 or folders of `.binvox` or meshes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnif.data.arrays import file_stamps, ids_and_groups, memmap_cached, npy_array, npz_arrays, npz_names
from mnif.data.builtin import builtin_names, data_file
from mnif.data.dataset import Dataset
from mnif.data.images import files_by_name
from mnif.data.voxel_formats import (
    LARGEST_GRID,
    MESH_SUFFIXES,
    binvox_resolution,
    hdf5_grids,
    hdf5_ids,
    open_hdf5,
    read_binvox,
    voxelise_mesh,
)
from mnif.utils.errors import UserError
from mnif.utils.process import progress_bar

VOXEL_SUFFIXES = (".binvox", *MESH_SUFFIXES)
_MESH_RESOLUTION = 32
_FORMS = ("voxels", "occupancy", "packed")
_NEEDS = '"voxels" or "occupancy", 0 and 1, [N, R, R, R], or "packed", uint8 [N, R, R, R/8], and "resolution"'


@dataclass(frozen=True)
class VoxelData(Dataset):
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
        """Returns the packed grids."""
        return {"packed": self.packed}

    def occupancy(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Unpacks some of the rows: [n, R, R, R] bool, indexed x, y, z."""
        return unpacked(self.packed[rows], self.resolution)


@dataclass(frozen=True)
class VoxelSource:
    """Voxel grids, not yet checked.

    Attributes:
        ids: N names.
        groups: N names.
        resolution: cells per axis.
        read: row → [R, R, R], any dtype, indexed x, y, z.
        key: what the grids depend on, as lines for :func:`mnif.data.arrays.memmap_cached`.
        slow: reading takes long enough to keep what was read on disk.
    """

    ids: list[str]
    groups: list[str]
    resolution: int
    read: Callable[[int], np.ndarray]
    key: list[str]
    slow: bool = False


def load_voxels(source: str, resolution: int | None = None) -> VoxelData:
    """Loads occupancy grids.

    A finer grid is reduced by a whole factor: a cell is occupied if half of the cells in it are; a shape that would
    vanish so is kept, with every cell occupied in which it has any. Meshes are voxelised at ``resolution`` once and
    kept in the cache folder, as is what exceeds the memory limit (:func:`mnif.data.arrays.memmap_cached`).

    Args:
        source: a built-in name (``furniture``); an ``.npz`` file with ``voxels`` or ``occupancy``, 0 and 1,
            [N, R, R, R], or ``packed`` and ``resolution`` as in :class:`VoxelData`, and optionally ``ids`` and
            ``groups``; such an array of 0 and 1 as ``.npy``, memory-mapped; IM-NET's ``.hdf5`` or ``.h5``
            (:mod:`mnif.data.voxel_formats`); a folder of ``.binvox`` files or of meshes
            (:mod:`mnif.data.voxel_formats`).
        resolution: cells per axis; default: as the source has it, 32 for meshes.

    Raises:
        UserError: the source is missing, damaged or empty, a grid is empty or holds something other than 0 and 1, or
            its size is not ``resolution`` times a whole number.
    """
    if resolution is not None and resolution < 1:
        raise UserError(f"--resolution {resolution}: at least 1 cell is needed")
    grids = _source(source, resolution)
    if (finest := max(grids.resolution, resolution or 0)) > LARGEST_GRID:
        raise UserError(f"--data {source}: grids of {finest}³ cells; {LARGEST_GRID}³ at most can be read")
    cells = resolution or grids.resolution
    if grids.resolution % cells:
        raise UserError(
            f"--resolution {cells}: the grids of {source} have {grids.resolution} cells per axis, which is no whole "
            f"multiple; leave --resolution out or divide {grids.resolution}"
        )
    return VoxelData(source, _packed(source, grids, cells), cells, grids.ids, grids.groups)


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
        f"({builtin_names('voxels')})"
    )


def array_source(path: Path) -> VoxelSource:
    """Makes a source of an ``.npz`` or ``.npy`` file; the latter is memory-mapped.

    Raises:
        UserError: the file is damaged, or its array has another shape.
    """
    arrays = (
        {"voxels": npy_array(path)}
        if path.suffix == ".npy"
        else npz_arrays(path, _NEEDS, (*_FORMS, "resolution", "ids", "groups"))
    )
    name = next((name for name in _FORMS if name in arrays), None)
    if name is None:
        raise UserError(f"{path}: needs {_NEEDS}; found {', '.join(sorted(npz_names(path))) or 'nothing'}")
    grids = arrays[name]
    ids, groups = ids_and_groups(path, arrays, len(grids) if grids.ndim else 0)
    if name == "packed":
        stored = arrays.get("resolution", np.zeros(2))
        resolution = int(stored.item()) if stored.size == 1 and stored.dtype.kind in "iu" else 0
        if grids.dtype != np.uint8 or grids.shape[1:] != (resolution, resolution, -(-resolution // 8)):
            raise UserError(f'{path}: "packed" is {grids.dtype} {list(grids.shape)}; needed is {_NEEDS}')
        return VoxelSource(ids, groups, resolution, lambda row: unpacked(grids[row], resolution), file_stamps([path]))
    if grids.ndim != 4 or len(set(grids.shape[1:])) > 1 or not grids.size or grids.dtype.kind not in "biuf":
        raise UserError(f'{path}: "{name}" is {list(grids.shape)}; cubes [N, R, R, R] are needed')
    return VoxelSource(ids, groups, grids.shape[1], lambda row: grids[row], file_stamps([path]))


def hdf5_source(path: Path, resolution: int | None) -> VoxelSource:
    """Makes a source of an HDF5 file as :mod:`mnif.data.voxel_formats` has it; a shape's group is its id.

    Raises:
        UserError: h5py is not installed, or the file is not of that form.
    """
    count, cells, read = hdf5_grids(path, open_hdf5(path), resolution)
    ids = hdf5_ids(path, count)
    return VoxelSource(ids, ids, cells, read, file_stamps([path]))


def folder_source(folder: Path, resolution: int | None) -> VoxelSource:
    """Makes a source of ``.binvox`` files, or of meshes, voxelised at ``resolution`` (default 32); ids are file names.

    Raises:
        UserError: the folder holds neither or both, or grids of several sizes.
    """
    files = files_by_name(folder, VOXEL_SUFFIXES)
    if not files:
        raise UserError(f"{folder}: no voxels or meshes here ({', '.join(VOXEL_SUFFIXES)})")
    ids, paths = list(files), list(files.values())
    kinds = {path.suffix.lower() == ".binvox" for path in paths}
    if len(kinds) > 1:
        raise UserError(f"{folder}: holds both .binvox files and meshes; give a folder with one kind")
    if kinds == {False}:
        cells = resolution or _MESH_RESOLUTION
        return VoxelSource(
            ids, ids, cells, lambda row: voxelise_mesh(paths[row], cells), file_stamps(paths), slow=True
        )
    cells = binvox_resolution(paths[0])

    def read(row: int) -> np.ndarray:
        grid = read_binvox(paths[row])
        if len(grid) != cells:
            raise UserError(f"{paths[row]}: {len(grid)}³ cells where {paths[0].name} has {cells}³; give one size")
        return grid

    return VoxelSource(ids, ids, cells, read, file_stamps(paths))


def _packed(name: str, source: VoxelSource, cells: int) -> np.ndarray:
    def fill(packed: np.ndarray) -> None:
        for row in progress_bar(range(len(packed)), desc=f"reading {name}", unit="shape", leave=False):
            grid = _checked(source.read(row), f"{name}: shape {source.ids[row]!r}")
            packed[row] = np.packbits(_reduced(grid, source.resolution // cells), axis=-1)

    shape = (len(source.ids), cells, cells, -(-cells // 8))
    return memmap_cached(shape, fill, [*source.key, "voxels"], keep=source.slow)


def _checked(grid: np.ndarray, where: str) -> np.ndarray:
    """Checks that a grid is a cube of 0 and 1 with anything in it, and gives it as [R, R, R] bool."""
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
    """Reduces [R, R, R] bool to [R/factor, …] bool by the rule of :func:`load_voxels`."""
    if factor == 1:
        return grid
    cells = len(grid) // factor
    counts = grid.reshape(cells, factor, cells, factor, cells, factor).sum(axis=(1, 3, 5))
    reduced = 2 * counts >= factor**3
    return reduced if reduced.any() else counts > 0


def unpacked(packed: np.ndarray, resolution: int) -> np.ndarray:
    """Unpacks bits along the last axis: […, R, ceil(R/8)] uint8 → […, R, R] bool."""
    return np.unpackbits(packed, axis=-1, count=resolution).astype(bool)
