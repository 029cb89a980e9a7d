"""`.binvox` files: a text header, then run-length pairs of bytes; y runs fastest, then z, then x."""

from pathlib import Path

import numpy as np

from mnif.errors import UserError
from mnif.files import written_atomically

_LONGEST_RUN = 255


def binvox_resolution(path: Path) -> int:
    """Cells per axis, from the header alone.

    Raises:
        UserError: the file is not binvox, or its grid is not a cube.
    """
    with path.open("rb") as file:
        return _parsed(path, file.read(1024))[0]


def read_binvox(path: Path) -> np.ndarray:
    """[R, R, R] bool, indexed x, y, z. ``translate`` and ``scale`` are not needed: a grid fills its cube.

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
    """Cells per axis and where the runs begin."""
    header, mark, _ = content.partition(b"\ndata\n")
    lines = header.decode("ascii", "replace").splitlines()
    sizes = next((line.split()[1:] for line in lines if line.startswith("dim")), [])
    if not mark or not lines[0].startswith("#binvox") or len(sizes) != 3 or not all(s.isdigit() for s in sizes):
        raise UserError(f"{path}: not a binvox file (its header needs #binvox, dim and data)")
    if len(set(sizes)) > 1 or int(sizes[0]) < 1:
        raise UserError(f"{path}: the grid is {'×'.join(sizes)}; a cube is needed")
    return int(sizes[0]), len(header) + len(mark)
