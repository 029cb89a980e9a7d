"""One picture: opened, and brought to a size and a number of channels."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnif.errors import UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """The picture in a file; whatever fails while it is read becomes a :class:`UserError` that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: unreadable picture ({error}); remove or replace it") from None


def files_by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files in a folder with one of these suffixes; its sub-folders are searched only if it holds none itself."""
    for candidates in (folder.iterdir(), folder.rglob("*")):
        files = sorted(path for path in candidates if path.suffix.lower() in suffixes and path.is_file())
        if files:
            return {path.relative_to(folder).as_posix(): path for path in files}
    return {}


def picture_files(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by name.

    Raises:
        UserError: there are none.
    """
    if files := files_by_name(folder, IMAGE_SUFFIXES):
        return files
    raise UserError(f"{folder}: no pictures here ({', '.join(IMAGE_SUFFIXES)})")


def fitted(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """[height, width, channels] uint8: turned as its EXIF data say, cut to the central part, resized.

    Args:
        image: any picture of at most 8 bits a channel, or 16-bit grey.
        size: height and width; the largest central part of this aspect is resized by Pillow's antialiased bicubic
            filter.
        channels: 1 for luminance, 3 for RGB (both laid on white), 4 for RGBA.

    Raises:
        ValueError: the picture has 32 bits a pixel in one channel, whose range nobody tells.
    """
    height, width = size
    image = converted(ImageOps.exif_transpose(image), channels)
    # Cut first: a box given to resize() would let pixels outside it bleed in. Pillow resizes RGBA with the colours
    # multiplied by alpha, so the invisible colour of transparent pixels makes no dark fringe.
    image = image.crop(central_box(image.size, size)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


def central_box(picture: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest central part of a (width, height) picture with the aspect of a (height, width): left … lower."""
    (picture_width, picture_height), (height, width) = picture, size
    cut_width = min(picture_width, max(1, round(picture_height * width / height)))
    cut_height = min(picture_height, max(1, round(picture_width * height / width)))
    left, top = (picture_width - cut_width) // 2, (picture_height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height


def converted(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """The picture in mode L, RGB or RGBA; transparency is laid on ``background`` unless it is kept (4 channels).

    Raises:
        ValueError: the picture has 32 bits a pixel in one channel.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, 32 bits a pixel; save it with 8 bits a channel")
    if image.mode.startswith("I;16"):  # which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
    if channels != 4 and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert(_MODES[channels])
