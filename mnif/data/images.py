"""Pictures of one size with ids, from files, arrays, Hugging Face data sets or posed views.

A source yields its pictures one at a time; each is opened and brought to a size and a number of channels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mnif.data.arrays import file_stamps, ids_and_groups, memmap_cached, npy_array, npz_arrays, npz_names, row_names
from mnif.data.builtin import builtin_names, data_file, twemoji_files, twemoji_group
from mnif.data.dataset import Dataset
from mnif.utils.errors import UserError, require
from mnif.utils.pixels import as_axes
from mnif.utils.process import progress_bar

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_NEEDS = '"images", uint8 [N, H, W] or [N, H, W, 1|3|4], or float [N, H, W, 1|3|4] in [0, 1]'


@dataclass(frozen=True)
class ImageData(Dataset):
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
        """Returns the images."""
        return {"images": self.images}


@dataclass(frozen=True)
class ImageSource:
    """Pictures not yet of one size.

    Attributes:
        ids: N names.
        groups: N names.
        read: row → a context that holds the picture.
        key: what the pictures depend on, as lines for :func:`mnif.data.arrays.memmap_cached`.
        array: [N, H, W] or [N, H, W, C], if they are one array already.
    """

    ids: list[str]
    groups: list[str]
    read: Callable[[int], AbstractContextManager[Image.Image]]
    key: list[str]
    array: np.ndarray | None = None


def load_images(source: str, resolution: int | tuple[int, int], channels: int = 3) -> ImageData:
    """Loads pictures at one size.

    Transparent pixels are laid on white unless they are kept; a picture of another aspect is cut to its central part;
    that part is resized by Pillow's antialiased bicubic filter. Pixels over the memory limit are written once to the
    cache folder and memory-mapped (:func:`mnif.data.arrays.memmap_cached`).

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
    height, width = as_axes(resolution, 2)
    if height < 1 or width < 1:
        raise UserError(f"--resolution {resolution}: at least 1 pixel is needed")
    if channels not in (1, 3, 4):
        raise UserError(f"--channels {channels}: must be 1 (grey), 3 (RGB) or 4 (RGBA)")
    images = _source(source)
    if not images.ids:
        raise UserError(f"--data {source}: holds no pictures")
    return ImageData(source, _pixels(source, images, (height, width), channels), images.ids, images.groups)


def image_size(source: str) -> int:
    """Finds the pixels per axis of a folder, ``.npz`` or ``.npy`` file of square images of one size.

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
        for file_path in image_files(path).values():
            with open_image(file_path) as image:
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


def _source(source: str) -> ImageSource:
    path = Path(source)
    if source == "twemoji":
        return file_source(twemoji_files(), twemoji_group)
    if source == "furniture-views":
        return view_source()
    if source.startswith("hf:"):
        return hub_source(source.removeprefix("hf:"), source)
    if path.is_dir():
        return hub_source(source, source) if is_hub_folder(path) else file_source(image_files(path))
    if path.suffix in (".npz", ".npy") and path.is_file():
        return array_source(path)
    known = builtin_names("image", "radiance")
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
                    images[row] = crop_and_resize(image, size, channels)
            except ValueError as error:
                raise UserError(f"{name}: picture {source.ids[row]!r} cannot be read ({error})") from None

    return memmap_cached(shape, fill, [*source.key, "images"])


def file_source(files: dict[str, Path], group: Callable[[str], str] = lambda id: id) -> ImageSource:
    """Makes a source of image files by id."""
    paths = list(files.values())
    return ImageSource(
        list(files), [group(id) for id in files], lambda row: open_image(paths[row]), file_stamps(paths)
    )


def array_source(path: Path) -> ImageSource:
    """Makes a source of an ``.npz`` or ``.npy`` file; the latter is memory-mapped.

    Raises:
        UserError: the file is damaged, or its array is not of the form above.
    """
    arrays = (
        {"images": npy_array(path)} if path.suffix == ".npy" else npz_arrays(path, _NEEDS, ("images", "ids", "groups"))
    )
    if "images" not in arrays:
        raise UserError(f"{path}: needs {_NEEDS}; found {', '.join(sorted(npz_names(path))) or 'nothing'}")
    images = arrays["images"]
    # A float array must say how many channels it has: a stack of something else is not taken for grey pictures.
    floats = images.dtype.kind == "f"
    shaped = images.shape[3:] in ((1,), (3,), (4,)) or (images.ndim == 3 and not floats)
    if not (images.dtype == np.uint8 or floats) or not shaped or not images.size:
        raise UserError(f'{path}: "images" is {images.dtype} {list(images.shape)}; needed is {_NEEDS}')
    ids, groups = ids_and_groups(path, arrays, len(images))

    def read(row: int) -> AbstractContextManager[Image.Image]:
        image = images[row]
        if floats:
            image = _bytes_of(image, f"{path}: picture {ids[row]!r}")
        return nullcontext(Image.fromarray(np.squeeze(image, 2) if image.shape[2:] == (1,) else np.asarray(image)))

    return ImageSource(ids, groups, read, file_stamps([path]), images)


def _bytes_of(values: np.ndarray, where: str) -> np.ndarray:
    """Rounds values in [0, 1] to uint8."""
    if not np.isfinite(values).all():
        raise UserError(f"{where} holds NaN or infinity; remove or mend it")
    if values.min() < 0 or values.max() > 1:
        raise UserError(f"{where} has values from {values.min():g} to {values.max():g}; [0, 1] is needed")
    return (values * 255 + 0.5).astype(np.uint8)


def hub_source(name: str, where: str) -> ImageSource:
    """Makes a source of a Hugging Face data set: the first column of pictures.

    Args:
        name: a folder made by ``save_to_disk`` or the name of a set in the cache or on the hub; with ``:SPLIT`` after
            it, that split, otherwise ``train`` or the only one.
        where: how the user named it.

    Raises:
        UserError: ``datasets`` is not installed, the set cannot be had, or it holds no pictures.
    """
    table = _hub_table(name, where)
    from datasets import Image as ImageFeature

    column = next((name for name, feature in table.features.items() if isinstance(feature, ImageFeature)), None)
    if column is None:
        raise UserError(f"--data {where}: no column of pictures among {', '.join(table.column_names)}")
    images = table.select_columns([column])
    ids = row_names(len(table))

    def read(row: int) -> AbstractContextManager[Image.Image]:
        try:
            image = images[row][column]
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"--data {where}: row {row} is an unreadable picture ({error})") from None
        if image is None:
            raise UserError(f"--data {where}: row {row} holds no picture; remove it")
        return image

    return ImageSource(ids, ids, read, [f"{where} {table._fingerprint} {column}"])


def _hub_table(name: str, where: str) -> Any:
    require("datasets", "datasets", f"--data {where}")
    import datasets

    name, _, split = name.partition(":")
    try:
        loaded = datasets.load_from_disk(name) if is_hub_folder(Path(name)) else datasets.load_dataset(name)
    except Exception as error:  # what the hub's client and its file formats raise is no closed list
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--data {where}: cannot be loaded ({reason}); check the name and the network, or give a folder made by "
            "save_to_disk"
        ) from None
    if isinstance(loaded, datasets.Dataset):
        loaded = {str(loaded.split or "train"): loaded}
    chosen = split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if chosen not in loaded:
        raise UserError(f'--data {where}: no split "{chosen}"; it has {", ".join(loaded)}: write hf:{name}:SPLIT')
    return loaded[chosen]


def is_hub_folder(folder: Path) -> bool:
    """Whether ``save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def view_source() -> ImageSource:
    """Makes a source of every view of the built-in ``furniture-views``; an object's views are of one group."""
    path = data_file("furniture-views")
    arrays = npz_arrays(path, "image_bytes and image_offsets")
    files, views = packed_images(arrays), len(arrays["poses"])
    ids = [f"{id}/{view:02d}" for id in arrays["ids"] for view in range(views)]
    groups = [str(group) for group in arrays["groups"] for _ in range(views)]
    return ImageSource(ids, groups, lambda row: Image.open(BytesIO(files[row])), file_stamps([path]))


def packed_images(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """Cuts ``image_bytes``, image files one after another, at ``image_offsets``."""
    content, offsets = arrays["image_bytes"].tobytes(), arrays["image_offsets"]
    return [content[start:stop] for start, stop in pairwise(offsets)]


def image_files(folder: Path) -> dict[str, Path]:
    """Finds the image files in a folder, by name.

    Raises:
        UserError: there are none.
    """
    if files := files_by_name(folder, IMAGE_SUFFIXES):
        return files
    raise UserError(f"{folder}: no pictures here ({', '.join(IMAGE_SUFFIXES)})")


def files_by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Finds the files with one of these suffixes in a folder or, only if it holds none itself, in its sub-folders."""
    for candidates in (folder.iterdir(), folder.rglob("*")):
        files = sorted(path for path in candidates if path.suffix.lower() in suffixes and path.is_file())
        if files:
            return {path.relative_to(folder).as_posix(): path for path in files}
    return {}


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Opens the image in a file; whatever fails while it is read becomes a :class:`UserError` that names the file."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: unreadable picture ({error}); remove or replace it") from None


def crop_and_resize(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Turns an image as its EXIF data say, cuts it to the central part, resizes it: [height, width, channels] uint8.

    Args:
        image: any picture of at most 8 bits a channel, or 16-bit grey.
        size: height and width; the largest central part of this aspect is resized by Pillow's antialiased bicubic
            filter.
        channels: 1 for luminance, 3 for RGB (both laid on white), 4 for RGBA.

    Raises:
        ValueError: the picture has 32 bits a pixel in one channel, whose range nobody tells.
    """
    height, width = size
    image = to_mode(ImageOps.exif_transpose(image), channels)
    # Cut first: a box given to resize() would let pixels outside it bleed in. Pillow resizes RGBA with the colours
    # multiplied by alpha, so the invisible colour of transparent pixels makes no dark fringe.
    image = image.crop(central_box(image.size, size)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


def to_mode(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Converts an image to L, RGB or RGBA; transparency is laid on ``background`` unless it is kept (4 channels).

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


def central_box(whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Finds the largest central part of a (width, height) image with the aspect of a (height, width): left … lower."""
    (image_width, image_height), (height, width) = whole, size
    cut_width = min(image_width, max(1, round(image_height * width / height)))
    cut_height = min(image_height, max(1, round(image_width * height / width)))
    left, top = (image_width - cut_width) // 2, (image_height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height
