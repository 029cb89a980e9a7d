"""Folders of posed pictures: the layout of Scene Representation Networks, and ``transforms.json``."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from mnif.data.images import IMAGE_SUFFIXES
from mnif.data.source import file_id, visible_files
from mnif.utils.errors import UserError
from mnif.utils.json_files import read_object
from mnif.utils.pixels import open_image
from mnif.utils.process import tell

SRN_MARKER = "intrinsics.txt"
TRANSFORMS_MARKERS = ("transforms.json", "transforms_train.json")
CameraConvention = Literal["auto", "opengl", "opencv", "opengl-world-to-camera", "opencv-world-to-camera"]
OPENCV_TO_OPENGL = np.diag([1.0, -1.0, -1.0, 1.0])
_FARTHEST = 1e30  # poses are float32, and distances square them
_LARGEST_TRANSFORMS = 64 << 20  # bytes
_ROTATION_TOLERANCE = 1e-3
_PINHOLES = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "FULL_OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
_USED = ("fl_x", "fl_y", "cx", "cy", "camera_angle_x", "camera_angle_y", "w", "h", "camera_model")
_BENT = re.compile(
    r"[kps]\d|.*(distort|fisheye|equirect|ortho(?!n)|panoram|spheric|cylindric|shift|skew|rolling).*", re.I
)
_OTHER_NAMES = re.compile(r"k|f|fx|fy|foc.*|fov.*|.*intrinsic.*|principal.*|width|height|image_(width|height)", re.I)
_NO_CAMERA = re.compile(
    r"(frames|file_path|transform_matrix|rotation|sharpness|aabb.*|scale|offset|applied_.*|.*_?id)$"
)
_MIDDLE = (0.3, 0.7)  # of a picture, where its centre lies when no size says that it was cut or shrunk
_WIDEST = 170.0  # degrees of a field of view; more is a focal length that is not in pixels
_SAME_FOCAL, _SAME_ASPECT = 0.01, 0.02


@dataclass(frozen=True)
class PosedImages:
    """The views of one instance.

    Attributes:
        id: the folder's name below the source.
        paths: V picture files.
        poses: [V, 4, 4] float64 camera-to-world; the camera looks along -z, +y is up (OpenGL, Blender).
        intrinsics: [V, 4] float64: fx, fy, cx, cy in pixels of the pictures as they are.
        size: height and width of the first picture.
        srn: whether it is in the layout of Scene Representation Networks.
        convention: of the poses as the files have them.
    """

    id: str
    paths: list[Path]
    poses: np.ndarray
    intrinsics: np.ndarray
    size: tuple[int, int]
    srn: bool
    convention: str


def posed_images(
    source: Path, max_views: int | None, convention: CameraConvention = "auto", centre: bool = False
) -> list[PosedImages]:
    """Reads the instances of a folder: the folder itself if it is one, otherwise the folders below it that are.

    Args:
        source: the folder.
        max_views: takes the first so many views of each.
        convention: of the poses in the files; auto: the format's own.
        centre: moves the point that an instance's cameras look at to the origin.

    Raises:
        UserError: there is no instance, a file is missing or damaged, a camera is no pinhole, or a pose is no rotation
            and place.
    """
    instances = []
    for folder, marker in instance_folders(source).items():
        id = file_id(folder, source) if folder != source else file_id(folder.absolute(), folder.absolute().parent)
        read = _srn_instance if marker == SRN_MARKER else _transforms_instance
        instance = read(id, folder / marker, max_views, convention)
        if centre:
            instance.poses[:, :3, 3] -= point_looked_at(instance.poses, str(folder / marker))
        instances.append(instance)
    if not instances:
        raise UserError(f"{source}: no posed views here ({SRN_MARKER} with rgb/ and pose/, or transforms.json)")
    return instances


def instance_folders(source: Path) -> dict[Path, str]:
    """Finds the folders of instances and the file that marks each; what lies within an instance is not searched.

    One line tells what was left out, and of other files of cameras (``transforms_test.json``).
    """
    markers, left_out = (SRN_MARKER, *TRANSFORMS_MARKERS), Counter[str]()
    files = [path for path in visible_files(source, left_out, stop_at=markers) if path.name in markers]
    files.sort(key=lambda path: markers.index(path.name), reverse=True)
    folders = {path.parent: path.name for path in files}  # of several, the first marker stays
    for folder, marker in folders.items():
        if marker != SRN_MARKER:
            left_out.update(path.name for path in folder.glob("transforms*.json") if path.name != marker)
    if folders and left_out:
        counted = ", ".join(f"{count} {why}" for why, count in left_out.most_common())
        tell(f"{source}: {len(folders)} objects are read; left out are {counted}")
    return dict(sorted(folders.items()))


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


def point_looked_at(poses: np.ndarray, where: str) -> np.ndarray:
    """Finds the point [3] nearest to all axes along which cameras [V, 4, 4] look, in the sense of least squares.

    Raises:
        UserError: the axes are nearly parallel.
    """
    axes, places = poses[:, :3, 2], poses[:, :3, 3]
    across = np.eye(3) - axes[:, :, None] * axes[:, None]  # what is left of a vector across the axis
    total = across.sum(axis=0)
    if np.linalg.eigvalsh(total)[0] < 1e-3 * len(poses):
        raise UserError(f"{where}: the cameras look one way, at no common point; leave --center_views out")
    return np.linalg.solve(total, np.einsum("vij,vj->i", across, places))


def opengl_poses(poses: np.ndarray, convention: str) -> np.ndarray:
    """Turns poses [V, 4, 4] of a convention into camera-to-world ones of OpenGL."""
    poses = np.linalg.inv(poses) if convention.endswith("world-to-camera") else poses
    return poses @ OPENCV_TO_OPENGL if convention.startswith("opencv") else poses


def _srn_instance(id: str, marker: Path, max_views: int | None, convention: CameraConvention) -> PosedImages:
    """Reads ``rgb/*.png``, ``pose/*.txt`` (OpenCV's convention: +z forward, +y down) and ``intrinsics.txt``.

    The lines of the latter: focal length and centre; the grid's centre, which becomes the origin; scale; height and
    width; and, in some files, 1 if the poses are world-to-camera.
    """
    folder = marker.parent
    pictures = visible_files(folder / "rgb", Counter()) if (folder / "rgb").is_dir() else []
    paths = [path for path in pictures if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise UserError(f"{folder / 'rgb'}: no pictures here ({', '.join(IMAGE_SUFFIXES)})")
    unseen = {path.stem for path in (folder / "pose").glob("*.txt")} - {path.stem for path in paths}
    if unseen:
        tell(f"{folder}: {len(unseen)} of its poses have no picture, such as {min(unseen)}; they are not used")
    paths = paths[:max_views]
    intrinsics, centre, stated, inverted = _srn_intrinsics(marker)
    if convention == "auto":
        convention = "opencv-world-to-camera" if inverted else "opencv"
    poses = []
    for path in paths:
        pose_path = folder / "pose" / f"{path.stem}.txt"
        if not pose_path.is_file():
            raise UserError(f"{path}: its pose is missing; {pose_path} is needed")
        poses.append(checked_pose(_numbers(pose_path), str(pose_path)))
    opengl = opengl_poses(np.stack(poses), convention)
    opengl[:, :3, 3] -= centre
    size = _size(paths[0])
    scaled = _scaled(np.array(intrinsics), stated, size, str(marker))
    return PosedImages(id, paths, opengl, np.tile(scaled, (len(paths), 1)), size, True, convention)


def _srn_intrinsics(marker: Path) -> tuple[list[float], np.ndarray, tuple[float, float], bool]:
    """Reads fx, fy, cx, cy; the grid's centre [3]; height and width; whether poses are world-to-camera."""
    try:
        lines = [[float(number) for number in line.split()] for line in _text(marker).splitlines() if line.strip()]
        (focal, cx, cy, *more), centre, _, (height, width) = lines[:4]
        inverted = lines[4] if len(lines) > 4 else [0.0]
    except ValueError:
        raise UserError(f"{marker}: needs four lines: f cx cy 0; centre of the grid; scale; height width") from None
    if len(centre) != 3 or not np.isfinite(centre).all():
        raise UserError(f"{marker}: the second line is the centre of the grid, three numbers")
    if any(more):
        raise UserError(f"{marker}: {more[0]:g} is the fourth number of the first line; only 0 can be used")
    if inverted not in ([0.0], [1.0]) or len(lines) > 5:
        raise UserError(f"{marker}: after four lines only 0 or 1 may follow, 1 for world-to-camera poses")
    return [focal, focal, cx, cy], np.array(centre), (height, width), inverted == [1.0]


def _transforms_instance(id: str, marker: Path, max_views: int | None, convention: CameraConvention) -> PosedImages:
    """Reads Blender's (``camera_angle_x``) or nerfstudio's (``fl_x fl_y cx cy w h``) ``transforms.json``.

    What a frame says of its camera goes before what the file says of all.
    """
    content = read_object(marker, Transforms, largest=_LARGEST_TRANSFORMS)
    try:
        frames = [(str(f["file_path"]), np.array(f["transform_matrix"], dtype=float), f) for f in content["frames"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f'{marker}: needs "frames" with "file_path" and "transform_matrix" ({error!r})') from None
    frames = frames[:max_views]
    if not frames:
        raise UserError(f"{marker}: has no frames")
    _tell_of_unused(marker, [content, *(frame for *_, frame in frames)])
    paths = [_image_path(marker, name) for name, *_ in frames]
    poses = [checked_pose(pose, f"{marker}: frame {name}") for name, pose, _ in frames]
    size = _size(paths[0])
    intrinsics = [_frame_intrinsics(content, frame, size, f"{marker}: frame {name}") for name, _, frame in frames]
    convention = "opengl" if convention == "auto" else convention
    opengl = opengl_poses(np.stack(poses), convention)
    return PosedImages(id, paths, opengl, np.stack(intrinsics), size, False, convention)


def _tell_of_unused(marker: Path, objects: list[dict[str, Any]]) -> None:
    unused = {key for each in objects for key in each if key not in _USED and not _NO_CAMERA.match(key)}
    unused = {key for key in unused if not _BENT.fullmatch(key) and not _OTHER_NAMES.fullmatch(key)}
    if unused:
        tell(f"{marker.name}: not used of it are {', '.join(sorted(unused))}")


def _frame_intrinsics(content: dict[str, Any], frame: dict[str, Any], size: tuple[int, int], where: str) -> np.ndarray:
    """Reads fx, fy, cx, cy of a frame, in pixels of pictures of a size."""
    camera = dict(content)
    for axis in "xy":  # a frame's own focal length takes the place of the file's in either form
        if frame.get(f"fl_{axis}") is not None or frame.get(f"camera_angle_{axis}") is not None:
            camera.pop(f"fl_{axis}", None)
            camera.pop(f"camera_angle_{axis}", None)
    camera = {key: value for key, value in (camera | frame).items() if value is not None and key != "frames"}
    _check_pinhole(camera, where)
    numbers = {key: _number(camera[key], key, where) for key in _USED if key in camera and key != "camera_model"}
    height, width = numbers.get("h", size[0]), numbers.get("w", size[1])
    if min(height, width) <= 0:
        raise UserError(f"{where}: focal lengths and sizes must be finite and positive")
    fx, fy = _focal(numbers, "x", width, where), _focal(numbers, "y", height, where)
    if fx is None and fy is None:
        raise UserError(f'{where}: needs "camera_angle_x" (radians) or "fl_x" (pixels), as numbers')
    fx, fy = fy if fx is None else fx, fx if fy is None else fy
    intrinsics = np.array([fx, fy, numbers.get("cx", width / 2), numbers.get("cy", height / 2)], dtype=float)
    return _scaled(intrinsics, (height, width), size, where, known_size="w" in numbers and "h" in numbers)


def _focal(numbers: dict[str, float], axis: str, pixels: float, where: str) -> float | None:
    """Gives the focal length in pixels along an axis, by itself or by the angle of view; None if neither is there."""
    focal, angle = numbers.get(f"fl_{axis}"), numbers.get(f"camera_angle_{axis}")
    if angle is None:
        return focal
    if not 0 < angle < math.pi:
        raise UserError(f'{where}: "camera_angle_{axis}" is {angle:g}; radians between 0 and π are needed')
    by_angle = pixels / 2 / math.tan(angle / 2)
    if focal is not None and abs(by_angle / focal - 1 if focal else 1) > _SAME_FOCAL:
        raise UserError(
            f'{where}: "fl_{axis}" is {focal:g}, but "camera_angle_{axis}" makes it {by_angle:g}; take one out'
        )
    return by_angle if focal is None else focal


def _number(value: Any, key: str, where: str) -> float:
    number = float(value) if isinstance(value, int | float) and abs(value) < 1e12 else math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise UserError(f'{where}: "{key}" is no finite number')
    return number


def _check_pinhole(camera: dict[str, Any], where: str) -> None:
    """Refuses by name what would bend or cut rays, and intrinsics under names that are not read."""
    model = camera.get("camera_model", "OPENCV")
    bent = [key for key, value in camera.items() if _BENT.fullmatch(key) and _is_set(value)]
    if str(model).upper() not in _PINHOLES or bent:
        what = f"camera_model {model}" + (f" with {', '.join(bent)}" if bent else "")
        raise UserError(f"{where}: {what}; only pinhole cameras can be used: undistort the pictures first")
    for key in camera:
        if _OTHER_NAMES.fullmatch(key):
            raise UserError(
                f'{where}: "{key}" is not read; say it by fl_x, fl_y, cx, cy, w and h (pixels) or camera_angle_x '
                "(radians), and take it out"
            )


def _is_set(value: Any) -> bool:
    return any(map(_is_set, value)) if isinstance(value, list) else bool(value)


def _image_path(marker: Path, name: str) -> Path:
    """Finds the image a frame names, with its suffix or without."""
    path = marker.parent / name
    for named in (path, marker.parent / name.replace("\\", "/")):  # the second as Windows writes it
        for suffix in ("", *IMAGE_SUFFIXES):
            if named.name and (candidate := named.with_name(named.name + suffix)).is_file():
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


def _scaled(
    intrinsics: np.ndarray, stated: tuple[float, float], size: tuple[int, int], where: str, known_size: bool = True
) -> np.ndarray:
    """Scales intrinsics for images of the stated height and width to images of another size.

    Args:
        intrinsics: [4], fx, fy, cx, cy.
        stated: height and width that they are of.
        size: height and width of the pictures.
        where: names them in messages.
        known_size: the stated size was said, and not taken from the pictures.

    Raises:
        UserError: a number is not finite or positive, the sizes have different aspects, or the numbers cannot be of
            pictures of this size.
    """
    if not np.isfinite([*intrinsics, *stated]).all() or intrinsics[:2].min() <= 0 or min(stated) <= 0:
        raise UserError(f"{where}: focal lengths and sizes must be finite and positive")
    y, x = size[0] / stated[0], size[1] / stated[1]
    scaled = intrinsics * [x, y, x, y]
    shown = f"pictures of {size[1]}×{size[0]}"
    if abs(size[0] - stated[0] * x) > max(1, _SAME_ASPECT * size[0]):
        raise UserError(f"{where}: a size of {stated[1]:g}×{stated[0]:g} has not the aspect of {shown}")
    low, high = (0.05, 0.95) if known_size else _MIDDLE
    across, down = scaled[2] / size[1], scaled[3] / size[0]
    if not (low <= across <= high and low <= down <= high):
        reason = (
            "is outside or in a corner" if known_size else 'is not in the middle: were they resized? give "w" and "h"'
        )
        raise UserError(f"{where}: the centre {scaled[2]:g}, {scaled[3]:g} of {shown} {reason}")
    angle = 2 * math.degrees(math.atan(max(size[1] / scaled[0], size[0] / scaled[1]) / 2))
    if angle > _WIDEST:
        raise UserError(f"{where}: a focal length of {scaled[0]:g} pixels is a view of {angle:.0f}°; is it in pixels?")
    return scaled
