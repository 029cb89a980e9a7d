"""The signals by name, and which of them a data source is of; one of your own joins with :func:`register_signal`."""

import os
from collections import Counter
from importlib import import_module
from pathlib import Path

from mnif.data.arrays import npy_array, npz_names
from mnif.data.builtin import BUILTIN
from mnif.data.images import IMAGE_SUFFIXES, is_hub_folder
from mnif.data.view_formats import SRN_MARKER, TRANSFORMS_MARKERS
from mnif.data.voxels import VOXEL_SUFFIXES
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.utils.errors import UserError

_HOMES = {
    "image": "mnif.signals.image:Image",
    "voxels": "mnif.signals.voxels:Voxels",
    "radiance": "mnif.signals.radiance:RadianceField",
}


_REGISTERED: dict[str, type[Signal]] = {}


def register_signal(kind: type[Signal]) -> type[Signal]:
    """Makes a signal known by its ``name`` to every command of this process; usable as a class decorator."""
    _REGISTERED[kind.name] = kind
    return kind


def signal_class(name: str) -> type[Signal]:
    """The class of a signal.

    Raises:
        UserError: there is no such signal.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _HOMES:
        raise UserError(f"signal {name!r}: must be one of {', '.join(sorted({*_HOMES, *_REGISTERED}))}")
    module, _, kind = _HOMES[name].partition(":")
    return getattr(import_module(module), kind)


def signal_of_model(decoder: MNIFModel) -> Signal:
    """The signal a decoder was trained on, with its settings."""
    return signal_class(decoder.config.signal)(**decoder.config.signal_settings)


SIGNALS = ("image", "voxels", "radiance")


def detect_signal(source: str) -> str:
    """What kind of data a source is, by its name and by what the file or folder holds: one of :data:`SIGNALS`.

    Raises:
        UserError: the source is missing, or holds nothing that tells; the message says what was found.
    """
    path = Path(source)
    if source in BUILTIN:
        return BUILTIN[source]
    if source.startswith("hf:"):
        return "image"
    if path.is_dir():
        return _detect_in_folder(path)
    if not path.is_file():
        raise UserError(f"--data {source}: no such folder, file or built-in set ({', '.join(sorted(BUILTIN))})")
    if path.suffix == ".npz":
        return _detect_in_npz(path)
    if path.suffix == ".npy":
        return _detect_in_npy(path)
    if path.suffix in (".hdf5", ".h5"):
        return "voxels"
    raise UserError(
        f"--data {source}: a {path.suffix or 'nameless'} file; .npz, .npy, .hdf5, .h5 or a folder is needed"
    )


def _detect_in_npz(path: Path) -> str:
    names = npz_names(path)
    if "images" in names:
        return "image"
    if names & {"voxels", "occupancy", "packed"}:
        return "voxels"
    raise UserError(
        f'--data {path}: holds {", ".join(sorted(names)) or "nothing"}; "images", or one of "voxels", "occupancy" and '
        '"packed", is needed'
    )


def _detect_in_npy(path: Path) -> str:
    array = npy_array(path)
    pictures = array.ndim == 3 or array.shape[3:] in ((1,), (3,), (4,))
    cubes = array.ndim == 4 and len(set(array.shape[1:])) == 1
    if pictures != cubes:
        return "image" if pictures else "voxels"
    shape = list(array.shape)
    raise UserError(f"--data {path}: an array {shape} may be anything; say which with --signal {' or '.join(SIGNALS)}")


def _detect_in_folder(folder: Path) -> str:
    if is_hub_folder(folder):
        return "image"
    found: Counter[str] = Counter()
    for _, _, names in os.walk(folder):
        for name in names:
            if name in (SRN_MARKER, *TRANSFORMS_MARKERS):
                return "radiance"
            found[os.path.splitext(name)[1].lower()] += 1
    # Meshes bring pictures along as textures, so they are looked for first.
    for signal, suffixes in (("voxels", VOXEL_SUFFIXES), ("image", IMAGE_SUFFIXES)):
        if any(suffix in found for suffix in suffixes):
            return signal
    contents = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in found.most_common(5))
    raise UserError(f"--data {folder}: no pictures, voxels, meshes or posed views; found {contents or 'nothing'}")
