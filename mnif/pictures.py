"""Values to pixels, and grids of pictures to look at."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from mnif.files import written_atomically


def to_pixels(values: Tensor) -> np.ndarray:
    """Values [N, H, W, C] in about [-1, 1] → uint8, clipped and rounded."""
    return ((values.clamp(-1, 1) * 127.5) + 127.5).round().byte().cpu().numpy()


def picture_grid(images: np.ndarray | Sequence[np.ndarray], columns: int, gap: int = 2, scale: int = 1) -> Image.Image:
    """Pictures [N, H, W, 3] uint8 row by row on one white sheet, ``gap`` pixels apart, each pixel ``scale`` wide."""
    images = np.asarray(images).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top = gap + index // columns * (height + gap)
        left = gap + index % columns * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return Image.fromarray(sheet)


def save_picture(path: Path, image: Image.Image | np.ndarray) -> None:
    """Writes a PNG atomically, and leaves it to the system when it reaches the disk: there may be thousands."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    with written_atomically(path, flush=False) as temporary:
        image.save(temporary, format="PNG")
