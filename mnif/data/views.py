"""Pictures of objects from known cameras."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from mnif.data.built_in import built_in_names
from mnif.data.cache import filled
from mnif.data.instances import Instances
from mnif.data.pictures import central_box, converted
from mnif.data.view_sources import ViewSource, built_in_source, folder_source
from mnif.errors import UserError
from mnif.progress import progress_bar

Background = Literal["white", "black"]


@dataclass(frozen=True)
class ViewData(Instances):
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
        """Views, poses and intrinsics."""
        return {"images": self.images, "poses": self.poses, "intrinsics": self.intrinsics}


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
    once to the cache folder and memory-mapped (:func:`mnif.data.cache.filled`).

    Args:
        source: a built-in name (``furniture-views``); a folder in the layout of Scene Representation Networks, one
            sub-folder an object with ``rgb/``, ``pose/`` and ``intrinsics.txt``; a folder with a ``transforms.json``
            (or ``transforms_train.json``) as Blender or nerfstudio write it, or a folder of such folders.
        resolution: pixels per axis, or height and width; default: as the pictures have.
        near: distance from the cameras; default: :func:`mnif.data.view_sources.default_bounds`.
        far: likewise.
        max_views: takes the first so many views of each object; default: all.
        background: "white" or "black"; the built-in views are on white.

    Raises:
        UserError: the source is missing or empty, a picture or pose is missing, damaged or of another form, objects
            have different numbers of views, views differ in size, or an argument is out of range.
    """
    if max_views is not None and max_views < 1:
        raise UserError(f"--max_views {max_views}: at least 1 view is needed")
    found = _source(source, max_views, background)
    near, far = found.bounds[0] if near is None else near, found.bounds[1] if far is None else far
    if not 0 < near < far:
        raise UserError(f"--near {near:g} and --far {far:g}: near must be above 0 and far above near")
    size = found.size if resolution is None else resolution
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise UserError(f"--resolution {resolution}: at least 1 pixel is needed")
    images = _pixels(source, found, (height, width), background)
    intrinsics = _resized_intrinsics(found, (height, width)).astype(np.float32)
    poses = found.poses.astype(np.float32)
    return ViewData(source, images, poses, intrinsics, near, far, background, found.ids, found.groups)


def _source(source: str, max_views: int | None, background: Background) -> ViewSource:
    if source == "furniture-views":
        if background != "white":
            raise UserError(f"--background {background}: the views of {source} are drawn on white")
        return built_in_source(max_views)
    if Path(source).is_dir():
        return folder_source(Path(source), max_views)
    raise UserError(f"--data {source}: no such folder or built-in set of views ({built_in_names('radiance')})")


def _pixels(name: str, source: ViewSource, size: tuple[int, int], background: Background) -> np.ndarray:
    """[N, V, height, width, 3] uint8."""
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
                    laid = converted(image, 3, background).crop(box)
                    images[row, view] = np.asarray(laid.resize((width, height), Image.Resampling.BOX))

    return filled((objects, views, height, width, 3), fill, [*source.key, "views", background])


def _resized_intrinsics(source: ViewSource, size: tuple[int, int]) -> np.ndarray:
    """[N, 4] for the pictures that :func:`_pixels` makes."""
    left, top, right, lower = central_box(source.size[::-1], size)
    x, y = size[1] / (right - left), size[0] / (lower - top)
    return (source.intrinsics - [0, 0, left, top]) * [x, y, x, y]
