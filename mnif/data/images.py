"""Pictures of one size with ids, from files, arrays, Hugging Face data sets or posed views.

A source yields its pictures one at a time; each is opened and brought to a size and a number of channels.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnif.data.arrays import file_stamps, ids_and_groups, memmap_cached, npy_array, npz_arrays, npz_names, row_names
from mnif.data.builtin import avatar_drawings, builtin_names, data_file, is_avatars, twemoji_files, twemoji_group
from mnif.data.dataset import Dataset
from mnif.data.emoji import emoji_drawings, emoji_vendors, is_emoji
from mnif.data.shards import ShardMember, shard_members
from mnif.data.source import DataSource, files_by_name, readable, shared_groups
from mnif.utils.errors import UserError, require
from mnif.utils.pixels import as_axes, crop_and_resize, open_image
from mnif.utils.process import progress_bar

IMAGE_SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga"),
    *(".icb", ".vda", ".vst", ".ico", ".icns", ".cur", ".qoi", ".dds", ".psd", ".pcx", ".dcx", ".sgi", ".ras", ".xbm"),
)
"""Of the formats that Pillow reads by itself; those that stand for something else, too, are left out (.rgb, .im)."""

_ROWS_AT_ONCE = 256
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
        source: a built-in name (``avatars``, ``emoji``, ``twemoji``, ``furniture-views``); a folder of PNG, JPEG or
            WebP files, or of tar shards that hold such files, or one shard; an ``.npz`` file with ``images``, uint8
            [N, H, W] or [N, H, W, 1|3|4] or float [N, H, W, 1|3|4] in [0, 1], and optionally ``ids`` and ``groups``,
            N strings; such an array as ``.npy``, memory-mapped; a folder made by ``save_to_disk`` of Hugging Face
            ``datasets``, or ``hf:NAME[:SPLIT]``, of which the first column of pictures is taken.
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
    return ImageData(readable(source), _pixels(source, images, (height, width), channels), images.ids, images.groups)


def image_size(source: str) -> int:
    """Finds the pixels per axis of a folder, tar, ``.npz`` or ``.npy`` file of square images of one size.

    Raises:
        UserError: the source is missing, or its pictures are not square or differ in size.
    """
    path = Path(source)
    sizes: dict[tuple[int, int], str] = {}
    if path.suffix in (".npz", ".npy") and path.is_file():
        images = array_source(path).array
        assert images is not None
        sizes[images.shape[2], images.shape[1]] = source
    elif holds_files(source):
        for file in image_files(source).values():
            with open_file(file) as image:
                sizes.setdefault(image.size, str(file))
    else:
        raise UserError(f"--samples {source}: no such folder, .tar, .npz or .npy file")
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
        files = twemoji_files()
        return file_source(files, [twemoji_group(id) for id in files])
    if is_avatars(source):
        ids, drawings = avatar_drawings(source)
        return drawn_source(ids, ids, drawings)
    if is_emoji(source):
        beginnings = tuple(f"{vendor}-" for vendor in emoji_vendors(source))
        return drawn_source(*emoji_drawings(source), beginnings)
    if source == "furniture-views":
        return view_source()
    if source.startswith("hf:"):
        return hub_source(source.removeprefix("hf:"), source)
    if is_hub_folder(path):
        return hub_source(source, source)
    if holds_files(source):
        images = image_files(source)
        return file_source(images, shared_groups([*images], [_design(id, file) for id, file in images.items()]))
    if path.suffix in (".npz", ".npy") and path.is_file():
        return array_source(path)
    known = builtin_names("image", "radiance")
    raise UserError(f"--data {source}: no such folder, .tar, .npz or .npy file or built-in set of pictures ({known})")


def _pixels(name: str, source: ImageSource, size: tuple[int, int], channels: int) -> np.ndarray:
    shape = (len(source.ids), *size, channels)
    if source.array is not None and source.array.shape == shape and source.array.dtype == np.uint8:
        _refuse_masks(name, source.array)
        return source.array

    def fill(images: np.ndarray) -> None:
        rows = progress_bar(range(len(images)), desc=f"reading {name}", unit="image", leave=False)
        for row in rows:
            try:
                with source.read(row) as image:
                    images[row] = crop_and_resize(image, size, channels)
            except ValueError as error:
                raise UserError(f"{name}: picture {source.ids[row]!r} cannot be read ({error})") from None
        _refuse_masks(name, images)

    return memmap_cached(shape, fill, [*source.key, "images"])


def _refuse_masks(name: str, images: np.ndarray) -> None:
    """Raises a UserError if 1 is the brightest value of all colours; looks no farther than to the first above it."""
    brightest = 0
    for start in range(0, len(images), _ROWS_AT_ONCE):
        brightest = max(brightest, int(images[start : start + _ROWS_AT_ONCE, ..., :3].max()))
        if brightest > 1:
            return
    if brightest == 1:
        raise UserError(
            f"{name}: no pixel is above 1 of 255, so all is nearly black; multiply masks of 0 and 1 by 255 "
            "(occupancies of shapes: --signal voxels)"
        )


def file_source(files: Mapping[str, Path | ShardMember], groups: list[str]) -> ImageSource:
    """Makes a source of image files by id, each a file of its own or a member of a shard."""
    listed = list(files.values())
    paths = dict.fromkeys(file.shard if isinstance(file, ShardMember) else file for file in listed)
    return ImageSource(list(files), groups, lambda row: open_file(listed[row]), file_stamps(paths))


def _design(id: str, file: Path | ShardMember) -> str:
    """Names the design of a picture: its id without the suffix, which the key of a shard's member has not."""
    return id if isinstance(file, ShardMember) else id.rpartition(".")[0]


def open_file(file: Path | ShardMember) -> AbstractContextManager[Image.Image]:
    """Opens an image file or a member of a shard (:func:`mnif.utils.pixels.open_image`)."""
    return open_image(file) if isinstance(file, Path) else open_image(BytesIO(file.read_bytes()), str(file))


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
    _refuse_ambiguous(path, images)
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


def _refuse_ambiguous(path: Path, images: np.ndarray) -> None:
    """Raises a UserError for an array that may be one picture, or whose channels come first."""
    shape = list(images.shape)
    if images.ndim == 3 and shape[2] in (1, 3, 4) and shape[1] != shape[2]:
        height, width, channels = shape
        raise UserError(
            f'{path}: "images" {shape} may be one picture of {channels} channels or {height} grey ones {channels} '
            f"pixels wide; give [1, {height}, {width}, {channels}] or [{height}, {width}, {channels}, 1]"
        )
    if images.ndim == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) > 4:
        raise UserError(f'{path}: "images" {shape} has its channels first; transpose it by (0, 2, 3, 1)')


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
    images = table.select_columns([column]).cast_column(column, ImageFeature(decode=False))
    ids = row_names(len(table))

    def read(row: int) -> AbstractContextManager[Image.Image]:
        found = images[row][column]
        if found is None:
            raise UserError(f"--data {where}: row {row} holds no picture; remove it")
        content = found["bytes"]
        return open_image(Path(found["path"]) if content is None else BytesIO(content), f"--data {where}: row {row}")

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


def drawn_source(
    ids: list[str], groups: list[str], drawings: np.ndarray, beginnings: tuple[str, ...] = ("",)
) -> ImageSource:
    """Makes a source of drawings; of those that are the same the first one stays, and their groups become one.

    Args:
        ids: N names.
        groups: N names.
        drawings: [N, height, width, 4] uint8, RGBA.
        beginnings: drawings whose name begins otherwise count for the groups alone.
    """
    first: dict[bytes, int] = {}
    leaders = {group: group for group in groups}
    for row, drawing in enumerate(drawings):
        twin = first.setdefault(sha256(drawing.tobytes()).digest(), row)
        leaders[_leader(leaders, groups[row])] = _leader(leaders, groups[twin])
    kept = {digest: row for digest, row in first.items() if ids[row].startswith(beginnings)}
    rows, key = list(kept.values()), sha256(b"".join(kept)).hexdigest()
    return ImageSource(
        [ids[row] for row in rows],
        [_leader(leaders, groups[row]) for row in rows],
        lambda row: nullcontext(Image.fromarray(drawings[rows[row]])),
        [key],
    )


def _leader(leaders: dict[str, str], group: str) -> str:
    while leaders[group] != group:
        group = leaders[group]
    return group


def packed_images(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """Cuts ``image_bytes``, image files one after another, at ``image_offsets``."""
    content, offsets = arrays["image_bytes"].tobytes(), arrays["image_offsets"]
    return [content[start:stop] for start, stop in pairwise(offsets)]


def holds_files(source: str) -> bool:
    """Whether a source is a folder or a shard, so that :func:`image_files` finds pictures in it if there are any."""
    data = DataSource(source)
    return data.path.is_dir() or data.suffix == ".tar"


def image_files(source: str | Path) -> Mapping[str, Path | ShardMember]:
    """Finds the image files of a folder, by name (:func:`mnif.data.source.files_by_name`), or of shards, by key.

    An animation in a folder is none.

    Raises:
        UserError: there are none, or a shard cannot be read.
    """
    data = DataSource(str(source))
    if data.suffix == ".tar":
        return shard_members(data.name, [data.path], IMAGE_SUFFIXES)
    if holds_shards(data):
        return shard_members(data.name, files_by_name(source, (".tar",)).values(), IMAGE_SUFFIXES)
    if files := files_by_name(source, IMAGE_SUFFIXES, _animation):
        return files
    raise UserError(f"{source}: no pictures here ({', '.join(IMAGE_SUFFIXES)})")


def holds_shards(folder: DataSource) -> bool:
    """Whether a folder is one of tar shards: they are at least as many as the pictures, without those in previews."""
    pictures = sum(path.suffix.lower() in IMAGE_SUFFIXES and path.parent.name != "preview" for path in folder.files)
    return folder.file_suffixes[".tar"] > 0 and folder.file_suffixes[".tar"] >= pictures


def _animation(path: Path) -> str | None:
    if path.suffix.lower() not in (".gif", ".apng"):
        return None
    with open_image(path) as image:
        return "animation" if getattr(image, "is_animated", False) else None
