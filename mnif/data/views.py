"""Pictures of objects from known cameras, from folders or the built-in set."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from PIL import Image

from mnif.data.arrays import file_stamps, memmap_cached, npz_arrays
from mnif.data.builtin import builtin_names, data_file
from mnif.data.dataset import Dataset
from mnif.data.images import packed_images
from mnif.data.source import readable
from mnif.data.view_formats import OPENCV_TO_OPENGL, CameraConvention, opengl_poses, point_looked_at, posed_images
from mnif.utils.errors import UserError
from mnif.utils.pixels import as_axes, central_box, open_image, to_mode
from mnif.utils.process import progress_bar

Background = Literal["white", "black"]
_NEAREST = 0.05
_SRN_BOUNDS = (0.8, 1.8)
_SRN_RADIUS = 0.75
LEAST_SEEN = 0.05
"""The share of an object's rays that must meet the cube."""
_SURELY = 0.3  # of what cameras see around the point they look at, for another reading to be the likelier cause
_MUCH_MORE = 2  # times as many rays that another reading of the poses would send through the cube
_LINES = 9  # of pixels along each axis whose rays are looked at


@dataclass(frozen=True)
class ViewData(Dataset):
    """Views of N objects, V of each, all of one size.

    Attributes:
        name: as the user gave it.
        images: [N, V, height, width, 3] uint8, RGB.
        poses: [N, V, 4, 4] float32 camera-to-world; the camera looks along -z, +y is up (OpenGL, Blender).
        intrinsics: [N, 4] float32: fx, fy, cx, cy in pixels, from the upper left corner of the picture (so the centre
            of the first pixel is at 0.5, 0.5); [N, V, 4] if they are not the same in all views of an object.
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
        intrinsics: [N, 4] or [N, V, 4]: fx, fy, cx, cy in pixels of the pictures as they are.
        size: height and width of the pictures.
        bounds: near and far.
        read: object, view → a context that holds the picture.
        key: what the pictures depend on, as lines for :func:`mnif.data.arrays.memmap_cached`.
        convention: of the poses as they were given.
    """

    ids: list[str]
    groups: list[str]
    poses: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]
    bounds: tuple[float, float]
    read: Callable[[int, int], AbstractContextManager[Image.Image]]
    key: list[str]
    convention: str = "opengl"


def load_views(
    source: str,
    resolution: int | tuple[int, int] | None = None,
    near: float | None = None,
    far: float | None = None,
    max_views: int | None = None,
    background: Background = "white",
    bound: float | None = None,
    camera_convention: CameraConvention = "auto",
    center_views: bool = False,
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
        bound: half the edge of the cube that holds the objects; default: :func:`mnif.data.views.default_bound`.
        camera_convention: of the poses in the files; auto: the format's own, OpenCV of Scene Representation Networks,
            OpenGL of ``transforms.json``.
        center_views: move the point that an object's cameras look at to the origin.

    Raises:
        UserError: the source is missing or empty, a picture or pose is missing, damaged or of another form, objects
            have different numbers of views, views differ in size, fewer than :data:`LEAST_SEEN` of an object's rays
            meet the cube or another reading of its poses would see much more, or an argument is out of range.
    """
    if max_views is not None and max_views < 1:
        raise UserError(f"--max_views {max_views}: at least 1 view is needed")
    views = _source(source, max_views, background, camera_convention, center_views)
    near, far = views.bounds[0] if near is None else near, views.bounds[1] if far is None else far
    if not 0 < near < far:
        raise UserError(f"--near {near:g} and --far {far:g}: near must be above 0 and far above near")
    size = views.size if resolution is None else resolution
    height, width = as_axes(size, 2)
    if height < 1 or width < 1:
        raise UserError(f"--resolution {resolution}: at least 1 pixel is needed")
    check_cameras(source, views, near, far, bound or default_bound(views.poses, near, far))
    images = _pixels(source, views, (height, width), background)
    intrinsics = _resized_intrinsics(views, (height, width)).astype(np.float32)
    poses = views.poses.astype(np.float32)
    return ViewData(readable(source), images, poses, intrinsics, near, far, background, views.ids, views.groups)


def _source(
    source: str, max_views: int | None, background: Background, convention: CameraConvention, centre: bool
) -> ViewSource:
    if source == "furniture-views":
        if convention not in ("auto", "opengl"):
            raise UserError(f"--camera_convention {convention}: the views of {source} are in OpenGL's")
        if background != "white":
            raise UserError(f"--background {background}: the views of {source} are drawn on white")
        return builtin_source(max_views)
    if Path(source).is_dir():
        return folder_source(Path(source), max_views, convention, centre)
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
    """Resizes intrinsics, [N, 4] or [N, V, 4], with the images that :func:`_pixels` makes."""
    left, top, right, lower = central_box(source.size[::-1], size)
    x, y = size[1] / (right - left), size[0] / (lower - top)
    return (source.intrinsics - [0, 0, left, top]) * [x, y, x, y]


def folder_source(
    folder: Path, max_views: int | None, convention: CameraConvention = "auto", centre: bool = False
) -> ViewSource:
    """Makes a source of a folder's instances (:func:`mnif.data.view_formats.posed_images`); groups are the ids.

    Raises:
        UserError: a file is missing or damaged, or instances have different numbers of views or sizes.
    """
    instances = posed_images(folder, max_views, convention, centre)
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
    if (intrinsics == intrinsics[:, :1]).all():
        intrinsics = intrinsics[:, 0]
    paths = [path for instance in instances for path in instance.paths]

    def read(row: int, view: int) -> AbstractContextManager[Image.Image]:
        return open_image(instances[row].paths[view])

    bounds = default_bounds(poses, srn=all(instance.srn for instance in instances))
    return ViewSource(ids, ids, poses, intrinsics, first.size, bounds, read, file_stamps(paths), first.convention)


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


def default_bound(poses: np.ndarray, near: float, far: float) -> float:
    """Chooses half the edge of the cube: what near and far leave around the origin, by cameras [N, V, 4, 4]."""
    distance = float(np.median(np.linalg.norm(poses[..., :3, 3], axis=-1)))
    return max(far - distance, distance - near) / 3**0.5


def check_cameras(name: str, views: ViewSource, near: float, far: float, bound: float) -> None:
    """Checks that the cameras of every object see the cube [-bound, bound]³ between near and far.

    Raises:
        UserError: fewer than :data:`LEAST_SEEN` of an object's rays meet it, or another reading of its poses sends
            twice as many through it; the message names the likely cause.
    """
    for row, (id, poses) in enumerate(zip(views.ids, views.poses, strict=True)):
        seen = partial(share_of_rays, intrinsics=views.intrinsics[row], size=views.size, bound=bound)
        share = seen(poses, near=near, far=far)
        if share * _MUCH_MORE >= 1:
            continue
        conventions = _other_conventions(poses, views.convention)
        others = {cause: seen(other, near=near, far=far) for cause, other in conventions.items()}
        cause, most = max(others.items(), key=lambda item: item[1])
        if share >= LEAST_SEEN and most < _MUCH_MORE * share:
            continue
        centred, elsewhere = _centred_share(poses, seen, bound)
        if most < max(LEAST_SEEN, _MUCH_MORE * share, _SURELY * elsewhere):
            cause = _cause_of_place(poses, centred, elsewhere, seen(poses, near=0.0, far=np.inf), near, far)
        cube = f"the cube of half edge {bound:.3g} around the origin"
        raise UserError(f"{name}: {share:.1%} of the rays of {id} meet {cube}; {cause}")


def _other_conventions(poses: np.ndarray, convention: str) -> dict[str, np.ndarray]:
    """Reads poses [V, 4, 4], which were of a convention, as if they were of the others, by what to say of it."""
    given = poses @ OPENCV_TO_OPENGL if convention.startswith("opencv") else poses
    given = np.linalg.inv(given) if convention.endswith("world-to-camera") else given
    others = [other for other in get_args(CameraConvention) if other not in ("auto", convention)]
    inverted = convention.endswith("world-to-camera")
    readings = {}
    for other in others:
        what = "the axes look other" if other.endswith("camera") == inverted else "the poses look inverted"
        readings[f"{what}: try --camera_convention {other}"] = opengl_poses(given, other)
    return readings


def _centred_share(poses: np.ndarray, seen: Callable[..., float], bound: float) -> tuple[np.ndarray, float]:
    """Moves the point that cameras [V, 4, 4] look at to the origin, and measures what they see from around it."""
    centred = poses.copy()
    with suppress(UserError):
        centred[:, :3, 3] -= point_looked_at(poses, "")
    # Inverted poses of cameras around an object all look away from one point, which tells nothing.
    around = np.linalg.norm(centred[:, :3, 3], axis=1).mean() > bound / 2
    return centred, seen(centred, near=0.0, far=np.inf) if around else 0.0


def _cause_of_place(
    poses: np.ndarray, centred: np.ndarray, elsewhere: float, anywhere: float, near: float, far: float
) -> str:
    """Says why cameras [V, 4, 4] of the right convention see nothing.

    Args:
        poses: as they are.
        centred: around the point that they look at.
        elsewhere: the share of rays that meet a cube around that point.
        anywhere: the share that meet the cube if near and far do not count.
        near: least depth.
        far: largest depth.
    """
    distance, around = (float(np.linalg.norm(each[:, :3, 3], axis=1).mean()) for each in (poses, centred))
    if anywhere >= LEAST_SEEN:
        return f"it lies outside of --near {near:g} and --far {far:g}, with cameras {distance:.3g} away"
    if distance > 1.1 * around or elsewhere >= LEAST_SEEN:
        return "they look at another point: try --center_views"
    return f"the cameras stand {distance:.3g} away, so it may be of another scale: give --bound, --near and --far"


def share_of_rays(
    poses: np.ndarray, intrinsics: np.ndarray, size: tuple[int, int], near: float, far: float, bound: float
) -> float:
    """Measures which share of rays, on a lattice of pixels, meets the cube [-bound, bound]³ between near and far.

    Args:
        poses: [V, 4, 4] camera-to-world, OpenGL's.
        intrinsics: [4] or [V, 4].
        size: height and width of the pictures.
        near: least depth.
        far: largest depth.
        bound: half the cube's edge.
    """
    rows, columns = np.meshgrid(*((np.arange(_LINES) + 0.5) * (pixels / _LINES) for pixels in size), indexing="ij")
    fx, fy, cx, cy = np.broadcast_to(intrinsics, (len(poses), 4)).T[..., None, None]
    towards = np.stack(np.broadcast_arrays((columns - cx) / fx, (cy - rows) / fy, -1.0), axis=-1)
    directions = np.einsum("vij,vhwj->vhwi", poses[:, :3, :3], towards)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    directions = np.where(np.abs(directions) < 1e-10, 1e-10, directions)
    places = poses[:, None, None, :3, 3]
    ends = np.sort([(-bound - places) / directions, (bound - places) / directions], axis=0)
    return float((ends[1].min(axis=-1).clip(max=far) > ends[0].max(axis=-1).clip(min=near)).mean())
