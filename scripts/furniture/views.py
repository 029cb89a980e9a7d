"""Posed views of a mesh: a pinhole camera, a z-buffer, a fixed light."""

import numpy as np

from furniture.meshes import Mesh

PIXELS = 64
VIEWS = 24
DISTANCE = 2.5
FINER = 4  # samples per pixel and axis
HALF_TANGENT = 0.79  # of half the field of view: the cube of side 1.8 that holds every object fits into every view
NEAREST, FARTHEST = DISTANCE - 3**0.5, DISTANCE + 3**0.5  # of the cube [-1, 1]³

LIGHT = np.array([0.45, 0.8, 0.4]) / np.linalg.norm([0.45, 0.8, 0.4])
AMBIENT, DIFFUSE = 0.72, 0.33
BRIGHTEST = 242.0  # of a surface, so that white differs from the background
LEAST_OPACITY = 0.3  # glass is fainter than this in many models, and would be lost on white
# Order in which the samples of a pixel turn opaque, each in [0, 1): see-through parts cover a share of the samples.
_BAYER = np.array([[0, 8, 2, 10], [12, 4, 14, 6], [3, 11, 1, 9], [15, 7, 13, 5]]) / 16
_CHUNK = 2_000_000  # samples tested at a time


def cameras() -> np.ndarray:
    """Camera-to-world matrices [24, 4, 4]: x right, y up, looking along -z at the origin.

    The golden angle turns the camera about the object while it rises from -10° to 60°, evenly in height.
    """
    rank = np.arange(VIEWS)
    azimuth = rank * np.pi * (3 - 5**0.5)
    sine = np.interp((rank + 0.5) / VIEWS, [0, 1], np.sin(np.radians([-10, 60])))
    cosine = np.sqrt(1 - sine**2)
    back = np.stack([cosine * np.sin(azimuth), sine, cosine * np.cos(azimuth)], axis=1)
    right = np.cross([0.0, 1.0, 0.0], back)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    poses = np.tile(np.eye(4), (VIEWS, 1, 1))
    poses[:, :3, 0], poses[:, :3, 1], poses[:, :3, 2] = right, np.cross(back, right), back
    poses[:, :3, 3] = DISTANCE * back
    return poses


def intrinsics() -> np.ndarray:
    """fx, fy, cx, cy in pixels; pixel (i, j) has its centre at (i + 0.5, j + 0.5)."""
    focal = PIXELS / 2 / HALF_TANGENT
    return np.array([focal, focal, PIXELS / 2, PIXELS / 2])


def render(mesh: Mesh, pose: np.ndarray) -> np.ndarray:
    """One view on white: [64, 64, 3] uint8.

    Args:
        mesh: what to draw.
        pose: [4, 4] camera-to-world.

    Raises:
        ValueError: the object does not fit into the picture.
    """
    side = PIXELS * FINER
    fx, fy, cx, cy = intrinsics() * FINER
    local = (mesh.corners - pose[:3, 3]) @ pose[:3, :3]
    inverse_depth = -1 / local[..., 2]
    screen = np.stack([cx + fx * local[..., 0] * inverse_depth, cy - fy * local[..., 1] * inverse_depth], axis=-1)
    if screen.min() < FINER or screen.max() > side - FINER:
        raise ValueError(f"reaches {screen.min() / FINER:.1f} to {screen.max() / FINER:.1f} of {PIXELS} pixels")

    planes = _barycentric_planes(screen)
    owner = _visible(mesh, screen, planes, inverse_depth, side)
    hit = np.flatnonzero(owner >= 0)
    triangle = owner[hit]
    weights = _weights(planes[triangle], hit % side, hit // side, inverse_depth[triangle])
    colours = np.full((side * side, 3), 255.0)
    colours[hit] = _shade(mesh, pose, triangle, weights)
    pixels = colours.reshape(PIXELS, FINER, PIXELS, FINER, 3).mean(axis=(1, 3))
    return np.rint(pixels).astype(np.uint8)


def _barycentric_planes(screen: np.ndarray) -> np.ndarray:
    """[F, 3, 3]: per triangle and corner a, b, c so that a·x + b·y + c is 1 there and 0 at the other two corners."""
    x, y = screen[..., 0], screen[..., 1]
    after, last = [1, 2, 0], [2, 0, 1]
    planes = np.stack(
        [y[:, after] - y[:, last], x[:, last] - x[:, after], x[:, after] * y[:, last] - x[:, last] * y[:, after]],
        axis=-1,
    )
    twice_area = planes[..., 2].sum(axis=1)
    flat = np.abs(twice_area) < 1e-12
    return np.where(flat[:, None, None], np.nan, planes / np.where(flat, 1, twice_area)[:, None, None])


def _visible(mesh: Mesh, screen: np.ndarray, planes: np.ndarray, inverse_depth: np.ndarray, side: int) -> np.ndarray:
    """The nearest triangle at every sample, [side * side], -1 where there is none."""
    first = np.ceil(screen.min(axis=1) - 0.5).astype(np.int64)
    extent = np.floor(screen.max(axis=1) - 0.5).astype(np.int64) - first + 1
    count = extent.clip(0).prod(axis=1)
    opacity = np.array([max(material.opacity, LEAST_OPACITY) for material in mesh.materials])
    holes = np.array([_has_holes(material.texture) for material in mesh.materials])
    drawn = np.flatnonzero(count)
    # The high half of a key is the inverse depth (for positive floats the order of bits is that of values), the low
    # half the triangle, so one maximum finds both.
    keys = np.zeros(side * side, dtype=np.uint64)
    for chunk in np.array_split(drawn, max(1, int(count[drawn].sum()) // _CHUNK)):
        triangle = np.repeat(chunk, count[chunk])
        within = np.arange(len(triangle)) - np.repeat(np.cumsum(count[chunk]) - count[chunk], count[chunk])
        column = first[triangle, 0] + within % extent[triangle, 0]
        row = first[triangle, 1] + within // extent[triangle, 0]
        plane = planes[triangle]
        share = plane[..., 0] * (column[:, None] + 0.5) + plane[..., 1] * (row[:, None] + 0.5) + plane[..., 2]
        inside = (share >= -1e-9).all(axis=1)
        triangle, column, row, share = triangle[inside], column[inside], row[inside], share[inside]
        near = (share * inverse_depth[triangle]).sum(axis=1)

        part = mesh.material[triangle]
        alpha = opacity[part]
        cut = np.flatnonzero(holes[part])
        weights = share[cut] * inverse_depth[triangle[cut]] / near[cut, None]
        alpha[cut] *= _texels(mesh, triangle[cut], weights)[:, 3] / 255
        seen = alpha > _BAYER[row % FINER, column % FINER]
        bits = near[seen].astype(np.float32).view(np.uint32).astype(np.uint64)
        np.maximum.at(keys, row[seen] * side + column[seen], (bits << 32) | triangle[seen].astype(np.uint64))
    return np.where(keys > 0, (keys & 0xFFFFFFFF).astype(np.int64), -1)


def _has_holes(texture: list[np.ndarray]) -> bool:
    return bool(texture) and bool((texture[0][..., 3] < 255).any())


def _weights(planes: np.ndarray, column: np.ndarray, row: np.ndarray, inverse_depth: np.ndarray) -> np.ndarray:
    """Barycentric coordinates in space (not on the screen) of samples: [P, 3]."""
    share = planes[..., 0] * (column[:, None] + 0.5) + planes[..., 1] * (row[:, None] + 0.5) + planes[..., 2]
    weights = share.clip(0) * inverse_depth
    return weights / weights.sum(axis=1, keepdims=True)


def _texels(mesh: Mesh, triangle: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Colours of the surface, RGBA in [0, 255]: [P, 4]; the texture where there is one, else the material's colour."""
    part = mesh.material[triangle]
    texels = np.full((len(triangle), 4), 255.0)
    for index in np.unique(part):
        rows = np.flatnonzero(part == index)
        material = mesh.materials[index]
        texels[rows, :3] = material.colour * 255
        if not material.texture:
            continue
        uv = np.einsum("pk,pkc->pc", weights[rows], mesh.uv[triangle[rows]])
        level = _level(mesh, triangle[rows], material.texture)
        for number in np.unique(level):
            picture, chosen = material.texture[number], level == number
            height, width = picture.shape[:2]
            x = np.floor(uv[chosen, 0] * width).astype(np.int64) % width
            y = np.floor(-uv[chosen, 1] * height).astype(np.int64) % height  # v points up
            texels[rows[chosen]] = picture[y, x]
    return texels


def _level(mesh: Mesh, triangle: np.ndarray, texture: list[np.ndarray]) -> np.ndarray:
    """Per triangle the level of its texture at which a texel is about as large as a sample."""
    corners, uv = mesh.corners[triangle], mesh.uv[triangle] * texture[0].shape[1::-1]
    area = np.linalg.norm(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]), axis=1)
    a, b = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    texels = np.abs(a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0])
    samples = area * (intrinsics()[0] * FINER / DISTANCE) ** 2
    level = np.rint(np.log2(np.maximum(texels, 1e-12) / np.maximum(samples, 1e-12)) / 2)
    return level.clip(0, len(texture) - 1).astype(np.int64)


def _shade(mesh: Mesh, pose: np.ndarray, triangle: np.ndarray, weights: np.ndarray) -> np.ndarray:
    normals = np.einsum("pk,pkc->pc", weights, mesh.normals[triangle])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    points = np.einsum("pk,pkc->pc", weights, mesh.corners[triangle])
    towards = ((pose[:3, 3] - points) * normals).sum(axis=1)
    normals = np.where(towards[:, None] < 0, -normals, normals)  # sheets are seen from both sides
    light = AMBIENT + DIFFUSE * (normals @ LIGHT)
    return (_texels(mesh, triangle, weights)[:, :3] * light[:, None]).clip(0, BRIGHTEST)
