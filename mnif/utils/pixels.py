"""Values to pixels, sheets of images to look at, and frames to an animated GIF or an MP4."""

import errno
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from mnif.utils.errors import UserError, require
from mnif.utils.files import written_atomically

if TYPE_CHECKING:  # whoever only reads data does without torch
    from torch import Tensor


def as_axes(resolution: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Gives a resolution as one number for each of ``dimensions`` axes; a single number stands for all of them."""
    axes = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    return axes * dimensions if len(axes) == 1 else axes


def to_uint8(values: "Tensor") -> np.ndarray:
    """Clips and rounds values of any shape in about [-1, 1] to uint8."""
    return ((values.clamp(-1, 1) * 127.5) + 127.5).round().byte().cpu().numpy()


def image_grid(images: np.ndarray | Sequence[np.ndarray], columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """Lays images [N, H, W, 3] uint8 row by row on a white sheet, ``gap`` pixels apart, each pixel ``scale`` wide."""
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)


def save_image(path: Path, image: Image.Image | np.ndarray) -> None:
    """Writes a PNG atomically, and leaves it to the system when it reaches the disk: there may be thousands."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    with written_atomically(path, flush=False) as temporary:
        image.save(temporary, format="PNG")


_PALETTE_PIXELS = 1 << 16  # enough to choose 256 colours from


def save_animation(path: Path, frames: np.ndarray, frames_per_second: float = 15) -> None:
    """Writes frames as an animation, atomically, in the format its suffix names.

    A .gif loops for ever and has one palette of at most 256 colours for all frames, so that still parts do not
    flicker. GIF counts time in hundredths of a second, so its frames last one hundredth more or less where that keeps
    the speed; equal frames in a row become one that lasts longer. An .mp4 is H.264 that browsers play; odd heights and
    widths get one more row or column, a copy of the last.

    Args:
        path: the file, .gif or .mp4.
        frames: uint8 [N, H, W, 3].
        frames_per_second: above 0; a GIF has at most 50, faster ones are slowed down by what shows them.

    Raises:
        UserError: another suffix, shape, type or speed, or imageio-ffmpeg is missing.
        OSError: the file cannot be written.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
        raise UserError(f"{path}: frames {list(frames.shape)} {frames.dtype}; [N, H, W, 3] uint8 is needed")
    suffix = path.suffix.lower()
    if suffix not in (".gif", ".mp4"):
        raise UserError(f"{path}: an animation is written as .gif or .mp4")
    if not 0 < frames_per_second <= (50 if suffix == ".gif" else 1000):
        raise UserError(
            f"{path}: {frames_per_second} frames per second; above 0 and, for a GIF, at most 50 are needed"
        )
    if suffix == ".gif":
        _save_gif(path, frames, frames_per_second)
    else:
        _save_mp4(path, frames, frames_per_second)


def _save_gif(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    images = _indexed(frames)
    ends = np.rint(np.arange(len(frames) + 1) * 100 / frames_per_second).astype(int)
    with written_atomically(path, flush=False) as temporary:
        images[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=(np.diff(ends) * 10).tolist(),  # in milliseconds
            loop=0,
            optimize=True,
        )


def _indexed(frames: np.ndarray) -> list[Image.Image]:
    """Gives frames one palette for all; at most 256 colours stay as they are, of more each goes to its nearest.

    Pillow would map colours in steps of four, which shows in shades of grey, or dither, which crawls.
    """
    red, green, blue = (frames[..., channel].astype(np.int32) for channel in range(3))
    packed = red << 16 | green << 8 | blue
    nearest = np.zeros(1 << 24, dtype=np.uint8)  # of every colour there is; first marks those that occur
    nearest[packed] = 1
    occurring = np.flatnonzero(nearest)
    colours = np.stack([occurring >> 16, occurring >> 8 & 255, occurring & 255], axis=-1)
    palette = colours if len(colours) <= 256 else _chosen_palette(frames)
    nearest[occurring] = cKDTree(palette).query(colours)[1]
    images = [Image.fromarray(indices) for indices in nearest[packed]]
    for image in images:
        image.putpalette(palette.astype(np.uint8).tobytes())  # from here on the indices are no greys
    return images


def _chosen_palette(frames: np.ndarray) -> np.ndarray:
    """Chooses at most 256 colours [P, 3] that suit all frames: median cut, then k-means until few pixels move."""
    pixels = frames.reshape(-1, 3)
    if len(pixels) > _PALETTE_PIXELS:  # by chance, as a regular step could fall on one column of every frame
        pixels = pixels[np.random.default_rng(0).integers(len(pixels), size=_PALETTE_PIXELS)]
    few = len(pixels) // 100 + 1
    chosen = Image.fromarray(pixels[None]).quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=few)
    return np.asarray(chosen.getpalette()).reshape(-1, 3)


def _save_mp4(path: Path, frames: np.ndarray, frames_per_second: float) -> None:
    require("imageio-ffmpeg", "video", str(path))
    import imageio_ffmpeg

    height, width = (side + side % 2 for side in frames.shape[1:3])  # colour is stored once for each 2×2 pixels
    frames = np.pad(frames, [(0, 0), (0, height - frames.shape[1]), (0, width - frames.shape[2]), (0, 0)], mode="edge")
    # imageio-ffmpeg brings the program. Its own writer is not used: it ends without an error on a full disk.
    program = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "error"]
    source = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(frames_per_second)]
    codec = ["-codec:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "16"]
    # The temporary name has no suffix to tell the format; the index goes first, so that browsers start at once.
    target = ["-f", "mp4", "-movflags", "+faststart"]
    with written_atomically(path, flush=False) as temporary:
        command = [*program, *source, "-i", "-", *codec, *target, str(temporary)]
        done = subprocess.run(command, input=frames.tobytes(), capture_output=True)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise OSError(errno.EIO, f"ffmpeg: {said[-1] if said else f'exit status {done.returncode}'}", str(path))
