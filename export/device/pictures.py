"""Pictures from files, as the encoder has learned from them, and to files.

Pillow reads them where it is installed: they are turned as their EXIF data say, laid on white, cut to the central part
and resized, as :mod:`mnif.utils.pixels` does. Without Pillow a PNG file of the model's own size and channels is read
here.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import BackendMissing, BundleError, import_backend
from .files import write_atomically

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


def read_picture(path: Path, size: tuple[int, ...], channels: int, resize: bool = True) -> np.ndarray:
    """Reads a picture: [height, width, channels] uint8.

    Args:
        path: the file.
        size: height and width that it is brought to.
        channels: 1 for luminance, 3 for RGB (both laid on white), 4 for RGBA.
        resize: False takes it as it is, which must be of that size where Pillow is missing.

    Raises:
        BundleError: it cannot be read, or not without Pillow.
    """
    try:
        import_backend("PIL")
        pillow = import_backend("PIL.Image")
    except BackendMissing:
        return read_png(path, (*size, channels))
    try:
        with pillow.open(str(path)) as image:
            return _fitted(pillow, image, size if resize else None, channels)
    except Exception as error:  # what Pillow's readers raise on damaged files is no closed list
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BundleError(f"{path}: unreadable picture ({reason})") from None


_SCALED_FROM = 1 << 24  # as in mnif.utils.pixels, which a test holds this to

_OVERSAMPLING = 4

_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def _fitted(pillow: Any, image: Any, size: tuple[int, ...] | None, channels: int) -> np.ndarray:
    """Turns an image upright, cuts it to the central part, resizes it: :func:`mnif.utils.pixels.crop_and_resize`.

    A mask, whose ``size`` is None, is taken as it is.
    """
    if size is None:
        return np.asarray(_in_mode(pillow, image, channels)).reshape(image.size[1], image.size[0], channels)
    height, width = size
    orientation = _orientation(image)
    if image.width * image.height > _SCALED_FROM:
        least = (width * _OVERSAMPLING, height * _OVERSAMPLING)
        image.draft(None, least[::-1] if orientation >= 5 else least)
    if orientation in _TURNS:
        image = image.transpose(getattr(pillow, _TURNS[orientation]))
    cut_width = min(image.width, max(1, round(image.height * width / height)))
    cut_height = min(image.height, max(1, round(image.width * height / width)))
    left, top = (image.width - cut_width) // 2, (image.height - cut_height) // 2
    if (cut_width, cut_height) != image.size:
        image = image.crop((left, top, left + cut_width, top + cut_height))
    image = _in_mode(pillow, image, channels).resize((width, height), pillow.BICUBIC)
    return np.asarray(image).reshape(height, width, channels)


def _orientation(image: Any) -> int:
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # damaged blocks
        return 1


def _in_mode(pillow: Any, image: Any, channels: int) -> Any:
    """Converts an image to grey, RGB or RGBA; unless transparency is kept it is laid on white."""
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}, 32 bits a pixel; save it with 8 bits a channel")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
        alpha = values != image.info["transparency"] if "transparency" in image.info else None
        image = pillow.fromarray(grey if alpha is None else np.dstack([grey, alpha.astype(np.uint8) * 255]))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    if channels != 4 and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
        image = pillow.alpha_composite(pillow.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


_PNG = b"\x89PNG\r\n\x1a\n"


def read_png(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Reads a PNG of 8 bits a channel, without palette and not interlaced, in NumPy alone.

    Args:
        path: the file.
        shape: [height, width, 1 to 4], which it must have.

    Raises:
        BundleError: it is something else, or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}") from None
    try:
        if not content.startswith(_PNG):
            raise ValueError("no PNG")
        return _png_pixels(content, shape)
    except (ValueError, KeyError, struct.error, zlib.error) as error:
        reason = f"it is damaged, {error!r}" if not isinstance(error, ValueError) else str(error)
        raise BundleError(f"{path}: cannot be read without Pillow ({reason}); sudo apt install python3-pil") from None


def _png_pixels(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    chunks: dict[bytes, bytes] = {}
    at = len(_PNG)
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        chunks[kind] = chunks.get(kind, b"") + content[at + 8 : at + 8 + length]
        at += length + 12
    width, height, bits, colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    channels = {0: 1, 4: 2, 2: 3, 6: 4}.get(colour, 0)
    if (height, width, channels) != shape:
        raise ValueError(f"{height} × {width} of {channels or 'a palette'}, not {' × '.join(map(str, shape))}")
    if bits != 8 or interlaced or b"tRNS" in chunks:
        raise ValueError("it is interlaced, or has not 8 bits a channel")
    stride = width * channels
    inflate = zlib.decompressobj()
    raw = inflate.decompress(chunks[b"IDAT"], height * (stride + 1) + 1)
    if len(raw) != height * (stride + 1):
        raise ValueError("it is damaged")
    rows = np.frombuffer(raw, np.uint8).reshape(height, stride + 1)
    pixels = np.zeros((height + 1, width + 1, channels), np.int64)  # with a row above and a column to the left
    for row, (kind, values) in enumerate(zip(rows[:, 0], rows[:, 1:].reshape(height, width, channels)), start=1):
        for column, value in enumerate(values.astype(np.int64), start=1):
            left, above, corner = pixels[row, column - 1], pixels[row - 1, column], pixels[row - 1, column - 1]
            pixels[row, column] = (value + _predicted(int(kind), left, above, corner)) % 256
    return pixels[1:, 1:].astype(np.uint8)


def _predicted(kind: int, left: np.ndarray, above: np.ndarray, corner: np.ndarray) -> Any:
    """Gives what a row's filter adds to a pixel (PNG specification, section 9)."""
    if kind == 4:  # Paeth
        distances = np.abs(np.stack([above - corner, left - corner, left + above - 2 * corner]))
        return np.choose(distances.argmin(axis=0), [left, above, corner])
    if kind > 4:
        raise ValueError("it is damaged")
    return (0, left, above, (left + above) // 2)[kind]


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Clips and rounds values in about [-1, 1] to uint8 of the same shape."""
    return np.round(np.clip(values, -1, 1) * 127.5 + 127.5).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes [height, width, 1 to 4] uint8: grey, grey and alpha, RGB, RGBA."""
    height, width, channels = pixels.shape
    if channels not in (1, 2, 3, 4):
        raise BundleError(f"values with {channels} channels are not a picture")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, (0, 4, 2, 6)[channels - 1], 0, 0, 0)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows.tobytes())) + chunk(b"IEND", b"")
    write_atomically(path, _PNG + body, flush=False)
