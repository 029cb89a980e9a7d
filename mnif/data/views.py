"""Pictures of objects from known cameras, from folders or the built-in set."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mnif.data.arrays import file_stamps, memmap_cached, npz_arrays
from mnif.data.builtin import builtin_names, data_file
from mnif.data.dataset import Dataset
from mnif.data.images import packed_images
from mnif.data.view_formats import posed_images
from mnif.utils.errors import UserError
from mnif.utils.pixels import as_axes, central_box, open_image, to_mode
from mnif.utils.process import progress_bar

Background = Literal["white", "black"]
_NEAREST = 0.05
_SRN_BOUNDS = (0.8, 1.8)
_SRN_RADIUS = 0.75


@dataclass(frozen=True)
class ViewData(Dataset):
    """Views of N objects, V of each, all of one size.

    Attributes:
        name: as the user gave it.
        images: [N, V, height, width, 3] uint8, RGB.
        poses: [N, V, 4, 4] float32 camera-to-world; the camera looks along -z, +y is up (OpenGL, Blender).
        intrinsics: [N, 4] float32: fx, fy, cx, cy in pixels, from the upper left corner of the picture (so the centre
            of the first pixel is at 0.5, 0.5).
        near: distance from the camera, in the poses' unit, before which there is nothing.
        far: distance behind which there is nothing.
        background: what is seen where there is no object.
        ids: N unique names.
        groups: N names; objects of one group stay on one side of the split.
    """

    name: str
    images: np.ndarray
    poses: np.ndarray
    intrinsics: np.ndarray
    near: float
    far: float
    background: Background
    ids: list[str]
    groups: list[str]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns views, poses and intrinsics."""
        return {"images": self.images, "poses": self.poses, "intrinsics": self.intrinsics}


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
        key: what the pictures depend on, as lines for :func:`mnif.data.arrays.memmap_cached`.
    """

    ids: list[str]
    groups: list[str]
    poses: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]
    bounds: tuple[float, float]
    read: Callable[[int, int], AbstractContextManager[Image.Image]]
    key: list[str]


def load_views(
    source: str,
    resolution: int | tuple[int, int] | None = None,
    near: float | None = None,
    far: float | None = None,
    max_views: int | None = None,
    background: Background = "white",
) -> ViewData:
    """Loads posed views.

    Transparent pixels are laid on the background. At another size than the pictures', their largest central part of
    that aspect is resized by area averaging, and the intrinsics with it. Pixels over the memory limit are written
    once to the cache folder and memory-mapped (:func:`mnif.data.arrays.memmap_cached`).

    Args:
        source: a built-in name (``furniture-views``); a folder in the layout of Scene Representation Networks, one
            sub-folder an object with ``rgb/``, ``pose/`` and ``intrinsics.txt``; a folder with a ``transforms.json``
            (or ``transforms_train.json``) as Blender or nerfstudio write it, or a folder of such folders.
        resolution: pixels per axis, or height and width; default: as the pictures have.
        near: distance from the cameras; default: :func:`mnif.data.views.default_bounds`.
        far: likewise.
        max_views: takes the first so many views of each object; default: all.
        background: "white" or "black"; the built-in views are on white.

    Raises:
        UserError: the source is missing or empty, a picture or pose is missing, damaged or of another form, objects
            have different numbers of views, views differ in size, or an argument is out of range.
    """
    if max_views is not None and max_views < 1:
        raise UserError(f"--max_views {max_views}: at least 1 view is needed")
    views = _source(source, max_views, background)
    near, far = views.bounds[0] if near is None else near, views.bounds[1] if far is None else far
    if not 0 < near < far:
        raise UserError(f"--near {near:g} and --far {far:g}: near must be above 0 and far above near")
    size = views.size if resolution is None else resolution
    height, width = as_axes(size, 2)
    if height < 1 or width < 1:
        raise UserError(f"--resolution {resolution}: at least 1 pixel is needed")
    images = _pixels(source, views, (height, width), background)
    intrinsics = _resized_intrinsics(views, (height, width)).astype(np.float32)
    poses = views.poses.astype(np.float32)
    return ViewData(source, images, poses, intrinsics, near, far, background, views.ids, views.groups)


def _source(source: str, max_views: int | None, background: Background) -> ViewSource:
    if source == "furniture-views":
        if background != "white":
            raise UserError(f"--background {background}: the views of {source} are drawn on white")
        return builtin_source(max_views)
    if Path(source).is_dir():
        return folder_source(Path(source), max_views)
    raise UserError(f"--data {source}: no such folder or built-in set of views ({builtin_names('radiance')})")


def _pixels(name: str, source: ViewSource, size: tuple[int, int], background: Background) -> np.ndarray:
    """Reads all views at one size: [N, V, height, width, 3] uint8."""
    objects, views = source.poses.shape[:2]
    height, width = size
    box = central_box(source.size[::-1], size)

    def fill(images: np.ndarray) -> None:
        for row in progress_bar(range(objects), desc=f"reading {name}", unit="object", leave=False):
            for view in range(views):
                with source.read(row, view) as image:
                    if (image.height, image.width) != source.size:
                        shown = getattr(image, "filename", None) or f"{name}: view {view} of {source.ids[row]}"
                        raise UserError(
                            f"{shown} is {image.width}×{image.height} where the "
                            f"first is {source.size[1]}×{source.size[0]}; all must have one size"
                        )
                    cropped = to_mode(image, 3, background).crop(box)
                    images[row, view] = np.asarray(cropped.resize((width, height), Image.Resampling.BOX))

    return memmap_cached((objects, views, height, width, 3), fill, [*source.key, "views", background])


def _resized_intrinsics(source: ViewSource, size: tuple[int, int]) -> np.ndarray:
    """Resizes intrinsics, [N, 4], with the images that :func:`_pixels` makes."""
    left, top, right, lower = central_box(source.size[::-1], size)
    x, y = size[1] / (right - left), size[0] / (lower - top)
    return (source.intrinsics - [0, 0, left, top]) * [x, y, x, y]


def folder_source(folder: Path, max_views: int | None) -> ViewSource:
    """Makes a source of a folder's instances (:func:`mnif.data.view_formats.posed_images`); groups are the ids.

    Raises:
        UserError: a file is missing or damaged, or instances have different numbers of views or sizes.
    """
    instances = posed_images(folder, max_views)
    first = instances[0]
    for other in instances[1:]:
        if len(other.paths) != len(first.paths):
            fewest = min(len(instance.paths) for instance in instances)
            raise UserError(
                f"{folder}: {first.id} has {len(first.paths)} views, {other.id} {len(other.paths)}; "
                f"take as many of each with --max_views {fewest}"
            )
    ids = [instance.id for instance in instances]
    poses = np.stack([instance.poses for instance in instances])
    intrinsics = np.stack([instance.intrinsics for instance in instances])
    paths = [path for instance in instances for path in instance.paths]

    def read(row: int, view: int) -> AbstractContextManager[Image.Image]:
        return open_image(instances[row].paths[view])

    bounds = default_bounds(poses, srn=all(instance.srn for instance in instances))
    return ViewSource(ids, ids, poses, intrinsics, first.size, bounds, read, file_stamps(paths))


def builtin_source(max_views: int | None) -> ViewSource:
    """Makes a source of ``furniture-views``: all objects are seen from the same cameras, on white.

    Raises:
        UserError: the file is missing.
    """
    path = data_file("furniture-views")
    arrays = npz_arrays(path, "image_bytes and image_offsets")
    files, views = packed_images(arrays), len(arrays["poses"])
    ids, groups = ([str(name) for name in arrays[key]] for key in ("ids", "groups"))
    poses = np.tile(arrays["poses"][:max_views], (len(ids), 1, 1, 1))
    intrinsics = np.tile(arrays["intrinsics"], (len(ids), 1))
    size = (int(arrays["resolution"].item()),) * 2
    bounds = (float(arrays["near"].item()), float(arrays["far"].item()))

    def read(row: int, view: int) -> AbstractContextManager[Image.Image]:
        return Image.open(BytesIO(files[row * views + view]))

    return ViewSource(ids, groups, poses, intrinsics, size, bounds, read, file_stamps([path]))


def default_bounds(poses: np.ndarray, srn: bool) -> tuple[float, float]:
    """Chooses near and far by the cameras' distances to the origin.

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
