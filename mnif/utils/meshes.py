"""Surfaces: files of triangles, those of voxel grids by marching cubes, and shaded images.

Arrays are indexed [x, y, z], y is up, and the grid fills the cube [-1, 1]³: the centre of voxel r of R lies at
(2r + 1)/R - 1 of its axis. A mesh is its vertices [V, 3] float32 and its faces [F, 3] int64, wound anticlockwise as
seen from outside.
"""

import math
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically

MESH_SUFFIXES = (".obj", ".glb", ".gltf", ".stl", ".ply", ".off")
"""Of files that are read."""
WRITTEN_SUFFIXES = (".glb", ".obj", ".ply", ".stl")
_FARTHEST = 1e100  # coordinate of a corner; differences and products of larger ones would not be finite
_OVERSAMPLING = 2  # pixels per axis of the drawing that are averaged into one of the image
_PIXELS_AT_ONCE = 1 << 18  # of all triangles' bounding boxes; bounds the memory of a drawing
_GREY, _AMBIENT = 0.85, 0.35  # of the object, and the share of light that comes from everywhere
_LIGHT = np.array([-0.4, 0.7, 0.7]) / np.linalg.norm([-0.4, 0.7, 0.7])  # right, up, towards the camera


def mesh_from_values(values: np.ndarray, level: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Finds the closed surface around the voxels above ``level``.

    A volume that reaches the border of the grid is closed there by a wall on the face of the cube [-1, 1]³.

    Args:
        values: [R, R, R], larger inside; between voxels the surface is where their linear interpolation is ``level``.
            Of occupancies 0 and 1, take the level 0.5.
        level: the value on the surface.

    Returns:
        Vertices [V, 3] float32 in [-1, 1] and faces [F, 3] int64, closed and of positive volume.

    Raises:
        UserError: the values are no cube or not finite, or all or none of them are above the level.
    """
    values = np.asarray(values)
    if values.ndim != 3 or len(set(values.shape)) != 1 or not values.size:
        raise UserError(f"mesh: values {list(values.shape)}; [R, R, R] is needed")
    if not np.isfinite(values).all():
        raise UserError("mesh: the values hold NaN or infinity; look at the model they come from")
    values = (values - level).astype(np.float32)
    inside = values > 0
    if inside.all() or not inside.any():
        raise UserError(f"mesh: {'all' if inside.any() else 'none'} of the values are above {level}; no surface there")
    return _closed_surface(values)


def _closed_surface(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the surface at 0 of finite float32 [R, R, R] of which some are positive; all may be."""
    from skimage.measure import marching_cubes

    rim = np.pad(values, 1, mode="edge")
    padded = -np.abs(rim)  # the mirror of an inside value: the surface lies half-way to it, on the cube's face
    padded[1:-1, 1:-1, 1:-1] = rim[1:-1, 1:-1, 1:-1]
    # Lorensen's tables and not Lewiner's: those, as implemented, leave holes in binary volumes where faces of voxels
    # meet in a checkerboard (measured on scikit-image 0.26: 10 of 40 random ones).
    vertices, faces, _, _ = marching_cubes(padded, 0.0, method="lorensen", gradient_direction="ascent")
    vertices = np.clip((2 * vertices - 1) / len(values) - 1, -1, 1)  # index 0 of the padded grid is voxel -1
    return vertices.astype(np.float32), faces.astype(np.int64)


def read_mesh(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads vertices [V, 3] float64 and faces [F, 3], at least one; vertices used by a face are finite.

    Raises:
        UserError: the file is damaged, has no faces, names a corner that is not there, or a corner is NaN or infinite.
    """
    import trimesh

    try:
        content = _absolute_obj(path) if path.suffix.lower() == ".obj" else path
        kind = path.suffix.lower().removeprefix(".")
        scene: Any = trimesh.load_scene(content, file_type=kind, process=False, skip_materials=True)
        parts = {name: part for name, part in scene.geometry.items() if len(getattr(part, "faces", ()))}
    except UserError:
        raise
    except Exception as error:  # what its loaders raise is no closed list
        raise UserError(f"{path}: unreadable mesh ({type(error).__name__}: {error}); remove or replace it") from None
    if not parts:
        raise UserError(f"{path}: has no faces, so no surface; remove it")
    for part in parts.values():  # before they are put together, where a wrong index would name another part's corner
        _check_indices(path, np.asarray(part.faces), len(part.vertices))
    mesh = scene.to_mesh()
    vertices, faces = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces)
    if not len(faces):
        raise UserError(f"{path}: has no faces, so no surface; remove it")
    if not (np.abs(vertices[faces]) < _FARTHEST).all():  # NaN is not
        raise UserError(f"{path}: a corner is NaN, infinite or beyond {_FARTHEST:g}; mend or remove it")
    return vertices, faces


def _check_indices(path: Path, faces: np.ndarray, count: int) -> None:
    low, high = int(faces.min()), int(faces.max())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise UserError(f"{path}: a face names corner {wrong} where there are 0 to {count - 1}; mend or remove it")


_OBJ_ODD = re.compile(rb"^[ \t]*f[ \t](?:[^\r\n]*[ \t])?[+]?(?:-|0+(?:[/ \t\r\n]|$))", re.MULTILINE)  # backwards or 0


def _absolute_obj(path: Path) -> Path | BytesIO:
    """Gives an OBJ file as it is, or with indices that count backwards as those that count from the beginning.

    -1 is the last vertex so far, which trimesh takes for the last of all; and there is no vertex 0.

    Raises:
        UserError: a face names a corner that is not there.
    """
    content = path.read_bytes()
    if not _OBJ_ODD.search(content):
        return path
    lines, count = [], 0
    for line in content.splitlines():
        words = line.partition(b"#")[0].split()
        if words[:1] == [b"v"]:
            count += 1
        if words[:1] == [b"f"]:
            corners = [int(word.split(b"/")[0]) for word in words[1:]]
            if 0 in corners:
                raise UserError(f"{path}: a face names corner 0, but an OBJ counts from 1; mend or remove it")
            corners = [count + 1 + corner if corner < 0 else corner for corner in corners]
            if min(corners, default=1) < 1:
                raise UserError(f"{path}: a face counts farther back than there are corners; mend or remove it")
            line = b"f " + b" ".join(b"%d" % corner for corner in corners)
        lines.append(line)
    return BytesIO(b"\n".join(lines))


def save_mesh(path: Path, vertices: np.ndarray, faces: np.ndarray) -> None:
    """Writes a mesh atomically, in the format its suffix names: .glb, .obj, .ply or .stl.

    Args:
        path: the file.
        vertices: [V, 3].
        faces: [F, 3], indices of vertices.

    Raises:
        UserError: another suffix.
    """
    if path.suffix.lower() not in WRITTEN_SUFFIXES:
        raise UserError(f"{path}: a mesh is written as one of {', '.join(WRITTEN_SUFFIXES)}")
    import trimesh

    mesh = trimesh.Trimesh(vertices, faces, process=False)  # processing would reorder what the caller gave
    with written_atomically(path, flush=False) as temporary:  # whose name has no suffix to tell the format
        mesh.export(temporary, file_type=path.suffix.lower().removeprefix("."))


def mesh_preview(
    vertices: np.ndarray, faces: np.ndarray, size: int = 128, azimuth: float = 35.0, elevation: float = 25.0
) -> np.ndarray:
    """Draws a shaded image of a mesh: grey, matt and lit from the upper left, on white, without perspective.

    The whole cube [-1, 1]³ just fits, whatever the mesh, so images beside each other have one scale.

    Args:
        vertices: [V, 3] in [-1, 1]; what lies outside the image is cut off.
        faces: [F, 3]; both sides of a face are drawn, so an open mesh may be seen from within.
        size: pixels per side.
        azimuth: degrees from +z towards +x where the camera stands.
        elevation: degrees above the plane y = 0 where it stands.

    Returns:
        uint8 [size, size, 3].

    Raises:
        UserError: a size below 1.
    """
    if size < 1:
        raise UserError(f"preview of size {size}: at least 1 pixel is needed")
    axes = _camera_axes(azimuth, elevation)
    pixels = size * _OVERSAMPLING
    in_camera = np.asarray(vertices, dtype=np.float64) @ axes.T
    extent = np.abs(axes[:2]).sum(axis=1).max()  # of the cube's projection
    in_camera[:, :2] = (in_camera[:, :2] * [1, -1] / extent + 1) * pixels / 2  # rows count downwards
    corners = in_camera[faces]
    sheet = np.ones(pixels * pixels)
    nearest = _nearest_faces(corners, pixels)
    drawn = nearest >= 0
    sheet[drawn] = _shades(np.asarray(vertices, dtype=np.float64)[faces] @ axes.T)[nearest[drawn]]
    sheet = sheet.reshape(size, _OVERSAMPLING, size, _OVERSAMPLING).mean(axis=(1, 3))
    return np.repeat((sheet * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def occupancy_preview(
    occupancy: np.ndarray, size: int = 128, azimuth: float = 35.0, elevation: float = 25.0
) -> np.ndarray:
    """Draws a shaded image of the occupied voxels of [R, R, R] bool; white if there are none.

    The other arguments and what is returned are those of :func:`mesh_preview`.

    Raises:
        UserError: a size below 1.
    """
    occupancy = np.asarray(occupancy, dtype=bool)
    if not occupancy.any():
        return mesh_preview(np.empty((0, 3)), np.empty((0, 3), dtype=np.int64), size, azimuth, elevation)
    return mesh_preview(*_closed_surface(np.where(occupancy, np.float32(1), np.float32(-1))), size, azimuth, elevation)


def _camera_axes(azimuth: float, elevation: float) -> np.ndarray:
    """Computes rows right, up, to the camera, [3, 3], as :func:`mnif.signals.volume_rendering.turntable_poses`."""
    sin, cos = math.sin(math.radians(azimuth)), math.cos(math.radians(azimuth))
    rise, reach = math.sin(math.radians(elevation)), math.cos(math.radians(elevation))
    return np.array([[cos, 0, -sin], [-rise * sin, reach, -rise * cos], [reach * sin, rise, reach * cos]])


def _shades(corners: np.ndarray) -> np.ndarray:
    """Computes the brightness [F] in [0, 1] of matt triangles [F, 3, 3] in camera axes, turned to face the camera."""
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-30
    normals *= np.where(normals[:, 2:] < 0, -1, 1)
    return _GREY * (_AMBIENT + (1 - _AMBIENT) * np.clip(normals @ _LIGHT, 0, 1))


def _nearest_faces(corners: np.ndarray, pixels: int) -> np.ndarray:
    """Finds the face seen at each pixel centre, its index [pixels²] int64, -1 for none: a z-buffer without a loop.

    Args:
        corners: [F, 3, 3], column and row in pixels and nearness.
        pixels: per side.
    """
    depth = np.full(pixels * pixels, -np.inf)
    face = np.full(pixels * pixels, -1, dtype=np.int64)
    low = np.clip(np.ceil(corners[:, :, :2].min(axis=1) - 0.5), 0, pixels).astype(np.int64)
    high = np.clip(np.floor(corners[:, :, :2].max(axis=1) - 0.5), -1, pixels - 1).astype(np.int64)
    spans = np.maximum(high - low + 1, 0)  # columns and rows of pixel centres in each bounding box
    areas = spans.prod(axis=1)
    edges = corners[:, 1:, :2] - corners[:, :1, :2]
    twice_area = edges[:, 0, 0] * edges[:, 1, 1] - edges[:, 0, 1] * edges[:, 1, 0]
    seen = np.flatnonzero((areas > 0) & (np.abs(twice_area) > 1e-12))
    batch = np.cumsum(areas[seen]) // _PIXELS_AT_ONCE
    for batch_seen in np.split(seen, np.flatnonzero(np.diff(batch)) + 1):
        owner = np.repeat(batch_seen, areas[batch_seen])
        place = np.arange(len(owner)) - np.repeat(np.cumsum(areas[batch_seen]) - areas[batch_seen], areas[batch_seen])
        column, row = low[owner, 0] + place % spans[owner, 0], low[owner, 1] + place // spans[owner, 0]
        x, y = column + 0.5 - corners[owner, 0, 0], row + 0.5 - corners[owner, 0, 1]
        second = (x * edges[owner, 1, 1] - y * edges[owner, 1, 0]) / twice_area[owner]  # barycentric coordinates
        third = (y * edges[owner, 0, 0] - x * edges[owner, 0, 1]) / twice_area[owner]
        covered = (second >= -1e-9) & (third >= -1e-9) & (second + third <= 1 + 1e-9)  # no cracks between neighbours
        owner, pixel = owner[covered], (row * pixels + column)[covered]
        nearness = corners[owner, :, 2]
        nearness = (
            nearness[:, 0]
            + second[covered] * (nearness[:, 1] - nearness[:, 0])
            + third[covered] * (nearness[:, 2] - nearness[:, 0])
        )
        np.maximum.at(depth, pixel, nearness)
        front = nearness == depth[pixel]
        face[pixel[front]] = owner[front]
    return face
