"""Where pictures come from: files, arrays, Hugging Face data sets, posed views; each yields them one at a time."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mnif.data.arrays import ids_and_groups, npy_array, npz_arrays, row_names
from mnif.data.built_in import data_file
from mnif.data.cache import stamps
from mnif.data.pictures import opened
from mnif.errors import UserError

_NEEDS = '"images", uint8 [N, H, W] or [N, H, W, 1|3|4], or float [N, H, W, 1|3|4] in [0, 1]'


@dataclass(frozen=True)
class ImageSource:
    """Pictures not yet of one size.

    Attributes:
        ids: N names.
        groups: N names.
        read: row → a context that holds the picture.
        key: what the pictures depend on, as lines for :func:`mnif.data.cache.filled`.
        array: [N, H, W] or [N, H, W, C], if they are one array already.
    """

    ids: list[str]
    groups: list[str]
    read: Callable[[int], AbstractContextManager[Image.Image]]
    key: list[str]
    array: np.ndarray | None = None


def file_source(files: dict[str, Path], group: Callable[[str], str] = lambda id: id) -> ImageSource:
    """Picture files by id."""
    paths = list(files.values())
    return ImageSource(list(files), [group(id) for id in files], lambda row: opened(paths[row]), stamps(paths))


def array_source(path: Path) -> ImageSource:
    """An ``.npz`` or ``.npy`` file; the latter is memory-mapped.

    Raises:
        UserError: the file is damaged, or its array is not of the form above.
    """
    arrays = {"images": npy_array(path)} if path.suffix == ".npy" else npz_arrays(path, _NEEDS)
    if "images" not in arrays:
        raise UserError(f"{path}: needs {_NEEDS}; found {', '.join(arrays) or 'nothing'}")
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

    return ImageSource(ids, groups, read, stamps([path]), images)


def _bytes_of(values: np.ndarray, where: str) -> np.ndarray:
    """Values in [0, 1] as uint8."""
    if not np.isfinite(values).all():
        raise UserError(f"{where} holds NaN or infinity; remove or mend it")
    if values.min() < 0 or values.max() > 1:
        raise UserError(f"{where} has values from {values.min():g} to {values.max():g}; [0, 1] is needed")
    return (values * 255 + 0.5).astype(np.uint8)


def hub_source(name: str, where: str) -> ImageSource:
    """A Hugging Face data set: the first column of pictures.

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
    pictures = table.select_columns([column])
    ids = row_names(len(table))

    def read(row: int) -> AbstractContextManager[Image.Image]:
        try:
            picture = pictures[row][column]
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"--data {where}: row {row} is an unreadable picture ({error})") from None
        if picture is None:
            raise UserError(f"--data {where}: row {row} holds no picture; remove it")
        return picture

    return ImageSource(ids, ids, read, [f"{where} {table._fingerprint} {column}"])


def _hub_table(name: str, where: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(
            f'--data {where}: the package "datasets" is missing; run: pip install "mnif-diffusion[datasets]"'
        ) from None
    name, _, split = name.partition(":")
    try:
        found = datasets.load_from_disk(name) if is_hub_folder(Path(name)) else datasets.load_dataset(name)
    except Exception as error:  # what the hub's client and its file formats raise is no closed list
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"--data {where}: cannot be loaded ({reason}); check the name and the network, or give a folder made by "
            "save_to_disk"
        ) from None
    if isinstance(found, datasets.Dataset):
        found = {str(found.split or "train"): found}
    chosen = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if chosen not in found:
        raise UserError(f'--data {where}: no split "{chosen}"; it has {", ".join(found)}: write hf:{name}:SPLIT')
    return found[chosen]


def is_hub_folder(folder: Path) -> bool:
    """Whether ``save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def view_source() -> ImageSource:
    """Every view of the built-in ``furniture-views`` as a picture; an object's views are of one group."""
    path = data_file("furniture-views")
    arrays = npz_arrays(path, "image_bytes and image_offsets")
    pictures, views = packed_pictures(arrays), len(arrays["poses"])
    ids = [f"{id}/{view:02d}" for id in arrays["ids"] for view in range(views)]
    groups = [str(group) for group in arrays["groups"] for _ in range(views)]
    return ImageSource(ids, groups, lambda row: Image.open(BytesIO(pictures[row])), stamps([path]))


def packed_pictures(arrays: dict[str, np.ndarray]) -> list[bytes]:
    """The picture files that ``image_bytes`` holds one after another, cut at ``image_offsets``."""
    content, offsets = arrays["image_bytes"].tobytes(), arrays["image_offsets"]
    return [content[start:stop] for start, stop in pairwise(offsets)]
