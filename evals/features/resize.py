"""How pictures come to an extractor's size: the choice alone moves the distance of pictures from themselves.

Every filter takes pictures [N, H, W, 3], uint8 or float32 in 0..255, and a size, and gives [N, size, size, 3] float32
in about 0..255. What each does to a distance is shown in docs/evaluation.md (Parmar et al., On Aliased Resizing and
Surprising Subtleties in GAN Evaluation, CVPR 2022).
"""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

Resize = Callable[[np.ndarray, int], np.ndarray]


def bicubic_antialias(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes by PyTorch's antialiased bicubic filter, whole grey levels to whole ones; within one of Pillow's."""
    whole = images if images.dtype == np.uint8 else images.clip(0, 255).round().astype(np.uint8)
    resized = interpolate(_channels_first(whole), size=(size, size), mode="bicubic", antialias=True)
    return _channels_last(resized)


def bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes by PyTorch's bilinear filter without antialiasing, not rounded: as pytorch-fid does."""
    pixels = _channels_first(images).float()
    return _channels_last(interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False))


def tf1_bilinear(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes by TensorFlow 1's bilinear filter, not rounded.

    Output pixel i looks at i·H/size, so pictures shift up and left.
    """
    down, across = (_tf1_positions(pixels, size) for pixels in images.shape[1:3])
    rows = _between(images.astype(np.float32), *down, axis=1)
    return _between(rows, *across, axis=2)


def pillow_bicubic(images: np.ndarray, size: int) -> np.ndarray:
    """Resizes each channel as floats by Pillow's antialiased bicubic filter, not rounded: as clean-fid does."""
    resized = np.empty((len(images), size, size, 3), dtype=np.float32)
    for row, channel in np.ndindex(len(images), 3):
        grey = Image.fromarray(images[row, :, :, channel].astype(np.float32))
        resized[row, :, :, channel] = np.asarray(grey.resize((size, size), Image.Resampling.BICUBIC))
    return resized


RESIZES: dict[str, Resize] = {
    "bicubic-antialias": bicubic_antialias,
    "bilinear": bilinear,
    "tf1-bilinear": tf1_bilinear,
    "pillow-bicubic": pillow_bicubic,
}


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2)  # a copy: PyTorch warns of read-only arrays


def _channels_last(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(0, 2, 3, 1).float().contiguous().numpy()


def _tf1_positions(pixels: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds for each output pixel the two input pixels it lies between, and the weight of the second."""
    position = np.arange(size, dtype=np.float32) * np.float32(pixels / size)
    lower = position.astype(np.int64)
    return lower, np.minimum(lower + 1, pixels - 1), (position - lower).astype(np.float32)


def _between(images: np.ndarray, first: np.ndarray, second: np.ndarray, share: np.ndarray, axis: int) -> np.ndarray:
    before, after = images.take(first, axis), images.take(second, axis)
    return before + (after - before) * share.reshape([-1] + [1] * (3 - axis))
