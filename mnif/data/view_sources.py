"""Where posed views come from: folders and the built-in set; each yields its pictures one at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from mnif.data.arrays import npz_arrays
from mnif.data.built_in import data_file
from mnif.data.cache import stamps
from mnif.data.image_sources import packed_pictures
from mnif.data.pictures import opened
from mnif.data.view_formats import posed_pictures
from mnif.errors import UserError

_NEAREST = 0.05
_SRN_BOUNDS = (0.8, 1.8)
_SRN_RADIUS = 0.75


@dataclass(frozen=True)
class ViewSource:
    """Posed pictures of one size, not yet read.

    Attributes:
        ids: N names.
        groups: N names.
        poses: [N, V, 4, 4] camera-to-world, as in :class:`mnif.data.views.ViewData`.
        intrinsics: [N, 4]: fx, fy, cx, cy in pixels of the pictures as they are.
        size: height and width of the pictures.
        bounds: near and far.
        read: object, view → a context that holds the picture.
        key: what the pictures depend on, as lines for :func:`mnif.data.cache.filled`.
    """

    ids: list[str]
    groups: list[str]
    poses: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]
    bounds: tuple[float, float]
    read: Callable[[int, int], AbstractContextManager[Image.Image]]
    key: list[str]


def folder_source(folder: Path, max_views: int | None) -> ViewSource:
    """The instances of a folder (:func:`mnif.data.view_formats.posed_pictures`); the group of each is its id.

    Raises:
        UserError: a file is missing or damaged, or instances have different numbers of views or sizes.
    """
    found = posed_pictures(folder, max_views)
    first = found[0]
    for other in found[1:]:
        if len(other.paths) != len(first.paths):
            fewest = min(len(instance.paths) for instance in found)
            raise UserError(
                f"{folder}: {first.id} has {len(first.paths)} views, {other.id} {len(other.paths)}; "
                f"take as many of each with --max_views {fewest}"
            )
    ids = [instance.id for instance in found]
    poses = np.stack([instance.poses for instance in found])
    intrinsics = np.stack([instance.intrinsics for instance in found])
    paths = [path for instance in found for path in instance.paths]

    def read(row: int, view: int) -> AbstractContextManager[Image.Image]:
        return opened(found[row].paths[view])

    bounds = default_bounds(poses, srn=all(instance.srn for instance in found))
    return ViewSource(ids, ids, poses, intrinsics, first.size, bounds, read, stamps(paths))


def built_in_source(max_views: int | None) -> ViewSource:
    """``furniture-views``: all objects are seen from the same cameras, on white.

    Raises:
        UserError: the file is missing.
    """
    path = data_file("furniture-views")
    arrays = npz_arrays(path, "image_bytes and image_offsets")
    pictures, views = packed_pictures(arrays), len(arrays["poses"])
    ids, groups = ([str(name) for name in arrays[key]] for key in ("ids", "groups"))
    poses = np.tile(arrays["poses"][:max_views], (len(ids), 1, 1, 1))
    intrinsics = np.tile(arrays["intrinsics"], (len(ids), 1))
    size = (int(arrays["resolution"].item()),) * 2
    bounds = (float(arrays["near"].item()), float(arrays["far"].item()))

    def read(row: int, view: int) -> AbstractContextManager[Image.Image]:
        return Image.open(BytesIO(pictures[row * views + view]))

    return ViewSource(ids, groups, poses, intrinsics, size, bounds, read, stamps([path]))


def default_bounds(poses: np.ndarray, srn: bool) -> tuple[float, float]:
    """Near and far from the cameras' distances to the origin.

    Args:
        poses: [N, V, 4, 4] camera-to-world.
        srn: as is usual for the sets of Scene Representation Networks: 0.8 and 1.8 for its cars, whose cameras stand
            at 1.3; the distance ∓ 0.75 for others, which gives 1.25 and 2.75 for its chairs, seen from 2.0.

    Returns:
        Near, at least 0.05, and far: by default the distance ∓ √3, as if all lay in the cube [-1, 1]³.
    """
    distances = np.linalg.norm(poses[..., :3, 3], axis=-1)
    nearest, farthest = float(distances.min()), float(distances.max())
    if srn and _SRN_BOUNDS[0] < nearest and farthest < _SRN_BOUNDS[1]:
        return _SRN_BOUNDS
    radius = _SRN_RADIUS if srn else float(np.sqrt(3))
    return max(nearest - radius, _NEAREST), farthest + radius
