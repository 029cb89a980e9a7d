"""How well instances are reconstructed, beside the controls any learned latent has to beat."""

import numpy as np
import torch
from torch import Tensor

from evals.metrics.uncertainty import standard_error
from mnif.signals.base import intersection_over_union, psnr
from mnif.utils.errors import UserError, require

SSIM_WINDOW = 11


def psnr_per_image(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Computes the peak signal-to-noise ratio of each image: −10 log₁₀ of its mean squared error, with a peak of 1.

    Args:
        images: [N, ...] floats, [N, H, W, C] for pictures; clipped to [0, 1] first, as a screen would.
        references: the originals in the same shape, clipped likewise.

    Returns:
        [N] float64 in dB, at most 100: the error counts as 1e-10 where it is less.

    Raises:
        UserError: different shapes.
    """
    images, references = np.asarray(images), np.asarray(references)
    _check_same_shape("PSNR", images, references)
    if not (np.issubdtype(images.dtype, np.floating) and np.issubdtype(references.dtype, np.floating)):
        raise UserError(f"PSNR: {images.dtype} against {references.dtype}; floats in [0, 1] are needed")
    difference = np.clip(images, 0, 1).astype(np.float64) - np.clip(references, 0, 1)
    error = np.square(difference).reshape(len(images), -1).mean(axis=1)
    return -10 * np.log10(np.maximum(error, 1e-10))


def ssim_per_image(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Computes the structural similarity of each picture by torchmetrics (Wang et al., IEEE TIP 2004).

    The window is a Gaussian of 11 pixels.

    Args:
        images: [N, H, W, C] floats, clipped to [0, 1] first, at least 11 pixels high and wide.
        references: the originals in the same shape, clipped likewise.

    Returns:
        [N] float32, at most 1; PyTorch's convolutions take 50 times as long in float64.

    Raises:
        UserError: different shapes, pictures smaller than the window, or torchmetrics is missing.
    """
    images, references = np.asarray(images), np.asarray(references)
    _check_same_shape("SSIM", images, references)
    if images.ndim != 4 or min(images.shape[1:3]) < SSIM_WINDOW:
        raise UserError(f"SSIM: {list(images.shape)}; [N, H, W, C] of {SSIM_WINDOW} pixels or more is needed")
    require("torchmetrics", "eval", "SSIM")
    from torchmetrics.functional.image import structural_similarity_index_measure

    values, targets = (
        torch.from_numpy(np.clip(part, 0, 1).astype(np.float32)).permute(0, 3, 1, 2) for part in (images, references)
    )
    found = structural_similarity_index_measure(values, targets, data_range=1.0, reduction="none")
    assert isinstance(found, torch.Tensor)
    return np.atleast_1d(found.numpy())


def border_step_ratio(reconstructions: np.ndarray, originals: np.ndarray, cells: int) -> float:
    """Tells whether seams show where cells meet: the mean absolute step across borders over that of the originals.

    About 1: no seams. Above 1: steps that the originals do not have. Below 1: borders are smoother than the originals.

    Args:
        reconstructions: [N, H, W, C] floats.
        originals: in the same shape.
        cells: cells per axis, a divisor of H and W.

    Returns:
        The ratio over the two pixels either side of every interior border of both axes; nan where there is no border
        (one cell) and inf or nan where the originals have no step at any border.

    Raises:
        UserError: different shapes, or H or W is not divisible by the cells.
    """
    _check_same_shape("border steps", reconstructions, originals)
    height, width = originals.shape[1:3]
    if cells < 1 or height % cells or width % cells:
        raise UserError(f"border steps: {height}×{width} pixels do not divide into {cells} cells per axis")
    if cells == 1:
        return float("nan")
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(_border_step(reconstructions, cells) / _border_step(originals, cells))


def _border_step(images: np.ndarray, cells: int) -> np.float64:
    """Averages the absolute differences across interior borders."""
    images = np.asarray(images, dtype=np.float64)
    rows = np.arange(1, cells) * (images.shape[1] // cells)
    columns = np.arange(1, cells) * (images.shape[2] // cells)
    down = np.abs(images[:, rows] - images[:, rows - 1])
    across = np.abs(images[:, :, columns] - images[:, :, columns - 1])
    return np.concatenate([down.ravel(), across.ravel()]).mean()


def _check_same_shape(what: str, images: np.ndarray, references: np.ndarray) -> None:
    if images.shape != references.shape:
        raise UserError(f"{what}: {list(images.shape)} against {list(references.shape)}; one shape is needed")


PROTOCOL = "PSNR of occupancies in [0, 1], clipped, peak 1; inside is above one half"


def occupancy_scores(values: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """Computes ``psnr`` in dB, ``iou`` and ``accuracy`` of each shape, [B] float64.

    Args:
        values: [B, R, R, R, 1], larger inside, 0 on the surface.
        targets: likewise, -1 and 1.
    """
    scores = {
        "psnr": psnr(values, targets),
        "iou": intersection_over_union(values, targets),
        "accuracy": ((values > 0) == (targets > 0)).flatten(1).double().mean(dim=1),
    }
    return {name: numbers.double().cpu().numpy() for name, numbers in scores.items()}


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins the scores of batches to those of all instances, [N] by name."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def mean_metrics(scores: dict[str, np.ndarray], ending: str) -> dict[str, float]:
    """Averages each score [N]: ``NAME_ending``, and its standard error ``NAME_ending_std``."""
    metrics: dict[str, float] = {}
    for name, numbers in scores.items():
        metrics |= {f"{name}_{ending}": float(numbers.mean()), f"{name}_{ending}_std": standard_error(numbers)}
    return metrics
