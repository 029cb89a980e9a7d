"""Files of occupancy: `.binvox`, the HDF5 of IM-NET, and meshes filled in.

`.binvox` is a text header, then run-length pairs of bytes; y runs fastest, then z, then x. A mesh becomes the cells of
its surface and whatever they enclose.

The HDF5 layout, as read in ``point_sampling/`` of github.com/czq142857/IM-NET: ``voxels`` [N, 64, 64, 64, 1] uint8
0/1, indexed x, y, z; ``points_16``, ``points_32``, ``points_64`` [N, P, 3] uint8, cells of a 256³ grid, with
``values_…`` [N, P, 1] uint8 0/1, sampled so that ``points_16`` has a point in each cell of 16³ and the others mostly
near the surface; ``pixels`` [N, 24, 137, 137], pictures, which are not read; and beside ``NAME.hdf5`` a ``NAME.txt``
with a line for each shape, ``category/model``.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes

from mnif.data.arrays import row_names
from mnif.utils.errors import UserError, require
from mnif.utils.files import written_atomically

_LONGEST_RUN = 255
LARGEST_GRID = 512
"""Cells per axis of what can be read: 128 MB a shape."""


def binvox_resolution(path: Path) -> int:
    """Reads the cells per axis, from the header alone.

    Raises:
        UserError: the file is not binvox, or its grid is not a cube.
    """
    with path.open("rb") as file:
        return _parsed(path, file.read(1024))[0]


def read_binvox(path: Path) -> np.ndarray:
    """Reads a grid [R, R, R] bool, indexed x, y, z. ``translate`` and ``scale`` do not matter: a grid fills its cube.

    Version 2 differs in that a cell may hold any value above 0 (the part it belongs to); all of them are occupied.

    Raises:
        UserError: the file is damaged, or its grid is not a cube.
    """
    content = path.read_bytes()
    resolution, start = _parsed(path, content)
    body = np.frombuffer(content, dtype=np.uint8, offset=start)
    values, counts = body[0 : len(body) // 2 * 2 : 2], body[1::2]
    if len(body) % 2 or counts.sum(dtype=np.int64) != resolution**3:
        raise UserError(f"{path}: its runs give {counts.sum(dtype=np.int64)} cells where dim says {resolution}³")
    return np.repeat(values > 0, counts).reshape((resolution,) * 3).transpose(0, 2, 1)


def write_binvox(path: Path, occupancy: np.ndarray) -> None:
    """Writes a grid as binvox version 1, atomically.

    Args:
        path: the file.
        occupancy: [R, R, R] bool, indexed x, y, z.
    """
    cells = np.ascontiguousarray(occupancy.transpose(0, 2, 1)).ravel().astype(np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(np.diff(cells)) + 1])
    runs = bytearray()
    for value, length in zip(cells[starts], np.diff([*starts, len(cells)]), strict=True):
        whole, rest = divmod(int(length), _LONGEST_RUN)
        runs += bytes([value, _LONGEST_RUN]) * whole + (bytes([value, rest]) if rest else b"")
    size = " ".join(str(cells_per_axis) for cells_per_axis in occupancy.shape)
    with written_atomically(path) as temporary:
        temporary.write_bytes(f"#binvox 1\ndim {size}\ntranslate 0 0 0\nscale 1\ndata\n".encode() + runs)


def _parsed(path: Path, content: bytes) -> tuple[int, int]:
    """Reads a header: cells per axis, and where the runs begin."""
    header, mark, _ = content.partition(b"\ndata\n")
    lines = header.decode("ascii", "replace").splitlines()
    sizes = next((line.split()[1:] for line in lines if line.startswith("dim")), [])
    if not mark or not lines[0].startswith("#binvox") or len(sizes) != 3 or not all(s.isdigit() for s in sizes):
        raise UserError(f"{path}: not a binvox file (its header needs #binvox, dim and data)")
    if any(len(size) > 6 or int(size) > LARGEST_GRID for size in sizes):
        raise UserError(
            f"{path}: the grid is {'×'.join(size[:12] for size in sizes)}; {LARGEST_GRID}³ at most can be read"
        )
    if len(set(sizes)) > 1 or int(sizes[0]) < 1:
        raise UserError(f"{path}: the grid is {'×'.join(sizes)}; a cube is needed")
    return int(sizes[0]), len(header) + len(mark)


_LATTICE = 256
_GRIDS = (128, 64, 32, 16, 8)


def open_hdf5(path: Path) -> Any:
    """Opens a file for reading.

    Raises:
        UserError: h5py is not installed, or the file is damaged.
    """
    require("h5py", "voxels", str(path))
    import h5py

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({error})") from None


def hdf5_ids(path: Path, count: int) -> list[str]:
    """Reads the lines of the ``.txt`` file of the same name; row numbers if there is none.

    Raises:
        UserError: it has another number of lines.
    """
    names = path.with_suffix(".txt")
    if not names.is_file():
        return row_names(count)
    try:
        ids = names.read_text().split("\n")
    except UnicodeDecodeError:
        raise UserError(f"{names}: not a text file") from None
    ids = [id.strip() for id in ids if id.strip()]
    if len(ids) != count:
        raise UserError(f"{names}: {len(ids)} names for the {count} shapes of {path.name}")
    return ids


def hdf5_grids(path: Path, file: Any, resolution: int | None) -> tuple[int, int, Callable[[int], np.ndarray]]:
    """Finds how many grids there are, their resolution, and a function from a row to its grid as the file has it.

    Where the file has points and values but no ``voxels``, the points are put into a grid: of ``resolution``, or of
    the finest of 128, 64, 32, 16 and 8 cells per axis in which every cell of the first shape has a point.

    Raises:
        UserError: the file holds neither, or points in another form than described above.
    """
    import h5py

    for name, array in file.items():
        if name == "voxels" or name.startswith(("points", "values")):
            if not isinstance(array, h5py.Dataset) or array.dtype.kind not in "biuf" or not array.ndim:
                raise UserError(f'{path}: "{name}" is no array of numbers')
            if array.nbytes > 64 << 20 and array.nbytes > 2000 * array.id.get_storage_size():  # gzip packs 1030 to one
                raise UserError(f'{path}: "{name}" should hold {array.nbytes:,} bytes, and most of them are missing')
    if "voxels" in file:
        voxels = file["voxels"]
        if len(set(voxels.shape[1:4])) > 1 or max(voxels.shape[1:]) > LARGEST_GRID or not voxels.size:
            raise UserError(f'{path}: "voxels" is {list(voxels.shape)}; cubes of {LARGEST_GRID}³ at most are needed')
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
    """Computes the share of the grid's cells that have a point."""
    return len(np.unique(_cells(path, points, grid))) / grid**3


def _cells(path: Path, points: np.ndarray, grid: int) -> np.ndarray:
    if points.min() < 0 or points.max() >= _LATTICE:
        raise UserError(f"{path}: points from {points.min()} to {points.max()}; 0 to {_LATTICE - 1} is needed")
    x, y, z = (points.astype(np.int64) // (_LATTICE // grid)).T
    return (x * grid + y) * grid + z


def _scattered(path: Path, row: int, points: np.ndarray, values: np.ndarray, grid: int) -> np.ndarray:
    """Puts points into a grid [R, R, R] bool: a cell is occupied if half of its points are."""
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


MESH_SUFFIXES = (".obj", ".glb", ".stl", ".ply", ".off")
LONGEST_SIDE = 0.9
"""The longest side of a mesh's bounding box, as a share of the cube's."""


def voxelise_mesh(path: Path, resolution: int) -> np.ndarray:
    """Fills the cells that a mesh's surface passes through or encloses: [R, R, R] bool, indexed x, y, z.

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
    """Yields points, in batches [P, 3], that cover triangles [F, 3, 3]: no place is farther than half a cell from one.

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
    """Reads vertices [V, 3] float64 and faces [F, 3], at least one; vertices used by a face are finite.

    Raises:
        UserError: trimesh is not installed, or the file is damaged, has no faces, or a corner is NaN or infinite.
    """
    require("trimesh", "voxels", str(path))
    import trimesh

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
