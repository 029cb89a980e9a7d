"""Pictures of one size with ids."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnif.data.built_in import built_in_names, twemoji_files, twemoji_group
from mnif.data.cache import filled
from mnif.data.image_sources import (
    ImageSource,
    array_source,
    file_source,
    hub_source,
    is_hub_folder,
    view_source,
)
from mnif.data.instances import Instances
from mnif.data.pictures import fitted, opened, picture_files
from mnif.errors import UserError
from mnif.progress import progress_bar


@dataclass(frozen=True)
class ImageData(Instances):
    """Pictures of one size.

    Attributes:
        name: as the user gave it.
        images: [N, height, width, channels] uint8: luminance (1 channel), RGB (3) or RGBA (4, not premultiplied).
        ids: N unique names.
        groups: N names; pictures of one group (variants of one design) stay on one side of the split.
    """

    name: str
    images: np.ndarray
    ids: list[str]
    groups: list[str]

    def arrays(self) -> dict[str, np.ndarray]:
        """The pictures."""
        return {"images": self.images}


def load_images(source: str, resolution: int | tuple[int, int], channels: int = 3) -> ImageData:
    """Loads pictures at one size.

    Transparent pixels are laid on white unless they are kept; a picture of another aspect is cut to its central part;
    that part is resized by Pillow's antialiased bicubic filter. Pixels over the memory limit are written once to the
    cache folder and memory-mapped (:func:`mnif.data.cache.filled`).

    Args:
        source: a built-in name (``twemoji``, ``furniture-views``); a folder of PNG, JPEG or WebP files; an ``.npz``
            file with ``images``, uint8 [N, H, W] or [N, H, W, 1|3|4] or float [N, H, W, 1|3|4] in [0, 1], and
            optionally ``ids`` and ``groups``, N strings; such an array as ``.npy``, memory-mapped; a folder made by
            ``save_to_disk`` of Hugging Face ``datasets``, or ``hf:NAME[:SPLIT]``, of which the first column of
            pictures is taken.
        resolution: pixels per axis, or height and width, at least 1.
        channels: 1 (luminance), 3 (RGB) or 4 (RGBA).

    Raises:
        UserError: the source is missing or empty, a picture cannot be read, or an argument is out of range.
    """
    height, width = (resolution, resolution) if isinstance(resolution, int) else resolution
    if height < 1 or width < 1:
        raise UserError(f"--resolution {resolution}: at least 1 pixel is needed")
    if channels not in (1, 3, 4):
        raise UserError(f"--channels {channels}: must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    found = _source(source)
    if not found.ids:
        raise UserError(f"--data {source}: holds no pictures")
    return ImageData(source, _pixels(source, found, (height, width), channels), found.ids, found.groups)


def _source(source: str) -> ImageSource:
    path = Path(source)
    if source == "twemoji":
        return file_source(twemoji_files(), twemoji_group)
    if source == "furniture-views":
        return view_source()
    if source.startswith("hf:"):
        return hub_source(source.removeprefix("hf:"), source)
    if path.is_dir():
        return hub_source(source, source) if is_hub_folder(path) else file_source(picture_files(path))
    if path.suffix in (".npz", ".npy") and path.is_file():
        return array_source(path)
    known = built_in_names("image", "radiance")
    raise UserError(f"--data {source}: no such folder, .npz or .npy file or built-in set of pictures ({known})")


def _pixels(name: str, source: ImageSource, size: tuple[int, int], channels: int) -> np.ndarray:
    shape = (len(source.ids), *size, channels)
    if source.array is not None and source.array.shape == shape and source.array.dtype == np.uint8:
        return source.array

    def fill(images: np.ndarray) -> None:
        rows = progress_bar(range(len(images)), desc=f"reading {name}", unit="image", leave=False)
        for row in rows:
            try:
                with source.read(row) as image:
                    images[row] = fitted(image, size, channels)
            except ValueError as error:
                raise UserError(f"{name}: picture {source.ids[row]!r} cannot be read ({error})") from None

    return filled(shape, fill, [*source.key, "images"])


def picture_size(source: str) -> int:
    """Pixels per axis of the pictures in a folder, ``.npz`` or ``.npy`` file of square pictures of one size.

    Raises:
        UserError: the source is missing, or its pictures are not square or differ in size.
    """
    path = Path(source)
    sizes: dict[tuple[int, int], str] = {}
    if path.suffix in (".npz", ".npy") and path.is_file():
        images = array_source(path).array
        assert images is not None
        sizes[images.shape[2], images.shape[1]] = source
    elif path.is_dir():
        for file_path in picture_files(path).values():
            with opened(file_path) as image:
                sizes.setdefault(image.size, str(file_path))
    else:
        raise UserError(f"--samples {source}: no such folder, .npz or .npy file")
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise UserError(f"{source}: pictures differ in size: {first} is {a[0]}×{a[1]}, {second} is {b[0]}×{b[1]}")
    ((width, height),) = sizes
    if width != height:
        raise UserError(f"{source}: pictures are {width}×{height}; square ones are needed")
    return width
