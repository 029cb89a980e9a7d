"""Reading `.npz` and `.npy` files, with one-line errors."""

from pathlib import Path
from zipfile import BadZipFile, ZipFile

import numpy as np

from mnif.errors import UserError


def npz_arrays(path: Path, needs: str) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file by name.

    Args:
        path: the file.
        needs: what the file should hold, for the error.

    Raises:
        UserError: the file is damaged, or holds Python objects.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"{path}: needs {needs} ({error})") from None


def npz_names(path: Path) -> set[str]:
    """The names of the arrays in an ``.npz`` file, without reading them.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with ZipFile(path) as file:
            return {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, BadZipFile) as error:
        raise UserError(f"{path}: not an .npz file ({error})") from None


def npy_array(path: Path) -> np.ndarray:
    """The array of an ``.npy`` file, memory-mapped and copy-on-write.

    Raises:
        UserError: the file is damaged, or holds Python objects.
    """
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npy array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: not a readable .npy array (it is an .npz file)")
    return array


def ids_and_groups(path: Path, arrays: dict[str, np.ndarray], count: int) -> tuple[list[str], list[str]]:
    """The arrays ``ids`` and ``groups``; row numbers where there are no ids, the ids where there are no groups.

    Raises:
        UserError: they are not ``count`` names each.
    """
    ids = [str(id) for id in arrays["ids"].ravel()] if "ids" in arrays else row_names(count)
    groups = [str(group) for group in arrays["groups"].ravel()] if "groups" in arrays else ids
    for name, found in (("ids", ids), ("groups", groups)):
        if len(found) != count:
            raise UserError(f'{path}: "{name}" has {len(found)} names for {count} instances')
    return ids, groups


def row_names(count: int) -> list[str]:
    """Ids for instances without names: ``000000``, ``000001``, …"""
    return [f"{row:06d}" for row in range(count)]
