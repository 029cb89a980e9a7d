"""Pictures, animations and shapes as text that stands in the page itself, within a limit of its size."""

import base64
import gzip
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evals.report.exhibits import Exhibit
from mnif.utils.pixels import image_grid, open_image, to_mode

GALLERY_BYTES = 3_200_000
"""Of all that belongs to samples; with the rest the page stays below 5 MB."""

_QUALITIES = (90, 80, 65, 45, 25, 10)  # of WebP, tried in turn
_WIDEST = 1600  # pixels of a picture from a file


def lossless_uri(picture: np.ndarray) -> str:
    """Writes a picture [H, W, 3] as a data URI, exactly as it is."""
    return webp_uri(Image.fromarray(picture), lossless=True)


def file_uri(path: Path) -> str:
    """Reads a picture file and writes it as a data URI, at most 1,600 pixels wide.

    Raises:
        UserError: it is no picture.
    """
    with open_image(path) as image:
        picture = to_mode(image, 3)
    if picture.width > _WIDEST:
        height = max(round(picture.height * _WIDEST / picture.width), 1)
        picture = picture.resize((_WIDEST, height), Image.Resampling.LANCZOS)
    return webp_uri(picture, quality=85)


def gallery(exhibits: Sequence[Exhibit], limit: int = GALLERY_BYTES) -> list[dict[str, Any]]:
    """Writes the gallery's samples for the page's script, in the best quality of which all fit into ``limit`` bytes.

    A film is a sheet of frames, row by row: ``{sheet, columns, frames, width, height}``. A volume is one byte a voxel,
    128 at the surface, packed by gzip: ``{size, data}``.
    """
    for quality in _QUALITIES:
        entries = [_entry(exhibit, quality) for exhibit in exhibits]
        if sum(_length(entry) for entry in entries) <= limit:
            break
    return entries


def _entry(exhibit: Exhibit, quality: int) -> dict[str, Any]:
    height, width = exhibit.picture.shape[:2]
    return {
        "number": exhibit.number,
        "empty": exhibit.is_empty,
        "width": width,
        "height": height,
        "picture": webp_uri(Image.fromarray(exhibit.picture), quality=quality),
        "nearest": None if exhibit.nearest is None else webp_uri(Image.fromarray(exhibit.nearest), quality=quality),
        "nearest_id": exhibit.nearest_id,
        "walk": _film(exhibit.walk, quality),
        "turntable": None if exhibit.turntable is None else _film(exhibit.turntable, quality),
        "volume": None if exhibit.volume is None else _volume(exhibit.volume),
    }


def _length(value: Any) -> int:
    if isinstance(value, dict):
        return sum(_length(part) for part in value.values())
    return len(value) if isinstance(value, str) else 0


def _film(frames: np.ndarray, quality: int) -> dict[str, Any]:
    columns = math.ceil(math.sqrt(len(frames)))
    sheet = image_grid(frames, columns, gap=0)
    return {
        "sheet": webp_uri(sheet, quality=quality),
        "columns": columns,
        "frames": len(frames),
        "width": frames.shape[2],
        "height": frames.shape[1],
    }


def _volume(values: np.ndarray) -> dict[str, Any]:
    bytes_of_voxels = np.clip(np.rint(values * 127 + 128), 0, 255).astype(np.uint8)
    packed = gzip.compress(bytes_of_voxels.tobytes(), mtime=0)
    return {"size": len(values), "data": base64.b64encode(packed).decode()}


def webp_uri(picture: Image.Image, **options: Any) -> str:
    """Writes a picture as a data URI of WebP, with Pillow's ``quality`` or ``lossless``."""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", method=4, **options)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
