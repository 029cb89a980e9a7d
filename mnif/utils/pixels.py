"""Picture files to pixels and values to pixels, sheets of images to look at, and frames to an animated GIF or MP4."""

import errno
import subprocess
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngImageFile

from mnif.utils.errors import UserError, require
from mnif.utils.files import written_atomically

if TYPE_CHECKING:  # whoever only reads data does without torch
    from torch import Tensor


def as_axes(resolution: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    """Gives a resolution as one number for each of ``dimensions`` axes; a single number stands for all of them."""
    axes = (resolution,) if isinstance(resolution, int) else tuple(resolution)
    return axes * dimensions if len(axes) == 1 else axes


MAX_IMAGE_PIXELS = 89_478_485
"""Pixels of a picture file, unless :func:`limit_image_pixels` says otherwise: Pillow's own limit, 1.1 GB to read."""

_SCALED_FROM = 1 << 24  # pixels of a JPEG that is decoded at a half to an eighth of its size, if that is enough
_OVERSAMPLING = 4  # pixels per axis that are left for one of the result when it is
_BAND_PIXELS = 1 << 22  # of a picture that are laid on a background at a time
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of EXIF but the first, which is upright."""
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def limit_image_pixels(pixels: int) -> None:
    """Sets how many pixels a picture file may have, for all of this process: it is Pillow's own limit."""
    Image.MAX_IMAGE_PIXELS = pixels


@contextmanager
def open_image(file: Path | BytesIO, where: str = "") -> Iterator[Image.Image]:
    """Opens an image; whatever fails while it is read becomes a :class:`UserError` that names the file.

    Args:
        file: its path, or its content.
        where: names the file in messages, if not by its path.
    """
    where = where or str(file)
    try:
        with _quiet():
            image = Image.open(file)
            _mend_transparency(image)
        with image:
            yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS
        raise UserError(f"{where}: more than {limit:,} pixels; remove it or raise --max_image_pixels") from None
    except Exception as error:  # what Pillow's readers raise on damaged files is no closed list
        reason = str(error).replace(repr(file), "").strip() or type(error).__name__  # which would be an address
        raise UserError(f"{where}: unreadable picture ({reason}); remove or replace it") from None


_FILTERS = threading.Lock()  # filters of warnings are the process's, and evaluations read in several threads


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what Pillow warns of in damaged files; a picture over its limit of pixels is an error."""
    with _FILTERS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _mend_transparency(image: Image.Image) -> None:
    """Brings the transparent value of a PNG, which Pillow leaves as the file has it, to the range of its pixels."""
    if isinstance(image, PngImageFile) and "transparency" in image.info and image.tile:
        value, packing = image.info["transparency"], image.tile[0][3]
        if packing in ("L;2", "L;4"):
            image.info["transparency"] = value * (85 if packing == "L;2" else 17)
        elif packing == "RGB;16B":  # of which Pillow keeps the upper bytes
            image.info["transparency"] = tuple(part >> 8 for part in value)


def crop_and_resize(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Turns an image as its EXIF data say, cuts it to the central part, resizes it: [height, width, channels] uint8.

    A JPEG of more than 2²⁴ pixels is decoded at a half, a quarter or an eighth of its size where at least four pixels
    per axis are left for one of the result.

    Args:
        image: any picture of at most 8 bits a channel, or 16-bit grey, as it was opened.
        size: height and width; the largest central part of this aspect is resized by Pillow's antialiased bicubic
            filter.
        channels: 1 for luminance, 3 for RGB (both laid on white), 4 for RGBA.

    Raises:
        ValueError: the picture has 32 bits a pixel in one channel, whose range nobody tells.
    """
    height, width = size
    orientation = _orientation(image)
    if image.width * image.height > _SCALED_FROM:
        least = (width * _OVERSAMPLING, height * _OVERSAMPLING)
        image.draft(None, least[::-1] if orientation >= 5 else least)  # which only JPEG has; from 5 on, it lies
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    # Cut first: a box given to resize() would let pixels outside it bleed in. Pillow resizes RGBA with the colours
    # multiplied by alpha, so the invisible colour of transparent pixels makes no dark fringe.
    box = central_box(image.size, size)
    image = image if box == (0, 0, *image.size) else image.crop(box)
    image = to_mode(image, channels).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


def _orientation(image: Image.Image) -> int:
    """Reads the orientation, 1 to 8; 1 if the EXIF block is damaged, as viewers have it."""
    try:
        with _quiet():
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # what damaged blocks raise is no closed list
        return 1
    return orientation if orientation in _TURNS else 1


def to_mode(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Converts an image to L, RGB or RGBA; transparency is laid on ``background`` unless it is kept (4 channels).

    Raises:
        ValueError: the picture has 32 bits a pixel in one channel.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, 32 bits a pixel; save it with 8 bits a channel")
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    mode = _MODES[channels]
    if channels == 4 or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        return image.convert(mode)
    laid, rows = Image.new(mode, image.size), max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):  # in bands, since this takes four times the picture's memory
        band = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        ground = Image.new("RGBA", band.size, background)
        laid.paste(Image.alpha_composite(ground, band).convert(mode), (0, top))
    return laid


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales 16-bit grey, which Pillow would clip at 255, to L, or to LA if one of its values is transparent."""
    values = np.asarray(image)
    grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([grey, alpha]))


def central_box(whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Finds the largest central part of a (width, height) image with the aspect of a (height, width): left … lower."""
    (image_width, image_height), (height, width) = whole, size
    cut_width = min(image_width, max(1, round(image_height * width / height)))
    cut_height = min(image_height, max(1, round(image_width * height / width)))
    left, top = (image_width - cut_width) // 2, (image_height - cut_height) // 2
    return left, top, left + cut_width, top + cut_height


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
    from scipy.spatial import cKDTree  # takes longer to import than all else here

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
