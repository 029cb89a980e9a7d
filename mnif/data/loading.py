"""Any data set by its name: which kind of data it is, and the loader for it."""

import os
from collections import Counter
from pathlib import Path

from mnif.data.arrays import npy_array, npz_names
from mnif.data.built_in import BUILT_IN
from mnif.data.image_sources import is_hub_folder
from mnif.data.images import load_images
from mnif.data.instances import Instances
from mnif.data.pictures import IMAGE_SUFFIXES
from mnif.data.view_formats import SRN_MARKER, TRANSFORMS_MARKERS
from mnif.data.views import Background, load_views
from mnif.data.voxel_sources import VOXEL_SUFFIXES
from mnif.data.voxels import load_voxels
from mnif.errors import UserError

SIGNALS = ("image", "voxels", "radiance")


def load_data(
    source: str,
    signal: str | None = None,
    resolution: int | tuple[int, int] | None = None,
    *,
    channels: int = 3,
    near: float | None = None,
    far: float | None = None,
    max_views: int | None = None,
    background: Background = "white",
) -> Instances:
    """Loads any kind of data.

    Args:
        source: as :func:`mnif.data.load_images`, :func:`~mnif.data.load_voxels` and :func:`~mnif.data.load_views`
            take it.
        signal: "image", "voxels" or "radiance"; default: :func:`signal_of` the source.
        resolution: pixels or cells per axis; pictures need it, voxels and views have one of their own. Height and
            width are for pictures and views only.
        channels: of pictures.
        near: of views.
        far: of views.
        max_views: of views.
        background: of views.

    Raises:
        UserError: the signal is unknown or cannot be told, or the loader refuses the source or an argument.
    """
    signal = signal_of(source) if signal is None else signal
    if signal == "image":
        if resolution is None:
            raise UserError(f"--data {source}: pictures need a --resolution")
        return load_images(source, resolution, channels)
    if signal == "voxels":
        if isinstance(resolution, tuple):
            raise UserError(f"--resolution {resolution[0]} {resolution[1]}: voxels are cubes; give one number")
        return load_voxels(source, resolution)
    if signal == "radiance":
        return load_views(source, resolution, near, far, max_views, background)
    raise UserError(f"--signal {signal}: must be one of {', '.join(SIGNALS)}")


def signal_of(source: str) -> str:
    """What kind of data a source is, by its name and by what the file or folder holds: one of :data:`SIGNALS`.

    Raises:
        UserError: the source is missing, or holds nothing that tells; the message says what was found.
    """
    path = Path(source)
    if source in BUILT_IN:
        return BUILT_IN[source]
    if source.startswith("hf:"):
        return "image"
    if path.is_dir():
        return _signal_of_folder(path)
    if not path.is_file():
        raise UserError(f"--data {source}: no such folder, file or built-in set ({', '.join(sorted(BUILT_IN))})")
    if path.suffix == ".npz":
        return _signal_of_npz(path)
    if path.suffix == ".npy":
        return _signal_of_npy(path)
    if path.suffix in (".hdf5", ".h5"):
        return "voxels"
    raise UserError(
        f"--data {source}: a {path.suffix or 'nameless'} file; .npz, .npy, .hdf5, .h5 or a folder is needed"
    )


def _signal_of_npz(path: Path) -> str:
    names = npz_names(path)
    if "images" in names:
        return "image"
    if names & {"voxels", "occupancy", "packed"}:
        return "voxels"
    raise UserError(
        f'--data {path}: holds {", ".join(sorted(names)) or "nothing"}; "images", or one of "voxels", "occupancy" and '
        '"packed", is needed'
    )


def _signal_of_npy(path: Path) -> str:
    array = npy_array(path)
    pictures = array.ndim == 3 or array.shape[3:] in ((1,), (3,), (4,))
    cubes = array.ndim == 4 and len(set(array.shape[1:])) == 1
    if pictures != cubes:
        return "image" if pictures else "voxels"
    shape = list(array.shape)
    raise UserError(f"--data {path}: an array {shape} may be anything; say which with --signal {' or '.join(SIGNALS)}")


def _signal_of_folder(folder: Path) -> str:
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
