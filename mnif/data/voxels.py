"""Occupancy grids of one size with ids, eight cells a byte, from arrays, HDF5 or folders of `.binvox` or meshes."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnif.data.arrays import file_stamps, ids_and_groups, memmap_cached, npy_array, npz_arrays, npz_names
from mnif.data.builtin import builtin_names, data_file
from mnif.data.dataset import Dataset
from mnif.data.source import DataSource, file_id, files_by_name, readable, visible_files
from mnif.data.voxel_formats import (
    LARGEST_GRID,
    binvox_resolution,
    grids_of_array,
    hdf5_grids,
    hdf5_ids,
    open_hdf5,
    read_binvox,
    voxelise_mesh,
)
from mnif.utils.errors import UserError
from mnif.utils.meshes import MESH_SUFFIXES
from mnif.utils.process import progress_bar

VOXEL_SUFFIXES = (".binvox", *MESH_SUFFIXES)
ARRAY_SUFFIXES = (".npy", ".npz")
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
            ``groups``; such an array of 0 and 1, or one grid of it, as ``.npy``, memory-mapped; volumes as a bundle
            draws them (:func:`mnif.data.voxel_formats.grids_of_array`); IM-NET's ``.hdf5`` or ``.h5``; a folder of
            ``.binvox`` files, of meshes (:mod:`mnif.data.voxel_formats`) or of arrays.
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
    return VoxelData(readable(source), _packed(source, grids, cells), cells, grids.ids, grids.groups)


def _source(source: str, resolution: int | None) -> VoxelSource:
    path = Path(source)
    if source == "furniture":
        return array_source(data_file(source))
    if DataSource(source).path.is_dir():
        return folder_source(source, resolution)
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
    if name == "packed":
        ids, groups = ids_and_groups(path, arrays, len(grids) if grids.ndim else 0)
        stored = arrays.get("resolution", np.zeros(2))
        resolution = int(stored.item()) if stored.size == 1 and stored.dtype.kind in "iu" else 0
        if grids.dtype != np.uint8 or grids.shape[1:] != (resolution, resolution, -(-resolution // 8)):
            raise UserError(f'{path}: "packed" is {grids.dtype} {list(grids.shape)}; needed is {_NEEDS}')
        return VoxelSource(ids, groups, resolution, lambda row: unpacked(grids[row], resolution), file_stamps([path]))
    grids, signed = grids_of_array(grids, f'{path}: "{name}"')
    ids, groups = ids_and_groups(path, arrays, len(grids))

    def read(row: int) -> np.ndarray:
        grid = grids[row]
        return grid > 0 if signed and np.isfinite(grid).all() else grid

    return VoxelSource(ids, groups, grids.shape[1], read, file_stamps([path]))


def hdf5_source(path: Path, resolution: int | None) -> VoxelSource:
    """Makes a source of an HDF5 file as :mod:`mnif.data.voxel_formats` has it; a shape's group is its id.

    Raises:
        UserError: h5py is not installed, or the file is not of that form.
    """
    count, cells, read = hdf5_grids(path, open_hdf5(path), resolution)
    ids = hdf5_ids(path, count)
    return VoxelSource(ids, ids, cells, read, file_stamps([path]))


def folder_source(source: str, resolution: int | None) -> VoxelSource:
    """Makes a source of ``.binvox`` files, of meshes, voxelised at ``resolution`` (default 32), or else of arrays.

    Ids are file names; groups are the designs (:func:`_designs`).

    Raises:
        UserError: the folder holds nothing, several kinds, several files of one object, or grids of several sizes.
    """
    files = files_by_name(source, VOXEL_SUFFIXES) or files_by_name(source, ARRAY_SUFFIXES)
    if not files:
        raise UserError(f"{source}: no voxels or meshes here ({', '.join((*VOXEL_SUFFIXES, *ARRAY_SUFFIXES))})")
    ids, paths = list(files), list(files.values())
    groups = _designs(DataSource(source), ids)
    kinds = {_kind(path) for path in paths}
    if len(kinds) > 1:
        kind = paths[0].suffix
        raise UserError(f"{source}: holds both .binvox files and meshes; say which, such as '{source}/**/*{kind}'")
    if kinds == {"meshes"}:
        cells = resolution or _MESH_RESOLUTION
        beside = [binary for path in paths if path.suffix.lower() == ".gltf" for binary in path.parent.glob("*.bin")]
        stamps = [*file_stamps([*paths, *beside]), "by volume"]
        return VoxelSource(ids, groups, cells, lambda row: voxelise_mesh(paths[row], cells), stamps, slow=True)
    if kinds == {"arrays"}:
        return _joined({id: array_source(path) for id, path in files.items()}, groups, paths)
    cells = binvox_resolution(paths[0])

    def read(row: int) -> np.ndarray:
        grid = read_binvox(paths[row])
        _check_size(paths[row], len(grid), paths[0], cells)
        return grid

    return VoxelSource(ids, groups, cells, read, file_stamps(paths))


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    return "arrays" if suffix in ARRAY_SUFFIXES else "meshes" if suffix in MESH_SUFFIXES else suffix


def _check_size(path: Path, cells: int, first: Path, wanted: int) -> None:
    if cells != wanted:
        raise UserError(f"{path}: {cells}³ cells where {first.name} has {wanted}³; give one size")


def _joined(sources: dict[str, VoxelSource], designs: list[str], paths: list[Path]) -> VoxelSource:
    """Puts the grids of several files together, whose ids are the file's, with their own behind it if it has more."""
    cells = next(iter(sources.values())).resolution
    ids, groups, places = [], [], []
    for (id, source), design, path in zip(sources.items(), designs, paths, strict=True):
        _check_size(path, source.resolution, paths[0], cells)
        several = len(source.ids) > 1
        ids += [f"{id}/{own}" if several else id for own in source.ids]
        groups += [f"{design}/{own}" if several else design for own in source.groups]
        places += [(source, row) for row in range(len(source.ids))]

    def read(row: int) -> np.ndarray:
        source, place = places[row]
        return source.read(place)

    return VoxelSource(ids, groups, cells, read, file_stamps(paths))


_BASE = re.compile(r"(.+?)((?:\.[A-Za-z_]+)*\.[^.]+)")  # of a file name, and words that tell its versions apart


def _designs(source: DataSource, ids: list[str]) -> list[str]:
    """Names the design of each file: its object's folder, if there is one for each, or its name.

    There is where the same few names come again in more folders than there are names, as in ShapeNet. Elsewhere files
    that differ in words behind a dot alone, ``a.solid.binvox`` and ``a.surface.binvox`` or ``a.obj``, are one object.

    Raises:
        UserError: an object has several files, and no pattern says which are meant.
    """
    every = [file_id(path, source.path) for path in visible_files(source.path, Counter())]
    every = [id for id in every if id.lower().endswith((*VOXEL_SUFFIXES, *ARRAY_SUFFIXES))]
    folders, names = ({id.rpartition("/")[part] for id in every} for part in (0, 2))
    of_folders = len(folders) > len(names)

    def split(id: str) -> tuple[str, str]:
        """Cuts an id into object and version."""
        folder, slash, name = id.rpartition("/")
        base, version = _BASE.fullmatch(name).groups()  # type: ignore[union-attr]
        return (folder, name) if of_folders else (folder + slash + base, version)

    files = Counter(split(id)[0] for id in every)
    chosen = Counter(split(id)[0] for id in ids)
    if source.pattern is None and max(chosen.values()) > 1:
        several = [design for design, count in chosen.items() if count > 1]
        versions = sorted({split(id)[1] for id in ids if split(id)[0] == several[0]})
        wanted = ("" if of_folders else "*") + versions[0]
        raise UserError(
            f"{source.name}: {len(several)} objects have several files ({several[0]}: {', '.join(versions)}); say "
            f"which, such as '{source.path}/**/{wanted}'"
        )
    alone = [not of_folders and files[split(id)[0]] == 1 and split(id)[1].count(".") == 1 for id in ids]
    return [id if single else split(id)[0] for id, single in zip(ids, alone, strict=True)]


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
