"""Files of occupancy: `.binvox`, the HDF5 of IM-NET, arrays, and meshes filled in.

`.binvox` is a text header, then run-length pairs of bytes; y runs fastest, then z, then x. A closed mesh becomes as
many cells as its volume is, those it covers most; an open one the cells of its surface and whatever they enclose.

The HDF5 layout, as read in ``point_sampling/`` of github.com/czq142857/IM-NET: ``voxels`` [N, 64, 64, 64, 1] uint8
0/1, indexed x, y, z; ``points_16``, ``points_32``, ``points_64`` [N, P, 3] uint8, cells of a 256³ grid, with
``values_…`` [N, P, 1] uint8 0/1, sampled so that ``points_16`` has a point in each cell of 16³ and the others mostly
near the surface; ``pixels`` [N, 24, 137, 137], pictures, which are not read; and beside ``NAME.hdf5`` a ``NAME.txt``
with a line for each shape, ``category/model``.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import binary_fill_holes

from mnif.data.arrays import row_names
from mnif.utils.errors import UserError, require
from mnif.utils.files import written_atomically
from mnif.utils.meshes import read_mesh

_LONGEST_RUN = 255
LARGEST_GRID = 512
"""Cells per axis of what can be read: 128 MB a shape."""
_BODY = re.compile(rb"\ndata[ \t]*\r?\n")


def binvox_resolution(path: Path) -> int:
    """Reads the cells per axis, from the header alone.

    Raises:
        UserError: the file is not binvox, or its grid is not a cube.
    """
    with path.open("rb") as file:
        return _parsed(path, file.read(1024))[0]


def read_binvox(path: Path) -> np.ndarray:
    """Reads a grid [R, R, R] bool, indexed x, y, z. ``translate`` and ``scale`` do not matter: a grid fills its cube.

    Line ends may be those of Windows, and there may be one after the last run.

    Version 2 differs in that a cell may hold any value above 0 (the part it belongs to); all of them are occupied.

    Raises:
        UserError: the file is damaged, or its grid is not a cube.
    """
    content = path.read_bytes()
    resolution, start = _parsed(path, content)
    body = np.frombuffer(content, dtype=np.uint8, offset=start)
    values, counts = body[0 : len(body) // 2 * 2 : 2], body[1::2]
    cells = counts.cumsum(dtype=np.int64)
    runs = int(np.searchsorted(cells, resolution**3)) + 1
    if not len(cells) or resolution**3 not in cells[runs - 1 : runs] or body[2 * runs :].tobytes().strip(b"\r\n"):
        raise UserError(f"{path}: its runs give {counts.sum(dtype=np.int64)} cells where dim says {resolution}³")
    values, counts = values[:runs], counts[:runs]
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
    mark = _BODY.search(content)
    header = content[: mark.start()] if mark else b""
    lines = header.decode("ascii", "replace").splitlines() or [""]
    sizes = next((line.split()[1:] for line in lines if line.startswith("dim")), [])
    digits = all(size.isascii() and size.isdigit() and len(size) < 10 for size in sizes)
    if not mark or not lines[0].startswith("#binvox") or len(sizes) != 3 or not digits:
        raise UserError(f"{path}: not a binvox file (its header needs #binvox, dim and data)")
    if any(len(size) > 6 or int(size) > LARGEST_GRID for size in sizes):
        shown = "×".join(size[:12] for size in sizes)
        raise UserError(f"{path}: the grid is {shown}; {LARGEST_GRID}³ at most can be read")
    if len({int(size) for size in sizes}) > 1 or int(sizes[0]) < 1:
        raise UserError(f"{path}: the grid is {'×'.join(sizes)}; a cube is needed")
    return int(sizes[0]), mark.end()


def grids_of_array(values: np.ndarray, where: str) -> tuple[np.ndarray, bool]:
    """Brings an array of one or several grids to [N, R, R, R].

    Args:
        values: [R, R, R] or [N, R, R, R]; or, as `device/sample.py` of a bundle writes volumes, [R, R, R, 1] or
            [N, R, R, R, 1].
        where: names it in the message.

    Returns:
        The grids, and whether they are volumes with the surface at 0 (about -1 outside, 1 inside): those with an axis
        of one channel, if it holds floats other than 0 and 1.

    Raises:
        UserError: it has another shape.
    """
    shape = list(values.shape)
    channel = shape[-1:] == [1] and (values.ndim == 5 or (values.ndim == 4 and len(set(shape[:3])) == 1))
    grids = values[..., 0] if channel else values
    grids = grids[None] if grids.ndim == 3 else grids
    if grids.ndim != 4 or len(set(grids.shape[1:])) > 1 or not grids.size:
        raise UserError(f"{where} is {shape}; cubes [N, R, R, R], or one [R, R, R], are needed")
    signed = channel and values.dtype.kind == "f" and not np.isin(values, (0, 1)).all()
    return grids, bool(signed)


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
    ids = names.read_bytes().decode("utf-8", "backslashreplace").split("\n")
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


LONGEST_SIDE = 0.9
"""The longest side of a mesh's bounding box, as a share of the cube's."""

_LINES = 8  # along x and y, of those that cut a cell along z to measure how much of it is covered
_OFF_EDGES = np.array([2.7e-6, 1.3e-6])  # cells; moves the lines off the edges of meshes made by rule
_VOLUME_ERROR = 0.01  # below which cells that are covered alike are not told apart
_TESTS_AT_ONCE = 2_000_000


def voxelise_mesh(path: Path, resolution: int) -> np.ndarray:
    """Fills a mesh in: [R, R, R] bool, indexed x, y, z.

    The mesh's bounding box is centred in the cube and its longest side made 0.9 of the cube's; axes stay as the file
    has them. A closed mesh, in which every edge is there as often one way as the other, becomes as many cells as its
    volume is (within 1 %), those of which it covers most. A surface with gaps has no volume: it becomes the cells that
    it passes through or encloses, which are too many (a ball: by 28 % at 16 cells per axis, 7 % at 64); gaps wider
    than a cell leave a shell.

    Args:
        path: of one of :data:`mnif.utils.meshes.MESH_SUFFIXES`; the parts of a scene are taken together.
        resolution: cells per axis.

    Raises:
        UserError: as :func:`mnif.utils.meshes.read_mesh`, or the mesh is one point.
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
    if is_closed(triangles):
        coverage, volume = cell_coverage(triangles, resolution)
        if volume >= 0.5:
            return _most_covered(coverage, volume)
    surface = np.zeros((resolution,) * 3, dtype=bool)
    for points in _surface_points(triangles):
        surface[tuple(np.floor(points).astype(int).T)] = True
    return binary_fill_holes(surface)


def is_closed(triangles: np.ndarray) -> bool:
    """Whether triangles [F, 3, 3] have every edge as often one way as the other, so that they have an inside."""
    # Corners and edges as numbers of 64 bits, mixed by odd factors: sorting places themselves takes ten times as long.
    places = np.round(triangles * 1e5).astype(np.int64).view(np.uint64)
    corners = places @ np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], dtype=np.uint64)
    corners ^= corners >> np.uint64(29)
    start, end = corners.ravel(), np.roll(corners, -1, axis=1).ravel()
    factors = np.uint64(0xD6E8FEB86659FD93), np.uint64(0xA0761D6478BD642F)
    there, back = np.sort(start * factors[0] + end * factors[1]), np.sort(end * factors[0] + start * factors[1])
    return bool((there == back).all())


def cell_coverage(triangles: np.ndarray, resolution: int) -> tuple[np.ndarray, float]:
    """Measures which share of each cell lies within a closed surface, along 8×8 lines a cell.

    Args:
        triangles: [F, 3, 3] in cells, all within the grid; inside is where they wind around a point at least once.
        resolution: cells per axis.

    Returns:
        Shares [R, R, R] in [0, 1], and the volume in cells: exact, by the divergence theorem, unless parts overlap.
    """
    lines, heights, signs = _crossings(triangles, resolution * _LINES)
    order = np.lexsort((heights, lines))
    lines, heights, signs = lines[order], heights[order], signs[order]
    last = np.diff(lines, append=-1) != 0
    winding = signs.cumsum()
    winding -= np.concatenate([[0], winding[last][:-1]])[np.concatenate([[0], last[:-1].cumsum()])]  # 0 before a line
    within = (winding != 0) & ~last
    change = within.astype(int) - np.concatenate([[False], within[:-1]]).astype(int)
    # What lies above a height counts for an entry and against an exit: a part of its cell, and all cells beyond.
    cells = np.clip(heights.astype(int), 0, resolution - 1)
    column = (lines // (resolution * _LINES) // _LINES) * resolution + lines % (resolution * _LINES) // _LINES
    place = column * (resolution + 1) + cells
    size = resolution**2 * (resolution + 1)
    part = np.bincount(place, change * (cells + 1 - heights), size)
    beyond = np.bincount(place + 1, change, size).reshape(-1, resolution + 1).cumsum(axis=1)
    shares = (part.reshape(-1, resolution + 1) + beyond)[:, :resolution] / _LINES**2
    coverage = shares.reshape((resolution,) * 3).clip(0, 1)
    exact = np.einsum("fi,fi->f", triangles[:, 0], np.cross(triangles[:, 1], triangles[:, 2])).sum() / 6
    overlap = np.abs(winding).max(initial=0) > 1 or (winding.min(initial=0) < 0 < winding.max(initial=0))
    return coverage, float(coverage.sum() if overlap else abs(exact))


def _crossings(triangles: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts triangles [F, 3, 3] with count² lines along z.

    Returns:
        For each crossing the number of its line, x · count + y; its height; and 1 or -1 by the triangle's side.
    """
    flat = triangles[..., :2] * _LINES - 0.5 + _OFF_EDGES  # line (i, j) passes through i, j
    edge, other = flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0]
    area = edge[:, 0] * other[:, 1] - edge[:, 1] * other[:, 0]
    low = np.ceil(flat.min(axis=1)).astype(int).clip(0)
    size = (np.floor(flat.max(axis=1)).astype(int).clip(max=count - 1) - low + 1).clip(0)
    tests = np.where(area == 0, 0, size.prod(axis=1))
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = [(np.empty(0, int), np.empty(0), np.empty(0, int))]
    batches = np.flatnonzero(np.diff(tests.cumsum() // _TESTS_AT_ONCE, prepend=0)).tolist()
    for start, stop in zip([0, *batches], [*batches, len(tests)], strict=True):
        face = np.repeat(np.arange(start, stop), tests[start:stop])
        number = np.arange(len(face)) - np.repeat(tests[start:stop].cumsum() - tests[start:stop], tests[start:stop])
        line = low[face] + np.stack([number // size[face, 1], number % size[face, 1]], axis=1)
        offset = line - flat[face, 0]
        second = (offset[:, 0] * other[face, 1] - offset[:, 1] * other[face, 0]) / area[face]  # barycentric
        third = (edge[face, 0] * offset[:, 1] - edge[face, 1] * offset[:, 0]) / area[face]
        hit = (second >= 0) & (third >= 0) & (second + third <= 1)
        face, line, second, third = face[hit], line[hit], second[hit], third[hit]
        z = triangles[face, :, 2]
        height = z[:, 0] + second * (z[:, 1] - z[:, 0]) + third * (z[:, 2] - z[:, 0])
        found.append((line[:, 0] * count + line[:, 1], height, np.sign(area[face]).astype(int)))
    lines, heights, signs = (np.concatenate(part) for part in zip(*found, strict=True))
    return lines, heights, signs


def _most_covered(coverage: np.ndarray, volume: float) -> np.ndarray:
    """Chooses as many cells as the volume is, the most covered first.

    Cells that are covered alike, as mirrored ones are, stay together where that is within 1 % of the volume; else
    they are taken in their order, so that a wall of one and a half cells becomes one and, over half of it, two.
    """
    shares = np.round(coverage, 3).ravel()
    levels, counts = np.unique(shares[shares > 0], return_counts=True)
    totals = counts[::-1].cumsum()
    nearest = int(np.abs(totals - volume).argmin())
    if abs(totals[nearest] - volume) <= _VOLUME_ERROR * volume:
        return coverage.round(3) >= levels[::-1][nearest]
    chosen = np.zeros(shares.shape, dtype=bool)
    chosen[np.argsort(-shares, kind="stable")[: max(1, round(volume))]] = True
    return chosen.reshape(coverage.shape)


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
