"""Where voxel grids come from: arrays, HDF5, folders of `.binvox` or meshes; each yields them one at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnif.data.arrays import ids_and_groups, npy_array, npz_arrays
from mnif.data.binvox import binvox_resolution, read_binvox
from mnif.data.cache import stamps
from mnif.data.imnet import hdf5_grids, hdf5_ids, open_hdf5
from mnif.data.mesh_voxels import MESH_SUFFIXES, voxelise_mesh
from mnif.data.pictures import files_by_name
from mnif.errors import UserError

VOXEL_SUFFIXES = (".binvox", *MESH_SUFFIXES)
_MESH_RESOLUTION = 32
_NEEDS = '"voxels" or "occupancy", 0 and 1, [N, R, R, R], or "packed", uint8 [N, R, R, R/8], and "resolution"'


@dataclass(frozen=True)
class VoxelSource:
    """Voxel grids, not yet checked.

    Attributes:
        ids: N names.
        groups: N names.
        resolution: cells per axis.
        read: row → [R, R, R], any dtype, indexed x, y, z.
        key: what the grids depend on, as lines for :func:`mnif.data.cache.filled`.
        slow: reading takes long enough to keep what was read on disk.
    """

    ids: list[str]
    groups: list[str]
    resolution: int
    read: Callable[[int], np.ndarray]
    key: list[str]
    slow: bool = False


def array_source(path: Path) -> VoxelSource:
    """An ``.npz`` or ``.npy`` file; the latter is memory-mapped.

    Raises:
        UserError: the file is damaged, or its array has another shape.
    """
    arrays = {"voxels": npy_array(path)} if path.suffix == ".npy" else npz_arrays(path, _NEEDS)
    name = next((name for name in ("voxels", "occupancy", "packed") if name in arrays), None)
    if name is None:
        raise UserError(f"{path}: needs {_NEEDS}; found {', '.join(arrays) or 'nothing'}")
    grids = arrays[name]
    ids, groups = ids_and_groups(path, arrays, len(grids) if grids.ndim else 0)
    if name == "packed":
        resolution = int(arrays["resolution"].item()) if arrays.get("resolution", np.zeros(2)).size == 1 else 0
        if grids.dtype != np.uint8 or grids.shape[1:] != (resolution, resolution, -(-resolution // 8)):
            raise UserError(f'{path}: "packed" is {grids.dtype} {list(grids.shape)}; needed is {_NEEDS}')
        return VoxelSource(ids, groups, resolution, lambda row: unpacked(grids[row], resolution), stamps([path]))
    if grids.ndim != 4 or len(set(grids.shape[1:])) > 1 or not grids.size:
        raise UserError(f'{path}: "{name}" is {list(grids.shape)}; cubes [N, R, R, R] are needed')
    return VoxelSource(ids, groups, grids.shape[1], lambda row: grids[row], stamps([path]))


def unpacked(packed: np.ndarray, resolution: int) -> np.ndarray:
    """[…, R, ceil(R/8)] uint8, bits along the last axis → […, R, R] bool."""
    return np.unpackbits(packed, axis=-1, count=resolution).astype(bool)


def hdf5_source(path: Path, resolution: int | None) -> VoxelSource:
    """An HDF5 file as :mod:`mnif.data.imnet` describes it; a shape's group is its id.

    Raises:
        UserError: h5py is not installed, or the file is not of that form.
    """
    count, found, read = hdf5_grids(path, open_hdf5(path), resolution)
    ids = hdf5_ids(path, count)
    return VoxelSource(ids, ids, found, read, stamps([path]))


def folder_source(folder: Path, resolution: int | None) -> VoxelSource:
    """A folder of ``.binvox`` files, or of meshes, voxelised at ``resolution`` (default 32); the ids are file names.

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
        return VoxelSource(ids, ids, cells, lambda row: voxelise_mesh(paths[row], cells), stamps(paths), slow=True)
    found = binvox_resolution(paths[0])

    def read(row: int) -> np.ndarray:
        grid = read_binvox(paths[row])
        if len(grid) != found:
            raise UserError(f"{paths[row]}: {len(grid)}³ cells where {paths[0].name} has {found}³; give one size")
        return grid

    return VoxelSource(ids, ids, found, read, stamps(paths))
