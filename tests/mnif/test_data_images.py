import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnif.data.images import image_size, load_images
from mnif.utils.errors import UserError
from mnif.utils.pixels import central_box


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_central_part_of_an_aspect() -> None:
    assert central_box((20, 16), (8, 8)) == (2, 0, 18, 16)
    assert central_box((20, 16), (8, 16)) == (0, 3, 20, 13)  # twice as wide as high
    assert central_box((20, 16), (16, 8)) == (6, 0, 14, 16)
    assert central_box((1, 9), (1, 100)) == (0, 4, 1, 5)  # never less than a pixel


def test_height_and_width(picture_folder: Path) -> None:
    images = load_images(str(picture_folder), (6, 12)).images
    assert images.shape == (48, 6, 12, 3)
    with Image.open(picture_folder / "000.png") as image:
        expected = image.crop((0, 3, 20, 13)).resize((12, 6), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images[0], np.asarray(expected))


def test_luminance_follows_rec_601_and_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b.png")
    images = load_images(str(tmp_path), 4, channels=1).images
    assert images.shape == (2, 4, 4, 1)
    assert (images[0] == round(0.299 * 255)).all()
    assert (images[1] == 255).all()


def test_alpha_is_kept_without_a_dark_fringe(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)  # transparent black around an opaque red disc
    rows, columns = np.mgrid[0:32, 0:32]
    pixels[(rows - 15.5) ** 2 + (columns - 15.5) ** 2 < 100] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "disc.png")
    (image,) = load_images(str(tmp_path), 8, channels=4).images
    alpha = image[..., 3]
    assert alpha[0, 0] == 0
    assert alpha[4, 4] == 255
    edge = (alpha > 30) & (alpha < 225)
    assert edge.any()
    assert (image[edge][:, 0] > 245).all()  # as red as the disc, only less of it


def test_sixteen_bit_grey_is_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 257 * 100, dtype=np.uint16)).save(tmp_path / "a.png")
    assert (load_images(str(tmp_path), 4).images == 100).all()


def test_turned_as_the_camera_was_held(tmp_path: Path) -> None:
    upright = np.zeros((8, 8, 3), dtype=np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.webp", lossless=True, exif=exif)
    np.testing.assert_array_equal(load_images(str(tmp_path), 8).images[0], upright)


@pytest.mark.parametrize("shape", [(5, 6, 6), (5, 6, 6, 1), (5, 6, 6, 3), (5, 6, 6, 4)])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_arrays_of_any_channels(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    images = noise(*shape)
    np.savez(tmp_path / "a.npz", images=images, groups=["a", "a", "b", "b", "b"])
    np.save(tmp_path / "a.npy", images)
    found = load_images(str(tmp_path / "a.npz"), 6, channels)
    assert found.images.shape == (5, 6, 6, channels)
    assert found.groups == ["a", "a", "b", "b", "b"]
    assert found.ids[4] == "000004"
    mode = {1: "L", 3: "RGB", 4: "RGBA"}
    for image, row in zip(images, found.images, strict=True):
        picture = Image.fromarray(image.squeeze())
        if picture.mode == "RGBA" and channels != 4:
            picture = Image.alpha_composite(Image.new("RGBA", (6, 6), "white"), picture)
        np.testing.assert_array_equal(row.squeeze(), np.asarray(picture.convert(mode[channels])))
    np.testing.assert_array_equal(load_images(str(tmp_path / "a.npy"), 6, channels).images, found.images)


def test_floats_become_the_nearest_bytes(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((2, 4, 4, 3)).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=values)
    images = load_images(str(tmp_path / "a.npz"), 4).images
    assert np.abs(images / 255 - values).max() <= 0.5 / 255 + 1e-6


def test_npy_of_the_right_size_is_used_in_place(tmp_path: Path) -> None:
    images = noise(20, 6, 6, 3)
    np.save(tmp_path / "a.npy", images)
    data = load_images(str(tmp_path / "a.npy"), 6)
    assert isinstance(data.images, np.memmap)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that cannot be written
        torch.from_numpy(data.images)[0] = 0
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), images)


def test_over_the_limit_pixels_are_written_once(
    picture_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = load_images(str(picture_folder), 8)
    assert not cache.exists()
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "0.002")
    first = load_images(str(picture_folder), 8)
    (written,) = cache.iterdir()
    before = written.stat()
    second = load_images(str(picture_folder), 8)
    assert written.stat() == before
    for data in (first, second):
        assert isinstance(data.images, np.memmap)
        np.testing.assert_array_equal(data.images, in_memory.images)
        assert data.fingerprint() == in_memory.fingerprint()
    load_images(str(picture_folder), 8, channels=1)
    assert len(list(cache.iterdir())) == 2


def test_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "0")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for colour in (10, 200):
        Image.new("RGB", (4, 4), (colour,) * 3).save(folder / "a.png")
        assert (load_images(str(folder), 4).images == colour).all()


def test_an_error_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "0")
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.png: unreadable picture"):
        load_images(str(folder), 4)
    assert list(cache.iterdir()) == []


def test_bad_arguments_and_arrays_name_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"

    def refused(match: str, **arrays: np.ndarray) -> None:
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=match):
            load_images(str(path), 4)

    floats = np.zeros((2, 4, 4, 3))
    floats[1, 2, 3, 0] = np.nan
    refused("picture 'y' holds NaN", images=floats, ids=np.array(["x", "y"]))
    refused(r"picture '000000' has values from 0 to 255", images=np.full((1, 4, 4, 3), 255.0) * [0, 1, 1])
    refused(r'"images" is uint8 \[2, 4, 4, 2\]', images=np.zeros((2, 4, 4, 2), np.uint8))
    refused(r'"images" is int64', images=np.zeros((2, 4, 4, 3), np.int64))
    refused(r'"images" is uint8 \[0, 4, 4, 3\]', images=np.zeros((0, 4, 4, 3), np.uint8))
    refused('"ids" has 1 names for 2', images=np.zeros((2, 4, 4, 3), np.uint8), ids=np.array(["x"]))
    refused("duplicate id 'x' in", images=np.zeros((2, 4, 4, 3), np.uint8), ids=np.array(["x", "x"]))
    refused("found pictures", pictures=np.zeros(3))
    (tmp_path / "b.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"b\.npy: not a readable"):
        load_images(str(tmp_path / "b.npy"), 4)
    np.save(tmp_path / "a.npy", noise(2, 4, 4, 3))
    with pytest.raises(UserError, match="channels 2"):
        load_images(str(tmp_path / "a.npy"), 4, channels=2)
    with pytest.raises(UserError, match="resolution"):
        load_images(str(tmp_path / "a.npy"), (0, 4))
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tiff")
    (tmp_path / "f.tiff").rename(tmp_path / "f.png")
    with pytest.raises(UserError, match=r"f\.png: unreadable picture \(mode F"):
        load_images(str(tmp_path), 4)
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "much")
    with pytest.raises(UserError, match="MNIF_MEMORY_LIMIT_MB=much"):
        load_images(str(tmp_path / "a.npy"), 8)


def test_picture_size(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", noise(2, 4, 4))
    assert image_size(str(tmp_path / "a.npy")) == 4
    np.savez(tmp_path / "b.npz", images=noise(2, 4, 6, 3))
    with pytest.raises(UserError, match="6×4; square"):
        image_size(str(tmp_path / "b.npz"))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        image_size("nowhere")


def test_hugging_face_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = noise(5, 8, 8, 3)
    features = datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()})
    rows = {"label": list(range(5)), "picture": [Image.fromarray(image) for image in images]}
    train = datasets.Dataset.from_dict(rows, features=features)
    train.save_to_disk(tmp_path / "one")
    data = load_images(str(tmp_path / "one"), 8)
    np.testing.assert_array_equal(data.images, images)
    assert data.ids[4] == "000004"

    datasets.DatasetDict({"train": train, "test": train.select([3])}).save_to_disk(tmp_path / "two")
    assert len(load_images(str(tmp_path / "two"), 8)) == 5
    test = load_images(f"hf:{tmp_path / 'two'}:test", 8)
    np.testing.assert_array_equal(test.images, images[3:4])
    with pytest.raises(UserError, match='no split "valid"; it has train, test'):
        load_images(f"hf:{tmp_path / 'two'}:valid", 8)

    content = io.BytesIO()
    Image.fromarray(images[0]).save(content, "PNG")
    for name, picture, message in (
        ("cut", content.getvalue()[:60], "row 1: unreadable picture"),
        ("none", None, "row 1"),
    ):
        broken = [{"bytes": content.getvalue(), "path": None}, picture and {"bytes": picture, "path": None}]
        rows = {"label": [0, 1], "picture": broken}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_images(str(tmp_path / name), 8)


def test_hugging_face_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UserError, match="no column of pictures among text"):
        load_images(str(tmp_path / "text"), 8)
    with pytest.raises(UserError, match="hf:nobody/nothing: cannot be loaded") as error:
        load_images("hf:nobody/nothing", 8)
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"mnif-diffusion\[datasets\]"):
        load_images("hf:nobody/nothing", 8)
