import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mnif.data.views import load_views
from mnif.utils.errors import UserError

OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def looking_at_origin(place: tuple[float, float, float]) -> np.ndarray:
    """[4, 4] camera-to-world in OpenGL's convention: -z of the camera points at the origin, z of the world is up."""
    backward = np.array(place) / np.linalg.norm(place)
    right = np.cross([0, 0, 1], backward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3] = np.stack([right, np.cross(backward, right), backward, place], axis=1)
    return pose


POSES = [looking_at_origin(place) for place in ((1.0, 0.3, 0.8), (-0.9, 0.9, 0.2), (0.1, -1.2, 0.5))]
POINT = np.array([0.1, -0.15, 0.2])


def picture(pose: np.ndarray, focal: float, height: int, width: int, cx: float, cy: float) -> np.ndarray:
    """A white picture in which the pixel that POINT falls on is red, by projection with the world-to-camera matrix."""
    x, y, z = (np.linalg.inv(pose) @ [*POINT, 1])[:3]
    column, row = cx + focal * x / -z, cy - focal * y / -z
    pixels = np.full((height, width, 3), 255, dtype=np.uint8)
    pixels[int(row), int(column)] = (255, 0, 0)
    return pixels


def write_srn(folder: Path, poses: list[np.ndarray] = POSES, world_to_camera: bool = False) -> None:
    (folder / "rgb").mkdir(parents=True)
    (folder / "pose").mkdir()
    tail = "1\n" if world_to_camera else ""
    (folder / "intrinsics.txt").write_text(f"131.25 64. 64. 0.\n0. 0. 0.\n1.\n128 128\n{tail}")
    for view, pose in enumerate(poses):
        Image.fromarray(picture(pose, 131.25, 128, 128, 64, 64)).save(folder / "rgb" / f"{view:06d}.png")
        opencv = pose @ OPENGL_TO_OPENCV
        numbers = np.linalg.inv(opencv) if world_to_camera else opencv
        (folder / "pose" / f"{view:06d}.txt").write_text(" ".join(f"{number:.9f}" for number in numbers.ravel()))


def write_transforms(folder: Path, name: str = "transforms.json", **content: Any) -> None:
    """100 × 80 pictures; ``content`` adds to frames and camera, or replaces them."""
    (folder / "train").mkdir(parents=True)
    frames = []
    for view, pose in enumerate(POSES):
        Image.fromarray(picture(pose, 90, 80, 100, 50, 40)).save(folder / "train" / f"r_{view}.png")
        frames.append({"file_path": f"./train/r_{view}", "transform_matrix": pose.tolist()})
    camera = {"camera_angle_x": 2 * np.arctan(100 / 2 / 90)}
    (folder / name).write_text(json.dumps({"frames": frames} | camera | content))


def assert_point_is_seen(images: np.ndarray, poses: np.ndarray, intrinsics: np.ndarray) -> None:
    """The reddest pixel of every view is the one through whose ray POINT lies."""
    fx, fy, cx, cy = intrinsics
    for image, pose in zip(images, poses, strict=True):
        row, column = np.unravel_index(image[..., 1].argmin(), image.shape[:2])
        assert image[row, column, 1] < 255
        ray = pose[:3, :3] @ [(column + 0.5 - cx) / fx, -(row + 0.5 - cy) / fy, -1]
        towards = POINT - pose[:3, 3]
        cosine = ray @ towards / np.linalg.norm(ray) / np.linalg.norm(towards)
        assert np.arccos(cosine) < 1 / min(fx, fy)  # a pixel's angle


@pytest.mark.parametrize("world_to_camera", [False, True])
def test_srn_cameras_see_the_point(tmp_path: Path, world_to_camera: bool) -> None:
    for name in ("car_b", "car_a"):
        write_srn(tmp_path / "cars" / name, world_to_camera=world_to_camera)
    data = load_views(str(tmp_path / "cars"))
    assert (data.ids, data.groups) == (["car_a", "car_b"], ["car_a", "car_b"])
    assert data.images.shape == (2, 3, 128, 128, 3)
    assert (data.near, data.far) == (0.8, 1.8)
    assert (data.poses.dtype, data.intrinsics.dtype) == (np.float32, np.float32)
    np.testing.assert_allclose(data.poses[1], POSES, atol=1e-6)
    assert data.intrinsics[0].tolist() == [131.25, 131.25, 64, 64]
    assert_point_is_seen(data.images[0], data.poses[0], data.intrinsics[0])


def test_srn_at_another_size(tmp_path: Path) -> None:
    write_srn(tmp_path / "car")
    full = load_views(str(tmp_path / "car"))
    data = load_views(str(tmp_path / "car"), resolution=32)
    assert data.ids == ["car"]
    assert data.intrinsics[0].tolist() == [131.25 / 4, 131.25 / 4, 16, 16]
    means = full.images.reshape(1, 3, 32, 4, 32, 4, 3).mean(axis=(3, 5))
    assert np.abs(data.images - means).max() <= 0.51
    assert_point_is_seen(data.images[0], data.poses[0], data.intrinsics[0])
    assert len(load_views(str(tmp_path / "car"), max_views=2).poses[0]) == 2


def test_srn_bounds_of_farther_cameras(tmp_path: Path) -> None:
    write_srn(tmp_path / "chair", [looking_at_origin((2.0, 0, 0)), looking_at_origin((0, -1.2, 1.6))])
    data = load_views(str(tmp_path / "chair"))
    assert (data.near, data.far) == pytest.approx((1.25, 2.75))
    data = load_views(str(tmp_path / "chair"), near=0.5, far=4)
    assert (data.near, data.far) == (0.5, 4)


@pytest.mark.parametrize("size", [None, 40, (20, 50), (7, 9)])
def test_blender_cameras_see_the_point(tmp_path: Path, size: Any) -> None:
    write_transforms(tmp_path / "lego", "transforms_train.json")
    data = load_views(str(tmp_path / "lego"), resolution=size)
    assert data.ids == ["lego"]
    assert_point_is_seen(data.images[0], data.poses[0], data.intrinsics[0])
    distances = [np.linalg.norm(pose[:3, 3]) for pose in POSES]
    assert data.near == 0.05  # nearer than √3 to the origin
    assert data.far == pytest.approx(max(distances) + np.sqrt(3))
    expected = {
        None: [90, 90, 50, 40],
        40: [45, 45, 20, 20],
        (20, 50): [45, 45, 25, 10],
        (7, 9): [8.1, 90 * 7 / 78, 4.5, 3.5],  # cut to 100 × 78, so not quite evenly scaled
    }
    np.testing.assert_allclose(data.intrinsics[0], expected[size], rtol=1e-6)


def test_nerfstudio_intrinsics_are_of_the_stated_size(tmp_path: Path) -> None:
    camera = {"fl_x": 180, "fl_y": 180, "cx": 100, "cy": 80, "w": 200, "h": 160, "camera_model": "OPENCV", "k1": 0.0}
    for name in ("a", "b"):
        write_transforms(tmp_path / "scenes" / name, **camera)
    data = load_views(str(tmp_path / "scenes"))
    assert data.ids == ["a", "b"]
    np.testing.assert_allclose(data.intrinsics, [[90, 90, 50, 40]] * 2)
    assert_point_is_seen(data.images[1], data.poses[1], data.intrinsics[1])


def test_transparency_lies_on_the_background(tmp_path: Path) -> None:
    write_transforms(tmp_path / "a")
    for view in range(3):
        Image.new("RGBA", (100, 80), (0, 255, 0, 0)).save(tmp_path / "a" / "train" / f"r_{view}.png")
    assert (load_views(str(tmp_path / "a")).images == 255).all()
    assert (load_views(str(tmp_path / "a"), background="black").images == 0).all()


def test_over_the_limit_views_are_memory_mapped(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_srn(tmp_path / "car")
    in_memory = load_views(str(tmp_path / "car"))
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "0")
    data = load_views(str(tmp_path / "car"))
    assert isinstance(data.images, np.memmap)
    assert data.fingerprint() == in_memory.fingerprint()
    assert len(list(cache.iterdir())) == 1
    one = data.rows(np.array([True]))
    assert (one.ids, one.near) == (["car"], data.near)
    np.testing.assert_array_equal(one.images[0], data.images[0])


def test_bad_srn_files_name_themselves(tmp_path: Path) -> None:
    source = tmp_path / "cars"
    write_srn(source / "a")
    write_srn(source / "b", POSES[:2])

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            load_views(str(source), **options)

    refused(r"a has 3 views, b 2; take as many of each with --max_views 2")
    assert load_views(str(source), max_views=2).images.shape[:2] == (2, 2)
    refused("max_views 0", max_views=0)
    refused("resolution 0", resolution=0, max_views=2)
    refused("near 3 and --far", near=3, far=2, max_views=2)
    pose = source / "b" / "pose" / "000001.txt"
    good = pose.read_text()
    for content, message in (
        (" ".join(["2", *good.split()[1:]]), "is no rotation"),
        (" ".join(str(x) for x in np.diag([1, 1, -1, 1]).ravel()), r"is no rotation .*determinant -1"),
        (" ".join(["nan", *good.split()[1:]]), "holds NaN"),
        (good.rsplit(" ", 1)[0], "15 numbers"),
        (good.rsplit(" ", 1)[0] + " 2", "last row is"),
        (good.replace("1.0", "one"), "not a pose"),
    ):
        pose.write_text(content)
        refused(rf"b/pose/000001\.txt: .*{message}", max_views=2)
    pose.unlink()
    refused(r"b/rgb/000001\.png: its pose is missing", max_views=2)
    pose.write_text(good)
    intrinsics = source / "b" / "intrinsics.txt"
    intrinsics.write_text("131.25 64. 64. 0.\n")
    refused(r"b/intrinsics\.txt: needs four lines", max_views=2)
    intrinsics.write_text("-1 64. 64. 0.\n0. 0. 0.\n1.\n128 128\n")
    refused(r"b/intrinsics\.txt: focal lengths", max_views=2)
    intrinsics.write_text("131.25 64. 64. 0.\n0. 0. 0.\n1.\n128 128\n")
    Image.new("RGB", (64, 128)).save(source / "b" / "rgb" / "000001.png")
    refused(r"b/rgb/000001\.png is 64×128 where the first is 128×128", max_views=2)
    for path in (source / "b" / "rgb").iterdir():
        path.unlink()
    refused(r"b/rgb: no pictures here", max_views=2)


def test_bad_transforms_name_themselves(tmp_path: Path) -> None:
    def refused(match: str, drop: str = "", **content: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        write_transforms(folder, **content)
        path = folder / "transforms.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != drop}))
        with pytest.raises(UserError, match=rf"transforms\.json.*{match}"):
            load_views(str(folder))

    matrix = POSES[0].tolist()
    refused('needs "camera_angle_x"', drop="camera_angle_x")
    refused('"camera_angle_x" is no finite number', camera_angle_x="wide")
    refused('"camera_angle_x" is 0; radians', camera_angle_x=0)
    refused('needs "frames"', drop="frames")
    refused('needs "frames"', frames=[{"file_path": "a"}])
    refused("has no frames", frames=[])
    refused(r"the picture \./train/r_9 is missing", frames=[{"file_path": "./train/r_9", "transform_matrix": matrix}])
    refused("frame train/r_0: the pose is", frames=[{"file_path": "train/r_0", "transform_matrix": matrix[:3]}])
    own = {"file_path": "train/r_0", "transform_matrix": matrix, "fl_x": 3}
    refused(r"frame train/r_0: a focal length of 3 pixels is a view of 173°", frames=[own])
    refused("camera_model OPENCV with k1; only pinhole", k1=0.1)
    refused("camera_model OPENCV_FISHEYE; only pinhole", camera_model="OPENCV_FISHEYE")
    refused("focal lengths and sizes", fl_x=-3, drop="camera_angle_x")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "transforms.json").write_text("{")
    with pytest.raises(UserError, match="not a JSON file"):
        load_views(str(tmp_path / "x"))


def test_bad_sources_name_themselves(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no posed views here"):
        load_views(str(tmp_path))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_views("nowhere")
    with pytest.raises(UserError, match="drawn on white"):
        load_views("furniture-views", background="black")
