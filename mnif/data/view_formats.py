"""Folders of posed pictures: the layout of Scene Representation Networks, and ``transforms.json``."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from mnif.data.images import IMAGE_SUFFIXES, open_image
from mnif.utils.errors import UserError
from mnif.utils.json_files import read_object

SRN_MARKER = "intrinsics.txt"
TRANSFORMS_MARKERS = ("transforms.json", "transforms_train.json")
_FARTHEST = 1e30  # poses are float32, and distances square them
_LARGEST_TRANSFORMS = 64 << 20  # bytes
_ROTATION_TOLERANCE = 1e-3
_OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_OF_A_FRAME = ("fl_x", "fl_y", "cx", "cy", "camera_angle_x", *_DISTORTION)


@dataclass(frozen=True)
class PosedImages:
    """The views of one instance.

    Attributes:
        id: the folder's name below the source.
        paths: V picture files.
        poses: [V, 4, 4] float64 camera-to-world; the camera looks along -z, +y is up (OpenGL, Blender).
        intrinsics: [4] float64: fx, fy, cx, cy in pixels of the pictures as they are.
        size: height and width of the first picture.
        srn: whether it is in the layout of Scene Representation Networks.
    """

    id: str
    paths: list[Path]
    poses: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]
    srn: bool


def posed_images(source: Path, max_views: int | None) -> list[PosedImages]:
    """Reads the instances of a folder: the folder itself if it is one, otherwise its sub-folders.

    Args:
        source: the folder.
        max_views: takes the first so many views of each.

    Raises:
        UserError: there is no instance, a file is missing or damaged, or a pose is no rotation and place.
    """
    instances = []
    for folder, marker in instance_folders(source).items():
        id = folder.relative_to(source).as_posix() if folder != source else source.absolute().name
        read = _srn_instance if marker == SRN_MARKER else _transforms_instance
        instances.append(read(id, folder / marker, max_views))
    if not instances:
        raise UserError(f"{source}: no posed views here ({SRN_MARKER} with rgb/ and pose/, or transforms.json)")
    return instances


def instance_folders(source: Path) -> dict[Path, str]:
    """Finds the folders of instances and the file that marks each; deeper ones only if the upper ones are none."""
    for pattern in ("", "*/", "**/"):
        folders: dict[Path, str] = {}
        for marker in (SRN_MARKER, *TRANSFORMS_MARKERS):
            for path in sorted(source.glob(pattern + marker)):
                folders.setdefault(path.parent, marker)
        if folders:
            return dict(sorted(folders.items()))
    return {}


class Frame(msgspec.Struct):
    """A picture of a ``transforms.json``."""

    file_path: Annotated[str, Meta(min_length=1, max_length=4096, pattern="^[^\0]*$")]
    transform_matrix: Annotated[list[Annotated[list[float], Meta(max_length=4)]], Meta(max_length=4)]


class Transforms(msgspec.Struct):
    """What is looked at in a ``transforms.json``; a frame may have the camera's keys too."""

    frames: list[Frame]
    camera_model: str | None = None
    w: float | None = None
    h: float | None = None


def _srn_instance(id: str, marker: Path, max_views: int | None) -> PosedImages:
    """Reads ``rgb/*.png``, ``pose/*.txt`` (OpenCV's convention: +z forward, +y down) and ``intrinsics.txt``.

    The lines of the latter: focal length and centre; the grid's centre; scale; height and width; and, in some files,
    1 if the poses are world-to-camera.
    """
    folder = marker.parent
    paths = sorted(path for path in folder.glob("rgb/*") if path.suffix.lower() in IMAGE_SUFFIXES)[:max_views]
    if not paths:
        raise UserError(f"{folder / 'rgb'}: no pictures here ({', '.join(IMAGE_SUFFIXES)})")
    lines = [line.split() for line in _text(marker).splitlines()]
    try:
        focal, cx, cy = (float(number) for number in lines[0][:3])
        height, width = (float(number) for number in lines[3][:2])
        inverted = len(lines) > 4 and lines[4] == ["1"]
    except (ValueError, IndexError):
        raise UserError(f"{marker}: needs four lines: f cx cy 0; centre of the grid; scale; height width") from None
    poses = []
    for path in paths:
        pose_path = folder / "pose" / f"{path.stem}.txt"
        if not pose_path.is_file():
            raise UserError(f"{path}: its pose is missing; {pose_path} is needed")
        pose = checked_pose(_numbers(pose_path), str(pose_path))
        poses.append((np.linalg.inv(pose) if inverted else pose) @ _OPENCV_TO_OPENGL)
    size = _size(paths[0])
    intrinsics = _scaled(np.array([focal, focal, cx, cy]), (height, width), size, str(marker))
    return PosedImages(id, paths, np.stack(poses), intrinsics, size, srn=True)


def _transforms_instance(id: str, marker: Path, max_views: int | None) -> PosedImages:
    """Reads Blender's (``camera_angle_x``) or nerfstudio's (``fl_x fl_y cx cy w h``) ``transforms.json``."""
    content = read_object(marker, Transforms, largest=_LARGEST_TRANSFORMS)
    try:
        frames = [(f["file_path"], np.array(f["transform_matrix"], dtype=float)) for f in content["frames"]]
    except ValueError as error:
        raise UserError(f'{marker}: needs "frames" with "file_path" and "transform_matrix" ({error!r})') from None
    frames = frames[:max_views]
    if not frames:
        raise UserError(f"{marker}: has no frames")
    _check_pinhole(content, marker)
    paths = [_image_path(marker, name) for name, _ in frames]
    poses = [checked_pose(pose, f"{marker}: frame {name}") for name, pose in frames]
    size = _size(paths[0])
    try:
        height, width = float(content.get("h", size[0])), float(content.get("w", size[1]))
        intrinsics = _transforms_intrinsics(content, height, width)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise UserError(f'{marker}: needs "camera_angle_x" (radians) or "fl_x" (pixels), as numbers') from None
    intrinsics = _scaled(intrinsics, (height, width), size, str(marker))
    return PosedImages(id, paths, np.stack(poses), intrinsics, size, srn=False)


def _transforms_intrinsics(content: dict[str, Any], height: float, width: float) -> np.ndarray:
    def focal(axis: str, pixels: float, default: float | None) -> float:
        if f"fl_{axis}" in content:
            return float(content[f"fl_{axis}"])
        if f"camera_angle_{axis}" in content or default is None:
            return pixels / 2 / math.tan(float(content[f"camera_angle_{axis}"]) / 2)
        return default

    fx = focal("x", width, None)
    return np.array([fx, focal("y", height, fx), content.get("cx", width / 2), content.get("cy", height / 2)], float)


def _check_pinhole(content: dict[str, Any], marker: Path) -> None:
    model = content.get("camera_model", "OPENCV")
    bent = [name for name in _DISTORTION if content.get(name)]
    if model not in ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE") or bent:
        what = f"camera_model {model}" + (f" with {', '.join(bent)}" if bent else "")
        raise UserError(f"{marker}: {what}; only pinhole cameras can be used: undistort the pictures first")
    for frame in content["frames"]:
        if own := [name for name in _OF_A_FRAME if frame.get(name, content.get(name)) != content.get(name)]:
            raise UserError(
                f"{marker}: frame {frame['file_path']} has its own {own[0]}; one camera a folder is needed"
            )


def _image_path(marker: Path, name: str) -> Path:
    """Finds the image a frame names, with its suffix or without."""
    path = marker.parent / name
    for candidate in (path, *(path.with_name(path.name + suffix) for suffix in IMAGE_SUFFIXES)):
        if candidate.is_file():
            return candidate
    raise UserError(f"{marker}: the picture {name} is missing; put it at {path} or take its frame out")


def checked_pose(pose: np.ndarray, where: str) -> np.ndarray:
    """Returns a [4, 4] pose as it is, once it is checked.

    Raises:
        UserError: it is of another shape, not finite, or not a rotation and a place (tolerance 1e-3).
    """
    if pose.shape != (4, 4):
        raise UserError(f"{where}: the pose is {list(pose.shape)}; 4×4 numbers are needed")
    if not (np.abs(pose) < _FARTHEST).all():  # NaN is not
        raise UserError(f"{where}: the pose holds NaN or infinity; mend it or remove the view")
    rotation = pose[:3, :3]
    turned, determinant = np.abs(rotation @ rotation.T - np.eye(3)).max(), np.linalg.det(rotation)
    if turned > _ROTATION_TOLERANCE or determinant < 0:
        raise UserError(
            f"{where}: the pose is no rotation (R·Rᵀ is off by {turned:.2g}, determinant {determinant:.2g})"
        )
    if np.abs(pose[3] - [0, 0, 0, 1]).max() > _ROTATION_TOLERANCE:
        raise UserError(f"{where}: the pose's last row is {pose[3].tolist()}; 0 0 0 1 is needed")
    return pose


def _numbers(path: Path) -> np.ndarray:
    try:
        numbers = np.array(_text(path).split(), dtype=float)
    except ValueError as error:
        raise UserError(f"{path}: not a pose ({error})") from None
    if numbers.size != 16:
        raise UserError(f"{path}: {numbers.size} numbers; the 16 of a camera-to-world pose are needed")
    return numbers.reshape(4, 4)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file") from None


def _size(path: Path) -> tuple[int, int]:
    with open_image(path) as image:
        return image.height, image.width


def _scaled(intrinsics: np.ndarray, stated: tuple[float, float], size: tuple[int, int], where: str) -> np.ndarray:
    """Scales intrinsics for images of the stated height and width to images of another size."""
    if not np.isfinite(intrinsics).all() or intrinsics[:2].min() <= 0 or min(stated) <= 0:
        raise UserError(f"{where}: focal lengths and sizes must be finite and positive")
    y, x = size[0] / stated[0], size[1] / stated[1]
    return intrinsics * [x, y, x, y]
