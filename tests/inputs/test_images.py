"""Pictures as users have them: formats, links, hidden files, damaged parts, ambiguous arrays."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from mnif.cli import main
from mnif.data import source as source_module
from mnif.data.images import load_images
from mnif.signals.registry import detect_signal
from mnif.utils.errors import UserError
from mnif.utils.pixels import crop_and_resize, open_image, to_mode


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write(path: Path, seed: int = 0, size: int = 16, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(size, size, 3, seed=seed)).save(path, **options)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines told to the user."""
    lines: list[str] = []
    monkeypatch.setattr(source_module, "tell", lines.append)
    return lines


SUFFIXES = ["bmp", "tif", "tiff", "gif", "jpg", "jpe", "webp", "ppm", "jp2", "avif", "tga", "ico", "pcx", "sgi", "dds"]
SUFFIXES += ["qoi", "PNG", "mpo"]


def test_every_format_that_pillow_reads_is_a_picture(tmp_path: Path, told: list[str]) -> None:
    for seed, suffix in enumerate(SUFFIXES):
        write(tmp_path / f"{seed:02d}.{suffix}", seed)
    write(tmp_path / "99.jfif", 99, format="JPEG")
    assert detect_signal(str(tmp_path)) == "image"
    assert len(load_images(str(tmp_path), 16)) == len(SUFFIXES) + 1
    assert not told


def test_hidden_files_and_broken_links_are_left_out_and_counted(tmp_path: Path, told: list[str]) -> None:
    for name in ("a.png", "b.png", ".ipynb_checkpoints/a-checkpoint.png", "@eaDir/a.png/thumb.jpg", "__MACOSX/a.png"):
        write(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"no picture")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "itself.png").symlink_to("itself.png")
    (tmp_path / "again.png").symlink_to("a.png")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "label").touch()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "turntable.gif", save_all=True, append_images=frames[1:])
    os.mkfifo(tmp_path / "pipe.png")
    assert load_images(str(tmp_path), 16).ids == ["a.png", "b.png"]
    (line,) = told
    assert line.startswith(f"{tmp_path}: 2 files are read; left out are 4 hidden, 2 broken link, ")
    for part in ("1 link to what is read already", "1 .txt", "1 without suffix", "1 animation", "1 no file"):
        assert part in line


def test_links_are_followed_and_read_once(tmp_path: Path, told: list[str]) -> None:
    elsewhere = tmp_path / "elsewhere"
    for seed in range(3):
        write(elsewhere / "cats" / f"{seed}.png", seed)
        write(elsewhere / "dogs" / "small" / f"{seed}.png", seed + 3)
    folder = tmp_path / "classes"
    folder.mkdir()
    (folder / "cats").symlink_to(elsewhere / "cats")
    (folder / "dogs").symlink_to(elsewhere / "dogs")
    (folder / "small").symlink_to(elsewhere / "dogs" / "small")
    (folder / "up").symlink_to("..")
    (elsewhere / "cats" / "round").symlink_to(folder)
    assert detect_signal(str(folder)) == "image"
    ids = load_images(str(folder), 16).ids
    assert ids == [f"{kind}/{seed}.png" for kind in ("cats", "dogs/small") for seed in range(3)]
    assert told == [f"{folder}: 6 files are read; left out are 3 link to what is read already"]


def test_the_larger_part_of_a_folder_is_read(tmp_path: Path, told: list[str]) -> None:
    write(tmp_path / "classes" / "cover.png")
    for seed in range(3):
        write(tmp_path / "classes" / "cats" / f"{seed}.png", seed)
        write(tmp_path / "drawn" / f"{seed}.png", seed)
    write(tmp_path / "drawn" / "preview" / "grid.png", size=40)
    assert load_images(str(tmp_path / "classes"), 16).ids == [f"cats/{seed}.png" for seed in range(3)]
    assert load_images(str(tmp_path / "drawn"), 16).ids == [f"{seed}.png" for seed in range(3)]
    assert told[0].endswith("left out are 1 above the folders of the others")
    assert told[1].endswith("left out are 1 in folders below")


def test_a_pattern_chooses_files(tmp_path: Path) -> None:
    for name in ("a/0.png", "a/1.jpg", "b/0.png", "b/c/0.png", "top.png"):
        write(tmp_path / name)
    for pattern, ids in {
        "*/*.png": ["a/0.png", "b/0.png"],
        "**/*.png": ["a/0.png", "b/0.png", "b/c/0.png", "top.png"],
        "[ab]/?.jpg": ["a/1.jpg"],
    }.items():
        source = f"{tmp_path}/{pattern}"
        assert detect_signal(source) == "image"
        assert load_images(source, 16).ids == ids
    with pytest.raises(UserError, match="no pictures here"):
        load_images(f"{tmp_path}/*.webp", 16)


def test_two_files_of_one_picture_are_one_design(tmp_path: Path) -> None:
    for name in ("a.png", "a.jpg", "b.png", "c/a.png"):
        write(tmp_path / name)
    assert load_images(str(tmp_path), 16).groups == ["a", "a", "b.png"]


def png(bits: int, kind: int, pixels: bytes, transparent: bytes) -> bytes:
    """A PNG of two pixels, by its specification: kind 0 is grey, 2 RGB."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 2, 1, bits, kind, 0, 0, 0)
    parts = (b"IHDR", header), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("bits", "kind", "pixels", "transparent", "second"),
    [
        (16, 0, struct.pack(">HH", 1000, 257 * 156), struct.pack(">H", 1000), 156),
        (8, 0, bytes([10, 156]), b"\0\x0a", 156),
        (4, 0, bytes([0x3C]), b"\0\x03", 0xCC),
        (2, 0, bytes([0b01100000]), b"\0\x01", 170),
        (1, 0, bytes([0b01000000]), b"\0\x00", 255),
        (1, 0, bytes([0b10000000]), b"\0\x01", 0),
        (8, 2, bytes([1, 2, 3, 156, 156, 156]), bytes([0, 1, 0, 2, 0, 3]), 156),
        (16, 2, struct.pack(">6H", 1000, 2000, 3000, 40000, 40000, 40000), struct.pack(">3H", 1000, 2000, 3000), 156),
    ],
)
def test_a_transparent_value_of_any_depth_is_white(
    tmp_path: Path, bits: int, kind: int, pixels: bytes, transparent: bytes, second: int
) -> None:
    (tmp_path / "a.png").write_bytes(png(bits, kind, pixels, transparent))
    for channels, ground in ((3, "white"), (3, "black"), (1, "white")):
        with open_image(tmp_path / "a.png") as image:
            values = np.asarray(to_mode(image, channels, ground)).reshape(2, channels)
        assert (values == [[255 if ground == "white" else 0], [second]]).all()
    with open_image(tmp_path / "a.png") as image:
        assert np.asarray(to_mode(image, 4))[0, :, 3].tolist() == [0, 255]


def test_large_pictures_are_laid_on_white_like_small_ones() -> None:
    pixels = noise(2100, 2100, 4)
    image = Image.fromarray(pixels)
    whole = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    np.testing.assert_array_equal(np.asarray(to_mode(image, 3)), np.asarray(whole))


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\0\0\xff\xff\xff",
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_damaged_exif_block_turns_nothing(tmp_path: Path, exif: bytes, suffix: str) -> None:
    Image.new("RGB", (16, 8), (200, 0, 0)).save(tmp_path / f"a.{suffix}", exif=exif)
    assert np.abs(load_images(str(tmp_path), (8, 16)).images.astype(int) - [200, 0, 0]).max() < 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_orientation_is_undone_as_pillow_does(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(8, 12, 3)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(load_images(str(tmp_path), upright.shape[:2]).images[0], upright)


def test_a_picture_with_too_many_pixels_is_refused_and_a_flag_admits_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    write(tmp_path / "data" / "a.png", size=40)
    fit = ["fit", "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), "--dry_run"]
    fit += ["--held_out_fraction", "0", "--test_fraction", "0"]
    for limit in ("1599", "700"):  # twice the limit is another error of Pillow's
        assert main([*fit, "--max_image_pixels", limit]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"a.png: more than {int(limit):,} pixels; remove it or raise --max_image_pixels" in error
    assert main([*fit, "--max_image_pixels", "1600"]) == 0
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_huge_jpeg_is_decoded_at_an_eighth(tmp_path: Path, orientation: int) -> None:
    ramp = np.linspace(0, 255, 3000)[:, None, None] * np.ones((1, 6000, 3))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    height, width = (32, 64) if orientation == 1 else (64, 32)
    with open_image(tmp_path / "a.jpg") as image:
        pixels = crop_and_resize(image, (height, width), 1)
        assert min(image.size) == 375  # of 3,000
    expected = (np.arange(32) + 0.5) / 32 * 255
    expected = expected[:, None] if orientation == 1 else expected[::-1]  # 6 was stored turned anticlockwise
    assert np.abs(pixels[..., 0] - expected).max() < 3


def test_masks_of_0_and_1_are_no_pictures(tmp_path: Path) -> None:
    masks = noise(4, 8, 8, 3) % 2
    np.save(tmp_path / "a.npy", masks)
    np.savez(tmp_path / "b.npz", images=masks)
    for row, mask in enumerate(masks):
        (tmp_path / "c").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / "c" / f"{row}.png")
    for name in ("a.npy", "b.npz", "c"):
        for size in (8, 4):  # in place, and resized
            with pytest.raises(UserError, match=r"no pixel is above 1 of 255.*multiply masks of 0 and 1 by 255"):
                load_images(str(tmp_path / name), size)
    np.save(tmp_path / "a.npy", masks * 255)
    assert load_images(str(tmp_path / "a.npy"), 8).images.max() == 255
    np.save(tmp_path / "a.npy", masks * 0)
    assert load_images(str(tmp_path / "a.npy"), 8).images.max() == 0  # black is black


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_one_picture_is_not_sixteen(tmp_path: Path, channels: int) -> None:
    np.save(tmp_path / "a.npy", noise(16, 16, channels))
    with pytest.raises(UserError, match=rf"may be one picture .* give \[1, 16, 16, {channels}\] or"):
        load_images(str(tmp_path / "a.npy"), 16)
    np.save(tmp_path / "a.npy", noise(1, 16, 16, channels))
    assert len(load_images(str(tmp_path / "a.npy"), 16)) == 1


def test_channels_first_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=noise(2, 3, 16, 16))
    with pytest.raises(UserError, match=r"channels first; transpose it by \(0, 2, 3, 1\)"):
        load_images(str(tmp_path / "a.npz"), 16)


def test_names_that_are_no_utf_8_are_written_readably(tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    for seed in range(2):
        Image.fromarray(noise(8, 8, 3, seed=seed)).save(folder / os.fsdecode(b"\xff%d.png" % seed), format="PNG")
    data = load_images(str(folder), 8)
    assert data.ids == ["\\xff0.png", "\\xff1.png"]
    assert data.name == f"{tmp_path}/caf\\xe9"
    assert len(data.fingerprint()) == 64
    (folder / "b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"b\.png: unreadable picture"):
        load_images(str(folder), 8)
