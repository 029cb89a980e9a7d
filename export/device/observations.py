"""Observations from files: pictures and arrays, brought to the values that the encoder has learned from.

They become what `mnif encode` makes of them; arrays, unlike there, must have the model's own size.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np

from .bundle import BundleError
from .pictures import PICTURES, read_picture


class Form(NamedTuple):
    """What an encoder takes.

    Attributes:
        signal: the manifest's.
        grid: points along each axis.
        channels: values per point.
    """

    signal: str
    grid: tuple[int, ...]
    channels: int


class Observations(NamedTuple):
    """What is known of some instances.

    Attributes:
        ids: N names.
        values: [N, *grid, channels] float32 in [-1, 1].
    """

    ids: list[str]
    values: np.ndarray


def read_observations(sources: Sequence[Path], form: Form) -> Observations:
    """Reads pictures, arrays, and folders of them.

    Args:
        sources: files or folders. Ids are file names, those of a folder in their order; rows of an array of several
            have their numbers behind it, and numbers alone where no other file is there.
        form: what the encoder takes.

    Raises:
        BundleError: there is nothing, it cannot be read, is not of that form, or two have one name.
    """
    files = [path for source in sources for path in _files(source)]
    alone = len(files) == 1 and files[0] == sources[0]
    ids: list[str] = []
    parts: list[np.ndarray] = []
    for path in files:
        parts.append(_read(path, form))
        rows = [f"{row:06d}" for row in range(len(parts[-1]))]
        if path.suffix == ".npy" and (alone or len(rows) > 1):
            ids += rows if alone else [f"{path.name}/{row}" for row in rows]
        else:
            ids.append(path.name)
    twice = [name for name, times in Counter(ids).items() if times > 1]
    if twice:
        raise BundleError(f"--data: two instances are called {twice[0]}; rename one, or encode them apart")
    return Observations(ids, np.concatenate(parts))


def read_mask(path: Path, form: Form, count: int) -> np.ndarray:
    """Reads what was seen: [1 or N, *grid] float32, 1 where it was.

    Args:
        path: a picture (white: seen), or an ``.npy`` file with one mask or one for each instance.
        form: what the encoder takes.
        count: N instances.

    Raises:
        BundleError: it cannot be read, has another shape, or shows nothing of an instance.
    """
    if path.suffix == ".npy":
        masks = _load(path).astype(bool)
    else:
        masks = read_picture(path, form.grid, 1, resize=False)[..., 0] > 127
    masks = masks[None] if masks.ndim == len(form.grid) else masks
    if masks.shape[1:] != form.grid or len(masks) not in (1, count):
        wanted = f"{list(form.grid)}, or {count} of these"
        raise BundleError(f"--mask {path}: masks are {list(masks.shape)}; {wanted}, are needed")
    if not masks.reshape(len(masks), -1).any(axis=1).all():
        raise BundleError(f"--mask {path}: nothing is observed of an instance")
    return masks.astype(np.float32)


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    known = (".npy", *PICTURES)
    found = [path for path in source.iterdir() if path.suffix.lower() in known and not path.name.startswith(".")]
    if not found:
        raise BundleError(f"--data {source}: no pictures and no .npy files are in it")
    return sorted(found)


def _read(path: Path, form: Form) -> np.ndarray:
    """Reads one file: [n, *grid, channels] float32 in [-1, 1]."""
    if path.suffix == ".npy":
        return _values(path, _load(path), form)
    if form.signal != "image":
        raise BundleError(f"{path}: the model is of {form.signal}; an .npy file is needed")
    return _from_bytes(read_picture(path, form.grid, form.channels)[None])


def _load(path: Path) -> np.ndarray:
    try:
        array = np.load(str(path), allow_pickle=False)
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or 'not a readable .npy array'}") from None
    except (ValueError, EOFError, SyntaxError, MemoryError) as error:
        raise BundleError(f"{path}: not a readable .npy array ({' '.join(str(error).split())[:80]})") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "bfiu" or not array.size:
        raise BundleError(f"{path}: not an .npy array of numbers")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BundleError(f"{path}: holds NaN or infinity; remove or mend it")
    return array


def _values(path: Path, array: np.ndarray, form: Form) -> np.ndarray:
    """Brings an array of one instance or of several to values."""
    shape, axes = (*form.grid, form.channels), len(form.grid)
    plain = form.channels == 1 and array.shape != shape and array.shape[-axes:] == form.grid and array.ndim <= axes + 1
    array = array[..., None] if plain else array
    array = array[None] if array.shape == shape else array
    if array.shape[1:] != shape:
        several = ", ".join(map(str, ("N", *shape)))
        raise BundleError(f"{path}: the array is {list(array.shape)}; {list(shape)} or [{several}] is needed")
    if form.signal == "image":
        return _from_bytes(_pixels(path, array))
    if form.signal == "voxels":
        return _occupancy(path, array, plain)
    return array.astype(np.float32)


def _pixels(path: Path, array: np.ndarray) -> np.ndarray:
    """Makes uint8 of floats in [0, 1]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or array.min() < 0 or array.max() > 1:
        found = f"{array.dtype} from {array.min():g} to {array.max():g}"
        raise BundleError(f"{path}: {found}; uint8, or floats in [0, 1], are needed")
    return (array * 255 + 0.5).astype(np.uint8)


def _from_bytes(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(127.5) - np.float32(1)


def _occupancy(path: Path, grids: np.ndarray, plain: bool) -> np.ndarray:
    """Makes -1 and 1 of 0 and 1, or of a volume as device/sample.py draws it, whose surface is at 0."""
    if not ((grids == 0) | (grids == 1)).all():
        if plain or grids.dtype.kind != "f":
            raise BundleError(f"{path}: values other than 0 and 1; threshold them first")
        grids = grids > 0
    occupied = grids != 0
    if not occupied.reshape(len(occupied), -1).any(axis=1).all():
        raise BundleError(f"{path}: no cell of a shape is occupied; remove it")
    return occupied.astype(np.float32) * 2 - 1
