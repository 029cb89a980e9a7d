"""Cameras as users have them: of each frame, in other conventions, around other points, under other names."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mnif.cli import main
from mnif.data import view_formats
from mnif.data.views import ViewData, default_bound, load_views, share_of_rays
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model
from mnif.signals.volume_rendering import camera_rays, turntable_poses
from mnif.utils.errors import UserError

FLIP = np.diag([1.0, -1.0, -1.0, 1.0])
POSES = np.concatenate([turntable_poses(4, 4.0, elevation).double().numpy() for elevation in (10.0, 40.0)])
WHOLE = {"fl_x": 80, "fl_y": 80, "cx": 32, "cy": 32, "w": 64, "h": 64}


def write(folder: Path, poses: np.ndarray = POSES, frames: list[dict[str, Any]] | None = None, **camera: Any) -> Path:
    """Pictures of 32×32, a frame for each pose; ``frames`` adds to each, ``camera`` to all."""
    folder.mkdir(parents=True, exist_ok=True)
    content = []
    for view, pose in enumerate(poses):
        Image.new("RGB", (32, 32), (20 * view, 100, 50)).save(folder / f"{view}.png")
        own = frames[view % len(frames)] if frames else {}
        content.append({"file_path": f"{view}.png", "transform_matrix": np.asarray(pose).tolist()} | own)
    camera = {key: value for key, value in camera.items() if value is not None}
    (folder / "transforms.json").write_text(json.dumps({"frames": content} | camera))
    return folder


def intrinsics(folder: Path, **options: Any) -> list[Any]:
    return load_views(str(folder), **options).intrinsics[0].tolist()


def test_a_frames_size_counts(tmp_path: Path) -> None:
    own = {"w": 64, "h": 64}
    write(tmp_path, frames=[own], fl_x=80, cx=32, cy=32)
    assert intrinsics(tmp_path) == [40, 40, 16, 16]  # of 32 pixels


def test_equal_cameras_of_frames_are_one(tmp_path: Path) -> None:
    write(tmp_path, frames=[WHOLE])
    assert intrinsics(tmp_path) == [40, 40, 16, 16]
    write(tmp_path, frames=[{"fl_x": 40}], camera_angle_x=2.5, camera_angle_y=2.5)
    x, y, *_ = intrinsics(tmp_path)
    assert x == 40  # the frame's own
    assert y == pytest.approx(16 / np.tan(1.25))


def test_every_frame_may_have_a_camera_of_its_own(tmp_path: Path) -> None:
    frames = [{"fl_x": 40 + view, "cx": 15 + view / 4, "cy": 16} for view in range(8)]
    write(tmp_path, frames=frames)
    data = load_views(str(tmp_path))
    assert data.intrinsics.shape == (1, 8, 4)
    assert data.intrinsics[0].tolist() == [[40 + view, 40 + view, 15 + view / 4, 16] for view in range(8)]
    half = load_views(str(tmp_path), 16).intrinsics
    np.testing.assert_allclose(half, data.intrinsics / 2)
    signal = RadianceField(32)
    batch = {name: torch.from_numpy(array) for name, array in data.arrays().items()}
    origins, directions = signal.observe_views(batch, [5, 2]).query.rays()
    for place, view in enumerate((5, 2)):
        pose, camera = (torch.from_numpy(array[0, view]) for array in (data.poses, data.intrinsics))
        expected = camera_rays(pose, camera, 32, 32)
        torch.testing.assert_close(origins[0, place], expected[0])
        torch.testing.assert_close(directions[0, place], expected[1])
    observation = signal.subsample(signal.observe(batch), torch.Generator().manual_seed(0))
    rays = signal.observe(batch).query.rays()[1].flatten(1, 3)
    assert all((rays[0] - ray).norm(dim=-1).min() < 1e-5 for ray in observation.query.directions[0, :50])


def test_a_fit_learns_from_cameras_of_frames_in_any_convention(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / "data" / name, POSES @ FLIP, frames=[{"fl_x": 40 + view} for view in range(8)])
    fit = ["fit", "--data", str(tmp_path / "data"), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"]
    fit += ["--held_out_fraction", "0", "--test_fraction", "0", "--width", "8", "--num_bases", "2", "--cells", "1"]
    fit += ["--depth", "1", "--latent_dim", "4", "--samples_per_ray", "4", "--rays_per_step", "8", "--compile", "off"]
    assert main([*fit, "--refinement_steps", "0"]) == 2
    assert not (tmp_path / "run").exists()
    assert main([*fit, "--refinement_steps", "0", "--camera_convention", "opencv", "--center_views"]) == 0
    signal = signal_of_model(load_component(MNIFModel, tmp_path / "run" / "model", "decoder"))
    assert isinstance(signal, RadianceField)
    assert (signal.camera_convention, signal.center_views) == ("opencv", True)
    assert len(signal.intrinsics) == 4
    data = signal.load_like(str(tmp_path / "data"))  # which remembers both
    assert isinstance(data, ViewData)
    np.testing.assert_allclose(data.poses[0], POSES, atol=1e-5)


@pytest.mark.parametrize(
    "camera",
    [
        {"camera_angle_y": 2 * np.arctan(16 / 40)},
        {"fl_y": 40},
        {"fl_x": 40, "camera_angle_x": 2 * np.arctan(16 / 40)},
        {"fl_x": 40, "camera_model": "SIMPLE_RADIAL", "k1": 0, "distortion_params": [0, 0.0], "is_fisheye": False},
        {"fl_x": 40, "k1": None, "applied_scale": 2, "aabb_scale": 16, "camera_id": 3, "ply_file_path": "x.ply"},
    ],
)
def test_what_a_camera_may_be_called(tmp_path: Path, camera: dict[str, Any]) -> None:
    write(tmp_path, **camera)
    np.testing.assert_allclose(intrinsics(tmp_path), [40, 40, 16, 16], rtol=1e-6)


@pytest.mark.parametrize("of_a_frame", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("is_fisheye", True),
        ("fisheye", 1),
        ("equirectangular", True),
        ("orthographic", True),
        ("camera_model", "OPENCV_FISHEYE"),
        ("camera_model", "EQUIRECTANGULAR"),
        ("camera_model", 3),
        ("k1", 0.1),
        ("p2", -0.1),
        ("k6", "0.1"),
        ("distortion_params", [0, 0.1]),
        ("shift_x", 0.2),
        ("skew", 0.1),
        ("fx", 40),
        ("K", [[40, 0, 16], [0, 40, 16], [0, 0, 1]]),
        ("intrinsics", [40, 40, 16, 16]),
        ("fov", 40),
        ("focal_length", 35),
        ("fl_x", "40"),
        ("fl_y", True),
        ("cx", [16]),
        ("w", 10**400),
        ("h", -32),
        ("camera_angle_x", 40),
        ("camera_angle_y", 0),
    ],
)
def test_what_changes_a_camera_and_is_not_used_is_refused_by_name(
    tmp_path: Path, of_a_frame: bool, key: str, value: Any
) -> None:
    camera = {"fl_x": 40} | ({} if of_a_frame else {key: value})
    write(tmp_path, frames=[{}, {key: value}] if of_a_frame else None, **camera)
    place = rf"(frame {'1' if of_a_frame else '0'}\.png: |{key}: )"  # the latter where the type itself is wrong
    with pytest.raises(UserError, match=rf"transforms\.json: {place}") as error:
        load_views(str(tmp_path))
    assert key in str(error.value) or "focal lengths and sizes" in str(error.value)


def test_other_keys_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(view_formats, "tell", lines.append)
    write(tmp_path, frames=[{"time": 0.5, "sharpness": 3}], fl_x=40, exposure=2, ply_file_path="x.ply")
    load_views(str(tmp_path))
    assert lines == ["transforms.json: not used of it are exposure, ply_file_path, time"]


@pytest.mark.parametrize(
    ("camera", "match"),
    [
        ({"fl_x": 80, "cx": 50, "cy": 40}, r'the centre 50, 40 of pictures of 32×32 is not in the middle.*give "w"'),
        ({"fl_x": 80, "cx": 32, "cy": 32}, r'centre 32, 32 .*were they resized\? give "w" and "h"'),
        ({"fl_x": 40, "cx": 0.5, "cy": 0.5}, "is not in the middle"),
        ({"fl_x": 80, "cx": 90, "cy": 32, "w": 64, "h": 64}, "is outside or in a corner"),
        ({"fl_x": 80, "w": 64, "h": 48}, "64×48 has not the aspect of pictures of 32×32"),
        ({"fl_x": 1.2}, r"a focal length of 1\.2 pixels is a view of 171°; is it in pixels\?"),
        ({"fl_x": 40, "camera_angle_x": 0.3}, r'"fl_x" is 40, but "camera_angle_x" makes it 105'),
        ({}, 'needs "camera_angle_x"'),
    ],
)
def test_cameras_of_pictures_of_another_size_are_refused(tmp_path: Path, camera: dict[str, Any], match: str) -> None:
    write(tmp_path, **camera)
    with pytest.raises(UserError, match=match):
        load_views(str(tmp_path))


def test_a_stated_size_scales_and_may_lie_off_the_middle(tmp_path: Path) -> None:
    write(tmp_path, fl_x=160, cx=96, cy=60, w=128, h=128)
    assert intrinsics(tmp_path) == [40, 40, 24, 15]


def moved(poses: np.ndarray, by: tuple[float, float, float] = (0, 0, 0), scale: float = 1) -> np.ndarray:
    poses = poses.copy()
    poses[:, :3, 3] = poses[:, :3, 3] * scale + by
    return poses


@pytest.mark.parametrize(
    ("poses", "options", "cause"),
    [
        (POSES @ FLIP, {"camera_convention": "opencv"}, "the axes look other: try --camera_convention opencv"),
        (
            np.linalg.inv(POSES),
            {"camera_convention": "opengl-world-to-camera"},
            "the poses look inverted: try --camera_convention opengl-world-to-camera",
        ),
        (
            np.linalg.inv(POSES @ FLIP),
            {"camera_convention": "opencv-world-to-camera"},
            "the poses look inverted: try --camera_convention opencv-world-to-camera",
        ),
        (moved(POSES, (30, 5, -9)), {"center_views": True}, "they look at another point: try --center_views"),
        (
            moved(POSES, scale=100),
            {"near": 220, "far": 580},
            "the cameras stand 400 away, so it may be of another scale: give --bound, --near and --far",
        ),
    ],
)
def test_cameras_that_see_nothing_stop_with_the_likely_cause(
    tmp_path: Path, poses: np.ndarray, options: dict[str, Any], cause: str
) -> None:
    write(tmp_path, poses, camera_angle_x=0.7)
    with pytest.raises(UserError, match=r"of the rays of .* meet the cube of half edge") as error:
        load_views(str(tmp_path))
    assert str(error.value).endswith(cause)
    data = load_views(str(tmp_path), **options)
    scale = 100 if "near" in options else 1
    np.testing.assert_allclose(data.poses[0], moved(POSES, scale=scale), atol=1e-3)


def test_one_object_whose_cameras_look_away_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", camera_angle_x=0.7)
    write(tmp_path / "b", POSES @ FLIP, camera_angle_x=0.7)
    with pytest.raises(UserError, match=r"0\.0% of the rays of b meet"):
        load_views(str(tmp_path))


def test_the_share_of_rays_is_that_of_a_picture() -> None:
    # From a distance of 4, the cube [-1, 1]³ seen face on covers the square of its front face, 3 away.
    pose = turntable_poses(1, 4.0, 0.0).double().numpy()
    share = share_of_rays(pose, np.array([90.0, 90, 45, 45]), (90, 90), 0.05, 9, 1)
    assert share == pytest.approx((2 / 3) ** 2, abs=0.12)  # 81 rays
    assert share_of_rays(pose, np.array([90.0, 90, 45, 45]), (90, 90), 6, 9, 1) == 0
    assert default_bound(pose[None], 4 - 3**0.5, 4 + 3**0.5) == pytest.approx(1)


def test_cameras_that_look_one_way_have_no_centre(tmp_path: Path) -> None:
    poses = np.tile(np.eye(4), (3, 1, 1))
    poses[:, 0, 3] = [0, 0.1, 0.2]
    poses[:, 2, 3] = 3
    write(tmp_path, poses, camera_angle_x=0.7)
    assert len(load_views(str(tmp_path))) == 1
    with pytest.raises(UserError, match="look one way, at no common point; leave --center_views out"):
        load_views(str(tmp_path), center_views=True)


def test_paths_as_windows_writes_them(tmp_path: Path) -> None:
    write(tmp_path, camera_angle_x=0.7)
    content = json.loads((tmp_path / "transforms.json").read_text())
    (tmp_path / "train").mkdir()
    for view, frame in enumerate(content["frames"]):
        (tmp_path / f"{view}.png").rename(tmp_path / "train" / f"{view}.png")
        frame["file_path"] = f".\\train\\{view}"
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    assert load_views(str(tmp_path)).images.shape[:2] == (1, 8)


def srn(
    folder: Path, tail: str = "", poses: np.ndarray = POSES @ FLIP, centre: str = "0. 0. 0.", first: str = "0."
) -> Path:
    (folder / "rgb").mkdir(parents=True, exist_ok=True)
    (folder / "pose").mkdir(exist_ok=True)
    (folder / "intrinsics.txt").write_text(f"40. 16. 16. {first}\n{centre}\n1.\n32 32\n{tail}")
    for view, pose in enumerate(poses):
        Image.new("RGB", (32, 32), (20 * view, 100, 50)).save(folder / "rgb" / f"{view:06d}.png")
        (folder / "pose" / f"{view:06d}.txt").write_text(" ".join(map(str, pose.ravel())))
    return folder


@pytest.mark.parametrize(
    ("tail", "inverted"), [("", False), ("0\n", False), ("0.0", False), ("1\n", True), ("1.0\n", True)]
)
def test_the_flag_of_srn_is_a_number(tmp_path: Path, tail: str, inverted: bool) -> None:
    poses = POSES @ FLIP
    srn(tmp_path, tail, np.linalg.inv(poses) if inverted else poses)
    np.testing.assert_allclose(load_views(str(tmp_path)).poses[0], POSES, atol=1e-5)


def test_what_srn_files_say_is_used_or_refused(tmp_path: Path) -> None:
    srn(tmp_path / "a", poses=moved(POSES, (3, 4, 5)) @ FLIP, centre="3 4 5")
    np.testing.assert_allclose(load_views(str(tmp_path / "a")).poses[0], POSES, atol=1e-5)
    for tail, first, match in (
        ("true\n", "0.", "needs four lines"),
        ("2\n", "0.", "only 0 or 1 may follow"),
        ("1\n7\n", "0.", "only 0 or 1 may follow"),
        ("", "0.3", r"0\.3 is the fourth number of the first line"),
    ):
        srn(tmp_path / "b", tail, first=first)
        with pytest.raises(UserError, match=match):
            load_views(str(tmp_path / "b"))
    srn(tmp_path / "c", centre="0 0")
    with pytest.raises(UserError, match="the second line is the centre"):
        load_views(str(tmp_path / "c"))
    srn(tmp_path / "d", poses=POSES)
    with pytest.raises(UserError, match=r"try --camera_convention opengl$"):
        load_views(str(tmp_path / "d"))
    assert len(load_views(str(tmp_path / "d"), camera_convention="opengl")) == 1


def test_hidden_folders_and_what_lies_in_an_object_are_no_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "cars"
    for name in ("a", "deep/b", ".ipynb_checkpoints/a", "a/copy"):
        srn(source / name)
    srn(tmp_path / "elsewhere")
    (source / "c").symlink_to(tmp_path / "elsewhere")
    (source / "a" / "rgb" / "._000000.png").write_bytes(b"no picture")
    lines: list[str] = []
    monkeypatch.setattr(view_formats, "tell", lines.append)
    assert load_views(str(source)).ids == ["a", "c", "deep/b"]
    assert lines == [f"{source}: 3 objects are read; left out are 1 hidden"]


def test_poses_without_a_picture_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(view_formats, "tell", lines.append)
    srn(tmp_path)
    (tmp_path / "rgb" / "000001.png").unlink()
    assert load_views(str(tmp_path), max_views=2).poses.shape[:2] == (1, 2)
    assert lines == [f"{tmp_path}: 1 of its poses have no picture, such as 000001; they are not used"]


def test_other_files_of_cameras_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(view_formats, "tell", lines.append)
    write(tmp_path, camera_angle_x=0.7)
    content = (tmp_path / "transforms.json").read_text()
    for name in ("transforms_train.json", "transforms_test.json"):
        (tmp_path / name).write_text(content.replace("0.7", "0.9"))
    assert intrinsics(tmp_path)[0] == pytest.approx(16 / np.tan(0.35))
    (line,) = lines
    assert line.startswith(f"{tmp_path}: 1 objects are read; left out are 1 transforms_t")


def test_a_comparison_of_pictures_does_not_ask_what_cameras_see(tmp_path: Path) -> None:
    write(tmp_path, POSES @ FLIP, camera_angle_x=0.7)
    assert len(load_views(str(tmp_path), bound=np.inf)) == 1


def test_a_damaged_file_of_cameras_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, camera_angle_x=0.7)
    path = tmp_path / "transforms.json"
    good = json.loads(path.read_text())
    for content in ([], None, 3, "x", {}, {"frames": 3}, {"frames": ["x"]}, {"frames": {"a": 1}}, {"frames": [{}]}):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"transforms\.json: .*(frames|Expected `object`)"):
            load_views(str(tmp_path))
    for matrix in ("x", [[1, 2], [3]], [[None] * 4] * 4, np.zeros((4, 4)).tolist(), [[10**400] * 4] * 4):
        good["frames"][1]["transform_matrix"] = matrix
        path.write_text(json.dumps(good))
        with pytest.raises(UserError, match=r"transforms\.json"):
            load_views(str(tmp_path))
