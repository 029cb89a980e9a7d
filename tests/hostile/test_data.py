"""Damaged data: arrays, grids, meshes, pictures, posed views, and files that would fill the machine's memory."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.voxel_sets import shape_files
from mnif.data.images import load_images
from mnif.data.source import DataSource
from mnif.data.views import load_views
from mnif.data.voxel_formats import write_binvox
from mnif.data.voxels import load_voxels
from mnif.latents.masks import read_masks
from tests.hostile.conftest import refusal_of
from tests.hostile.mutators import damaged_bytes, damaged_json
from tests.hostile.test_models import Bomb

h5py = pytest.importorskip("h5py")


def damage(path: Path, seed: int) -> None:
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))


@pytest.mark.parametrize("name", ["images.npy", "images.npz", "pictures/a.png", "jpegs/a.jpg", "shards/a.tar"])
@pytest.mark.parametrize("seed", range(30))
def test_pictures(name: str, seed: int, copied: Callable[[str], Path]) -> None:
    path = copied(f"data/{name}")
    damage(path, seed)
    source = str(path if path.suffix.startswith(".np") else path.parent)
    refusal_of(lambda: (DataSource(source).array_names, DataSource(source).array_shape))
    if refusal_of(lambda: load_images(source, 8)) is None:
        assert load_images(source, 8).images.shape[1:] == (8, 8, 3)


@pytest.mark.parametrize("name", ["voxels.npy", "voxels.npz"])
@pytest.mark.parametrize("seed", range(30))
def test_grids(name: str, seed: int, copied: Callable[[str], Path]) -> None:
    path = copied(f"data/{name}")
    damage(path, seed)
    refusal_of(lambda: load_voxels(str(path)))
    refusal_of(lambda: shape_files(str(path)).surfaces(3))
    refusal_of(lambda: read_masks(path, (8, 8, 8), ["a", "b", "c"]))


@pytest.mark.parametrize("seed", range(30))
def test_hdf5(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "shapes.hdf5"
    with h5py.File(path, "w") as file:
        grids = np.zeros((2, 8, 8, 8, 1), dtype=np.uint8)
        grids[:, 2:5, 2:5, 2:5] = 1
        file.create_dataset("voxels", data=grids, compression="gzip")
    damage(path, seed)
    refusal_of(lambda: load_voxels(str(path)))


@pytest.mark.parametrize("seed", range(30))
def test_binvox(seed: int, tmp_path: Path) -> None:
    grid = np.zeros((8, 8, 8), dtype=bool)
    grid[2:5, 1:7, 3:4] = True
    path = tmp_path / "a.binvox"
    write_binvox(path, grid)
    damage(path, seed)
    refusal_of(lambda: load_voxels(str(tmp_path)))


@pytest.mark.parametrize("seed", range(60))
def test_transforms(seed: int, ball_views: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ball_views / "00", tmp_path / "ball"))
    path = folder / "transforms.json"
    path.write_bytes(damaged_json(path.read_bytes(), seed))
    if refusal_of(lambda: load_views(str(folder))) is None:
        views = load_views(str(folder))
        assert np.isfinite(views.poses).all()
        assert np.isfinite(views.intrinsics).all()


def limited(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program that may take 1.5 GB beyond what importing takes, and 20 seconds."""
    head = """
import resource, sys
import h5py, numpy, torch
from mnif.data.images import load_images
from mnif.data.voxels import load_voxels
from mnif.utils.errors import UserError
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + (1500 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""
    return subprocess.run(
        [sys.executable, "-c", head + program, *map(str, arguments)], capture_output=True, text=True, timeout=40
    )


def header_of(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
    return header.getvalue()


def bombs(folder: Path) -> dict[str, Path]:
    """Small files that state, or unpack to, gigabytes."""
    folder.mkdir()
    with (
        zipfile.ZipFile(folder / "packed.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w", force_zip64=True) as file,
    ):
        file.write(header_of((400, 1024, 1024)))
        for _ in range(400):
            file.write(bytes(1 << 20))
    with zipfile.ZipFile(folder / "stated.npz", "w") as archive:
        archive.writestr("images.npy", header_of((10**6, 1024, 1024)))
    with zipfile.ZipFile(folder / "stated_voxels.npz", "w") as archive:
        archive.writestr("voxels.npy", header_of((1, 1700, 1700, 1700)))
    (folder / "stated.npy").write_bytes(header_of((10**6, 1024, 1024)))
    with (folder / "sparse_voxels.npy").open("wb") as file:
        file.write(header_of((1, 1700, 1700, 1700)))
        file.truncate(file.tell() + 1700**3)
    with h5py.File(folder / "sparse.hdf5", "w") as file:
        file.create_dataset("voxels", (1, 1700, 1700, 1700, 1), np.uint8, chunks=(1, 64, 64, 64, 1))
    with h5py.File(folder / "many.hdf5", "w") as file:
        file.create_dataset("voxels", (10**9, 64, 64, 64, 1), np.uint8, chunks=(1, 64, 64, 64, 1))
    with h5py.File(folder / "object.hdf5", "w") as file:
        file.create_dataset("voxels", (2, 8, 8, 8), h5py.string_dtype())
    (folder / "large").mkdir()
    (folder / "large/a.binvox").write_bytes(b"#binvox 1\ndim 1700 1700 1700\ndata\n\x01\xff")
    (folder / "digits").mkdir()
    (folder / "digits/a.binvox").write_bytes(b"#binvox 1\ndim " + b" ".join([b"9" * 5000] * 3) + b"\ndata\n\x01\xff")
    return {str(path.relative_to(folder)): path for path in sorted(folder.iterdir())}


def test_bombs_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    program = """
for path in sys.argv[1:]:
    try:
        if "voxels" in path or not path.endswith((".npz", ".npy")):
            load_voxels(path)
        else:
            load_images(path, 8)
    except UserError as error:
        assert "\\n" not in str(error)
        print("refused")
"""
    files = bombs(tmp_path / "bombs")
    done = limited(program, *files.values())
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout == "refused\n" * len(files)


def test_an_array_that_is_not_used_is_not_read(made: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(made / "data/images.npz", tmp_path))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", header_of((4 << 30,)))
    done = limited("print(load_images(sys.argv[1], 8).images.sum())", path)
    assert done.stdout == f"{load_images(str(made / 'data/images.npz'), 8).images.sum()}\n", done.stderr[-1500:]


def test_archives_with_pickles_are_refused_unread(tmp_path: Path) -> None:
    bomb = np.array([Bomb(tmp_path / "ran")], dtype=object)
    np.savez(tmp_path / "images.npz", images=bomb)
    np.savez(tmp_path / "voxels.npz", voxels=bomb)
    assert refusal_of(lambda: load_images(str(tmp_path / "images.npz"), 8))
    assert refusal_of(lambda: load_voxels(str(tmp_path / "voxels.npz")))
    np.save(tmp_path / "images.npy", bomb)
    assert refusal_of(lambda: load_images(str(tmp_path / "images.npy"), 8))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key", ["frames", "camera_angle_x"])
def test_views_name_the_key(key: str, ball_views: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ball_views / "00", tmp_path / "ball"))
    content = json.loads((folder / "transforms.json").read_text())
    (folder / "transforms.json").write_text(json.dumps(content | {key: {"a": 1}}))
    assert key in (refusal_of(lambda: load_views(str(folder))) or "")


def test_pictures_of_many_pixels_are_one_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("1", (30000, 30000)).save(buffer, format="PNG")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert "a.png" in (refusal_of(lambda: load_images(str(tmp_path), 8)) or "")
