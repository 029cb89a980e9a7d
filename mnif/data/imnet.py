"""HDF5 files of occupancy, as IM-NET's scripts write them.

The layout, as read in ``point_sampling/`` of github.com/czq142857/IM-NET: ``voxels`` [N, 64, 64, 64, 1] uint8 0/1,
indexed x, y, z; ``points_16``, ``points_32``, ``points_64`` [N, P, 3] uint8, cells of a 256³ grid, with ``values_…``
[N, P, 1] uint8 0/1, sampled so that ``points_16`` has a point in each cell of 16³ and the others mostly near the
surface; ``pixels`` [N, 24, 137, 137], pictures, which are not read; and beside ``NAME.hdf5`` a ``NAME.txt`` with a
line for each shape, ``category/model``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mnif.data.arrays import row_names
from mnif.errors import UserError

_LATTICE = 256
_GRIDS = (128, 64, 32, 16, 8)


def open_hdf5(path: Path) -> Any:
    """The file, opened for reading.

    Raises:
        UserError: h5py is not installed, or the file is damaged.
    """
    try:
        import h5py
    except ImportError:
        raise UserError(f'{path}: "h5py" is missing; run: pip install "mnif-diffusion[voxels]"') from None
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({error})") from None


def hdf5_ids(path: Path, count: int) -> list[str]:
    """The lines of the ``.txt`` file of the same name, or row numbers if there is none.

    Raises:
        UserError: it has another number of lines.
    """
    names = path.with_suffix(".txt")
    if not names.is_file():
        return row_names(count)
    ids = names.read_text().split("\n")
    ids = [id.strip() for id in ids if id.strip()]
    if len(ids) != count:
        raise UserError(f"{names}: {len(ids)} names for the {count} shapes of {path.name}")
    return ids


def hdf5_grids(path: Path, file: Any, resolution: int | None) -> tuple[int, int, Callable[[int], np.ndarray]]:
    """How many grids, their resolution, and a function from a row to its grid as the file has it.

    Where the file has points and values but no ``voxels``, the points are put into a grid: of ``resolution``, or of
    the finest of 128, 64, 32, 16 and 8 cells per axis in which every cell of the first shape has a point.

    Raises:
        UserError: the file holds neither, or points in another form than described above.
    """
    if "voxels" in file:
        voxels = file["voxels"]
        if voxels.ndim not in (4, 5) or (voxels.ndim == 5 and voxels.shape[4] != 1):
            raise UserError(f'{path}: "voxels" is {list(voxels.shape)}; [N, R, R, R, 1] is needed')
        return len(voxels), voxels.shape[1], lambda row: voxels[row].reshape(voxels.shape[1:4])
    pairs = [(name, name.replace("points", "values")) for name in sorted(file) if name.startswith("points")]
    pairs = [(points, values) for points, values in pairs if values in file]
    if not pairs:
        raise UserError(f'{path}: needs "voxels", or "points" and "values"; found {", ".join(file) or "nothing"}')
    for name, values in pairs:
        points = file[name]
        if points.dtype.kind not in "ui" or points.ndim != 3 or points.shape[2] != 3 or not len(points):
            raise UserError(f'{path}: "{name}" is {points.dtype} {list(points.shape)}; integer [N, P, 3] is needed')
        if file[values].size != points.shape[0] * points.shape[1]:
            raise UserError(f'{path}: "{values}" is {list(file[values].shape)}; one value a point is needed')
    count = len(file[pairs[0][0]])
    grids = [resolution] if resolution is not None and _LATTICE % resolution == 0 else list(_GRIDS)
    shares = {(name, grid): _covered(path, file[name][0], grid) for grid in grids for name, _ in pairs}
    whole = next((key for key, share in shares.items() if share == 1), None)
    if whole is None:
        (name, grid), share = max(shares.items(), key=lambda item: item[1])
        raise UserError(
            f'{path}: has no "voxels", and its points cover no whole grid: "{name}" has a point in {share:.0%} of the '
            f"{grid}³ cells; take a coarser --resolution or a file with voxels"
        )
    name, grid = whole
    values = dict(pairs)[name]
    return count, grid, lambda row: _scattered(path, row, file[name][row], file[values][row], grid)


def _covered(path: Path, points: np.ndarray, grid: int) -> float:
    """The share of the grid's cells that have a point."""
    return len(np.unique(_cells(path, points, grid))) / grid**3


def _cells(path: Path, points: np.ndarray, grid: int) -> np.ndarray:
    if points.min() < 0 or points.max() >= _LATTICE:
        raise UserError(f"{path}: points from {points.min()} to {points.max()}; 0 to {_LATTICE - 1} is needed")
    x, y, z = (points.astype(np.int64) // (_LATTICE // grid)).T
    return (x * grid + y) * grid + z


def _scattered(path: Path, row: int, points: np.ndarray, values: np.ndarray, grid: int) -> np.ndarray:
    """[R, R, R] bool: a cell is occupied if half of its points are."""
    cells = _cells(path, points, grid)
    values = np.ravel(values)
    if not np.isin(values, (0, 1)).all():
        raise UserError(f"{path}: shape {row} has values other than 0 and 1")
    counts = np.bincount(cells, minlength=grid**3)
    if not counts.all():
        raise UserError(
            f"{path}: shape {row} has no point in {np.mean(counts == 0):.0%} of the {grid}³ cells; "
            "take a coarser --resolution or a file with voxels"
        )
    return (np.bincount(cells, weights=values, minlength=grid**3) >= counts / 2).reshape((grid,) * 3)
