"""Textured OBJ files become arrays of triangles."""

import io
from dataclasses import dataclass, field
from zipfile import ZipFile

import numpy as np
from PIL import Image

from furniture.catalogue import Item

HALF_SIDE = 0.9  # the longest side of an object spans [-0.9, 0.9]


@dataclass
class Material:
    """The look of a part.

    Attributes:
        colour: [3] in [0, 1].
        opacity: in [0, 1].
        texture: the picture that takes the colour's place, largest level first, each [H, W, 4] uint8 and half as large
            as the one before; empty if there is none.
    """

    colour: np.ndarray = field(default_factory=lambda: np.full(3, 0.7))
    opacity: float = 1.0
    texture: list[np.ndarray] = field(default_factory=list)


@dataclass
class Mesh:
    """Triangles in [-0.9, 0.9]³, y up, z to the front.

    Attributes:
        corners: [F, 3, 3] positions.
        normals: [F, 3, 3] unit vectors per corner.
        uv: [F, 3, 2] texture coordinates, zero where there are none.
        material: [F] indices into ``materials``.
        materials: what the parts look like.
    """

    corners: np.ndarray
    normals: np.ndarray
    uv: np.ndarray
    material: np.ndarray
    materials: list[Material]


def load_mesh(item: Item) -> Mesh:
    """Reads, turns, centres and scales an object.

    Raises:
        ValueError: the file has no triangle of any size.
    """
    with ZipFile(item.archive) as file:
        text = file.read(item.model).decode("latin-1")
        names = {name.lower(): name for name in file.namelist()}
        folder = item.model.rsplit("/", 1)[0]
        obj = _parse_obj(text)
        library: dict[str, Material] = {}
        for name in obj.libraries:
            path = names.get(f"{folder}/{name}".lower())
            if path is not None:
                library |= _parse_mtl(file, names, folder, file.read(path).decode("latin-1"))

    corners = obj.positions[obj.corners[:, :, 0]] @ item.rotation.T
    low, high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    corners = (corners - (low + high) / 2) * (2 * HALF_SIDE / (high - low).max())
    flat = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    solid = np.linalg.norm(flat, axis=1) > 1e-12  # triangles without area have no normal
    corners, flat, indices = corners[solid], flat[solid], obj.corners[solid]

    normals = np.repeat(flat[:, None], 3, axis=1)
    given = indices[:, :, 2] >= 0
    normals[given] = obj.normals[indices[:, :, 2][given]] @ item.rotation.T
    length = np.linalg.norm(normals, axis=2, keepdims=True)
    normals = np.where(length > 1e-9, normals, flat[:, None])
    normals /= np.linalg.norm(normals, axis=2, keepdims=True)
    uv = np.zeros((*corners.shape[:2], 2))
    given = indices[:, :, 1] >= 0
    uv[given] = obj.uv[indices[:, :, 1][given]]
    materials = [library.get(name, Material()) for name in obj.material_names]
    return Mesh(corners, normals, uv, obj.material[solid], materials)


@dataclass
class _Obj:
    positions: np.ndarray
    uv: np.ndarray
    normals: np.ndarray
    corners: np.ndarray  # [F, 3, 3]: indices of position, uv and normal, -1 where there is none
    material: np.ndarray
    material_names: list[str]
    libraries: list[str]


def _parse_obj(text: str) -> _Obj:
    vectors: dict[str, list[list[float]]] = {"v": [], "vt": [], "vn": []}
    polygons: list[list[tuple[int, ...]]] = []
    material: list[int] = []
    names = [""]
    libraries: list[str] = []
    for line in text.splitlines():
        kind, _, rest = line.strip().partition(" ")
        if kind in vectors:
            vectors[kind].append([float(value) for value in rest.split()[: 2 if kind == "vt" else 3]])
        elif kind == "f":
            counts = (len(vectors["v"]), len(vectors["vt"]), len(vectors["vn"]))
            polygons.append([_corner(corner, counts) for corner in rest.split()])
            material.append(len(names) - 1)
        elif kind == "usemtl":
            names.append(rest.strip())
        elif kind == "mtllib":
            libraries.append(rest.strip())
    positions = np.array(vectors["v"], dtype=np.float64).reshape(-1, 3)
    triangles: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    sizes = np.array([len(polygon) for polygon in polygons], dtype=np.int64)
    for size in np.unique(sizes[sizes >= 3]):
        rows = np.flatnonzero(sizes == size)
        cut, which = _cut(np.array([polygons[row] for row in rows]), positions)
        triangles.append(cut)
        owners.append(np.array(material)[rows[which]])
    if not triangles:
        raise ValueError("no triangles")
    return _Obj(
        positions,
        np.array(vectors["vt"], dtype=np.float64).reshape(-1, 2),
        np.array(vectors["vn"], dtype=np.float64).reshape(-1, 3),
        np.concatenate(triangles),
        np.concatenate(owners),
        names,
        libraries,
    )


def _corner(text: str, counts: tuple[int, int, int]) -> tuple[int, int, int]:
    """``7/3/2``, ``7//2``, ``7/3`` or ``7`` → indices from zero; negative ones count from the end."""
    found = [-1, -1, -1]
    for slot, value in enumerate(text.split("/")):
        if value:
            index = int(value)
            found[slot] = index - 1 if index > 0 else counts[slot] + index
    return found[0], found[1], found[2]


def _cut(polygons: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts polygons into triangles: a fan, or ears where the outline has a bay that a fan would cover.

    Args:
        polygons: [P, n, 3] corners of P polygons with n sides each.
        positions: [V, 3].

    Returns:
        [T, 3, 3] corners of triangles, and for each the polygon it comes from, [T].
    """
    splits = polygons.shape[1]
    points = positions[polygons[:, :, 0]]
    edges = np.roll(points, -1, axis=1) - points
    spokes = points[:, 1:] - points[:, :1]
    normals = np.cross(spokes[:, :-1], spokes[:, 1:]).sum(axis=1)  # right for any outline
    turns = np.einsum("pnc,pc->pn", np.cross(np.roll(edges, 1, axis=1), edges), normals)
    bay = (turns < -1e-6 * np.abs(turns).max(axis=1, keepdims=True)).any(axis=1)
    fan = np.array([(0, i, i + 1) for i in range(1, splits - 1)])
    corners = np.broadcast_to(fan, (len(polygons), *fan.shape)).copy()
    for row in np.flatnonzero(bay):
        corners[row] = _ears(points[row], normals[row])
    which = np.arange(len(polygons)).repeat(splits - 2)
    return polygons[which[:, None], corners.reshape(-1, 3)], which


def _ears(points: np.ndarray, normal: np.ndarray) -> list[tuple[int, int, int]]:
    """Triangles inside an outline [n, 3] that may have bays, as indices of its points."""
    axis = int(np.abs(normal).argmax())
    flat = points[:, [(axis + 1) % 3, (axis + 2) % 3]] * (1.0 if normal[axis] > 0 else np.array([-1.0, 1.0]))
    left = list(range(len(points)))
    triangles = []
    while len(left) > 3:
        for i in range(len(left)):
            a, b, c = left[i - 1], left[i], left[(i + 1) % len(left)]
            others = flat[[j for j in left if j not in (a, b, c)]]
            inside = np.all([_side(flat[p], flat[q], others) > 0 for p, q in ((a, b), (b, c), (c, a))], axis=0)
            if _side(flat[a], flat[b], flat[[c]])[0] > 0 and not inside.any():
                break
        else:
            i = 0  # an outline that crosses itself has no ear: cut somewhere
        triangles.append((left[i - 1], left[i], left[(i + 1) % len(left)]))
        del left[i]
    return [*triangles, (left[0], left[1], left[2])]


def _side(start: np.ndarray, end: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Positive for points left of the line from ``start`` to ``end``: [N]."""
    along, beside = end - start, points - start
    return along[0] * beside[:, 1] - along[1] * beside[:, 0]


def _parse_mtl(file: ZipFile, names: dict[str, str], folder: str, text: str) -> dict[str, Material]:
    materials: dict[str, Material] = {}
    material = Material()
    for line in text.splitlines():
        kind, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if kind == "newmtl":
            material = materials[rest] = Material()
        elif kind == "Kd":
            material.colour = np.array([float(value) for value in rest.split()[:3]]).clip(0, 1)
        elif kind == "d":
            material.opacity = float(rest.split()[-1])
        elif kind == "map_Kd":
            # Some name the file by the path it had on the author's disk.
            path = names.get(f"{folder}/{rest.replace(chr(92), '/').split('/')[-1]}".lower())
            if path is not None:
                material.texture = _levels(file.read(path))
    return materials


def _levels(content: bytes) -> list[np.ndarray]:
    with Image.open(io.BytesIO(content)) as image:
        level = image.convert("RGBA")
    level.thumbnail((1024, 1024), Image.Resampling.BOX)
    levels = [np.asarray(level)]
    while max(level.size) > 1:
        level = level.resize((max(1, level.width // 2), max(1, level.height // 2)), Image.Resampling.BOX)
        levels.append(np.asarray(level))
    return levels
