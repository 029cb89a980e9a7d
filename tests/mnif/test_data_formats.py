"""What all kinds of data share: splits, rows, the built-in sets, and telling a source's kind."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnif.data import builtin
from mnif.data.builtin import BUILTIN
from mnif.data.dataset import SelectedRows, Split
from mnif.data.images import ImageData, load_images
from mnif.data.views import ViewData, load_views
from mnif.data.voxels import VoxelData, load_voxels
from mnif.signals.registry import detect_signal
from mnif.utils.errors import UserError


def pictures(groups: list[str]) -> ImageData:
    ids = [f"{row}/{group}" for row, group in enumerate(groups)]
    return ImageData("x", np.arange(len(ids), dtype=np.uint8).reshape(-1, 1, 1, 1), ids, groups)


def test_split_has_its_proportions_and_keeps_groups_whole() -> None:
    groups = [f"design {number // 3}" for number in range(6000)]
    data = pictures(groups)
    splits = data.split(0.1, 0.2)
    assert splits.dtype == np.int8
    shares = [(splits == side).mean() for side in Split]
    np.testing.assert_allclose(shares, [0.7, 0.1, 0.2], atol=0.03)
    assert all(len(set(trio)) == 1 for trio in splits.reshape(-1, 3))
    np.testing.assert_array_equal(splits == Split.HELD_OUT, data.held_out(0.1))
    np.testing.assert_array_equal(data.split(0.1, 0) == Split.HELD_OUT, data.held_out(0.1))
    assert (data.split(0, 1) == Split.TEST).all()


def test_split_stays_when_the_data_set_grows() -> None:
    groups = [f"design {number}" for number in range(400)]
    whole = pictures(groups).split(0.1, 0.1)
    np.testing.assert_array_equal(pictures(groups[100:300]).split(0.1, 0.1), whole[100:300])


@pytest.mark.parametrize("fractions", [(-0.1, 0), (0, -0.1), (0.6, 0.5)])
def test_split_refuses_impossible_fractions(fractions: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="test_fraction"):
        pictures(["a"]).split(*fractions)


def test_rows_of_arrays_in_memory_and_on_disk(tmp_path: Path) -> None:
    data = pictures(["a", "b", "c", "d"])
    some = data.rows(data.images[:, 0, 0, 0] % 2 == 1)
    assert (some.ids, some.groups, len(some)) == (["1/b", "3/d"], ["b", "d"], 2)
    np.save(tmp_path / "a.npy", data.images)
    mapped = ImageData("x", np.load(tmp_path / "a.npy", mmap_mode="c"), data.ids, data.groups)
    on_disk = mapped.rows(np.array([3, 1, 0])).rows(np.array([False, True, True]))
    assert isinstance(on_disk.images, SelectedRows)
    assert on_disk.images.shape == (2, 1, 1, 1)
    assert (on_disk.images.dtype, on_disk.images.ndim) == (np.uint8, 4)
    np.testing.assert_array_equal(np.asarray(on_disk.images), data.images[[1, 0]])
    np.testing.assert_array_equal(on_disk.images[1], data.images[0])
    assert on_disk.fingerprint() == data.rows(np.array([1, 0])).fingerprint()
    with pytest.raises(UserError, match="duplicate id '1/b' in x"):
        data.rows(np.array([1, 1]))


def test_ids_groups_and_arrays_must_agree() -> None:
    with pytest.raises(UserError, match="2 ids but 1 groups"):
        ImageData("x", np.zeros((2, 1, 1, 3), np.uint8), ["a", "b"], ["a"])
    with pytest.raises(UserError, match="2 ids but 3 images"):
        ImageData("x", np.zeros((3, 1, 1, 3), np.uint8), ["a", "b"], ["a", "b"])


def test_fingerprint_depends_on_ids_values_and_shape() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 2, 3), dtype=np.uint8)
    changed = images.copy()
    changed[1, 3, 1, 2] ^= 1
    prints = {
        ImageData("x", array, list(ids), list(ids)).fingerprint()
        for array, ids in ((images, "ab"), (images, "ac"), (changed, "ab"), (images.reshape(2, 2, 4, 3), "ab"))
    }
    assert len(prints) == 4
    assert ImageData("other", images, ["a", "b"], ["c", "c"]).fingerprint() in prints


@pytest.fixture
def data_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Small stand-ins for the built-in files, in their layout."""
    generator = np.random.default_rng(0)
    grids = generator.random((3, 32, 32, 32)) < 0.5
    views = generator.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    files = []
    for image in views.reshape(6, 16, 16, 3):
        content = BytesIO()
        Image.fromarray(image).save(content, "WEBP", lossless=True)
        files.append(np.frombuffer(content.getvalue(), dtype=np.uint8))
    poses = np.tile(np.eye(4, dtype=np.float32), (3, 1, 1))
    poses[:, 2, 3] = [1, 2, 3]
    np.savez(
        tmp_path / "furniture.npz",
        packed=np.packbits(grids, axis=-1),
        ids=["a", "b", "c"],
        names=["Chair", "Chair 2", "Table"],
        categories=["Living room"] * 3,
        groups=["chair", "chair", "table"],
        resolution=32,
    )
    np.savez(
        tmp_path / "furniture_views.npz",
        image_bytes=np.concatenate(files),
        image_offsets=np.cumsum([0, *(len(file) for file in files)], dtype=np.int64),
        poses=poses,
        intrinsics=np.array([20, 20, 8, 8], np.float32),
        ids=["a", "c"],
        names=["Chair", "Table"],
        groups=["chair", "table"],
        resolution=16,
        near=np.float32(0.5),
        far=np.float32(4),
    )
    monkeypatch.setattr(builtin, "_FOLDER", tmp_path)
    return {"grids": grids, "views": views, "poses": poses}


def test_built_in_sets_are_read_as_they_are_written(data_files: dict[str, np.ndarray]) -> None:
    shapes = load_voxels("furniture")
    assert isinstance(shapes, VoxelData)
    assert (shapes.name, shapes.ids, shapes.groups) == ("furniture", ["a", "b", "c"], ["chair", "chair", "table"])
    np.testing.assert_array_equal(shapes.occupancy(), data_files["grids"])
    views = load_views("furniture-views", max_views=2)
    assert isinstance(views, ViewData)
    assert (views.ids, views.near, views.far, views.background) == (["a", "c"], 0.5, 4, "white")
    np.testing.assert_array_equal(views.images, data_files["views"][:, :2])
    np.testing.assert_array_equal(views.poses[1], data_files["poses"][:2])
    assert views.intrinsics.tolist() == [[20, 20, 8, 8]] * 2
    assert load_views("furniture-views", 8).intrinsics[0].tolist() == [10, 10, 4, 4]
    images = load_images("furniture-views", 16)
    assert isinstance(images, ImageData)
    assert (images.ids[4], images.groups[4]) == ("c/01", "table")
    np.testing.assert_array_equal(images.images[4], data_files["views"][1, 1])


def test_a_missing_built_in_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_FOLDER", tmp_path)
    for load, name in ((load_voxels, "furniture"), (load_views, "furniture-views")):
        with pytest.raises(UserError, match=rf"--data {name}: .*missing from this installation"):
            load(name)


def test_installed_built_in_sets_load() -> None:
    shapes, views = load_voxels("furniture"), load_views("furniture-views")
    assert isinstance(shapes, VoxelData)
    assert isinstance(views, ViewData)
    assert shapes.resolution == 32
    assert all(0.9 > share > 0 for share in shapes.occupancy().mean(axis=(1, 2, 3)))
    assert (views.images[:, :, 0, 0] > 250).mean() > 0.9  # white behind the objects
    forward = -views.poses[0, :, :3, 2]
    places = views.poses[0, :, :3, 3]
    cosines = (forward * -places).sum(axis=1) / np.linalg.norm(places, axis=1)
    assert (cosines > 0.99).all()  # every camera looks at the object


def test_signals(tmp_path: Path) -> None:
    assert {name: detect_signal(name) for name in BUILTIN} == BUILTIN
    assert detect_signal("avatars:lorelei") == detect_signal("avatars:lorelei:20") == "image"
    assert detect_signal("hf:someone/faces:train") == "image"
    found: dict[str, str] = {}
    for name, key in (("a.npz", "images"), ("b.npz", "voxels"), ("c.npz", "occupancy"), ("d.npz", "packed")):
        np.savez(tmp_path / name, **{key: np.zeros(1)})
        found[key] = detect_signal(str(tmp_path / name))
    assert found == {"images": "image", "voxels": "voxels", "occupancy": "voxels", "packed": "voxels"}
    for shape, signal in (((2, 8, 8), "image"), ((2, 8, 8, 3), "image"), ((2, 8, 8, 8), "voxels")):
        np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
        assert detect_signal(str(tmp_path / "a.npy")) == signal
    (tmp_path / "a.hdf5").write_bytes(b"")
    assert detect_signal(str(tmp_path / "a.hdf5")) == "voxels"


@pytest.mark.parametrize(
    ("names", "signal"),
    [
        (["a.png", "notes.txt"], "image"),
        (["a/model.obj", "a/texture.PNG"], "voxels"),
        (["a.binvox"], "voxels"),
        (["a/rgb/0.png", "a/pose/0.txt", "a/intrinsics.txt"], "radiance"),
        (["transforms.json", "images/0.jpg"], "radiance"),
        (["transforms_train.json", "train/0.png"], "radiance"),
        (["dataset_info.json", "state.json", "data.arrow"], "image"),
        (["dataset_dict.json", "train/data.arrow"], "image"),
    ],
)
def test_signals_of_folders(tmp_path: Path, names: list[str], signal: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert detect_signal(str(tmp_path)) == signal


def test_what_cannot_be_told_says_what_was_found(tmp_path: Path) -> None:
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            detect_signal(str(path))

    refused(
        tmp_path / "nowhere",
        r"no such folder, file or built-in set \(avatars, emoji, furniture, furniture-views, twemoji\)",
    )
    refused(tmp_path, "found nothing")
    for name in ("a.csv", "b.csv", "README"):
        (tmp_path / name).touch()
    refused(tmp_path, r"found 2 \.csv, 1 without suffix")
    refused(tmp_path / "a.csv", r"a \.csv file")
    np.savez(tmp_path / "a.npz", x=np.zeros(1), y=np.zeros(1))
    refused(tmp_path / "a.npz", "holds x, y")
    (tmp_path / "b.npz").touch()
    refused(tmp_path / "b.npz", r"b\.npz: not an \.npz file")
    for shape in ((2, 3), (2, 3, 3, 3), (2, 8, 8, 7)):
        np.save(tmp_path / "a.npy", np.zeros(shape))
        refused(tmp_path / "a.npy", "may be anything; say which with --signal image or voxels or radiance")


def test_importing_costs_no_heavy_package() -> None:
    code = "import sys, mnif.data.images, mnif.data.views, mnif.data.voxels; "
    code += "print([m for m in ('torch', 'h5py', 'trimesh', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
