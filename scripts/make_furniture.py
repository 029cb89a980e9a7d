"""Makes the built-in furniture sets (``mnif/data/files``) from the Debian package ``sweethome3d-furniture`` 1.8.

Nobody needs it to use the sets; it is here so that they can be made again, byte for byte with the same versions of
NumPy and Pillow. In any folder on Debian or Ubuntu::

    apt-get download sweethome3d-furniture
    dpkg-deb -x sweethome3d-furniture_*.deb package
    python path/to/scripts/make_furniture.py --package package --output_dir path/to/mnif/data/files

It writes

- ``furniture.npz``: occupancy of every object (``packed``, uint8 [N, 32, 32, 4], bits along the last axis; index order
  x, y, z, with y up and z to the front) with ``ids``, ``names``, ``categories``, ``groups`` and ``resolution``;
- ``furniture_views.npz``: 24 posed views of every object that is free of any condition (CC0): lossless WebP files one
  after the other (``image_bytes``, and ``image_offsets`` [N * 24 + 1], views of one object in a row), ``poses``
  [24, 4, 4] camera-to-world (the camera looks along its -z, y up), ``intrinsics`` fx, fy, cx, cy in pixels, ``near``
  and ``far``, with ``ids``, ``names``, ``groups`` and ``resolution``;
- ``ATTRIBUTION.md``: who made what, under which licence, and what was changed.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from furniture import views
from furniture.attribution import attribution
from furniture.catalogue import CC0, Item, read_catalogues
from furniture.meshes import Mesh, load_mesh
from furniture.voxels import RESOLUTION, find_groups, voxelise
from PIL import Image
from tqdm import tqdm

from mnif.utils.files import written_atomically


@dataclass
class Arguments:
    """Makes the built-in furniture sets.

    Attributes:
        package: the folder into which the Debian package was extracted.
        output_dir: where the three files go.
    """

    package: Path
    output_dir: Path = Path(__file__).parent.parent / "mnif" / "data" / "files"


def main(arguments: Arguments) -> None:
    """Reads the package, object by object, and writes the three files."""
    items: list[Item] = []
    grids: list[np.ndarray] = []
    pictures: dict[str, list[bytes]] = {}
    for item in tqdm(read_catalogues(arguments.package), desc="furniture", unit="object"):
        try:
            mesh = load_mesh(item)
        except ValueError as error:
            tqdm.write(f"left out: {item.id} ({error})")
            continue
        items.append(item)
        grids.append(voxelise(mesh))
        if item.licence == CC0:
            pictures[item.id] = _pictures(mesh)
    occupancy = np.stack(grids)
    groups = find_groups(items, occupancy)
    print(f"{len(items)} objects in {len(set(groups))} groups, {occupancy.mean():.1%} of the voxels occupied")

    _save(
        arguments.output_dir / "furniture.npz",
        packed=np.packbits(occupancy, axis=-1),
        ids=np.array([item.id for item in items]),
        names=np.array([item.name for item in items]),
        categories=np.array([item.category for item in items]),
        groups=np.array(groups),
        resolution=np.int64(RESOLUTION),
    )
    shown = [row for row, item in enumerate(items) if item.id in pictures]
    files = [file for row in shown for file in pictures[items[row].id]]
    _save(
        arguments.output_dir / "furniture_views.npz",
        image_bytes=np.frombuffer(b"".join(files), dtype=np.uint8),
        image_offsets=np.cumsum([0, *map(len, files)], dtype=np.int64),
        poses=views.cameras().astype(np.float32),
        intrinsics=views.intrinsics().astype(np.float32),
        near=np.float32(views.NEAREST),
        far=np.float32(views.FARTHEST),
        ids=np.array([items[row].id for row in shown]),
        names=np.array([items[row].name for row in shown]),
        groups=np.array([groups[row] for row in shown]),
        resolution=np.int64(views.PIXELS),
    )
    with written_atomically(arguments.output_dir / "ATTRIBUTION.md") as temporary:
        temporary.write_text(attribution(items), encoding="utf-8")


def _pictures(mesh: Mesh) -> list[bytes]:
    files = []
    for pose in views.cameras():
        stream = io.BytesIO()
        Image.fromarray(views.render(mesh, pose)).save(stream, "webp", lossless=True, quality=100, method=6)
        files.append(stream.getvalue())
    return files


def _save(path: Path, **arrays: Any) -> None:
    with written_atomically(path) as temporary, temporary.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
