"""How well occupancies fit: intersection over union, accuracy and PSNR of each shape.

Values are as fields give them, -1 outside and 1 inside with the surface at 0. **PSNR is of occupancies in [0, 1]**:
values are clipped to [-1, 1] first and the peak is 1, as for pictures. (Taking the range [-1, 1] for the peak but the
error of [0, 1], or the reverse, moves it by 6 dB.) Accuracy is kind to empty space: a shape that fills a tenth of its
grid gives 0.9 to a model that draws nothing, so it never stands without the intersection over union.
"""

import numpy as np
from torch import Tensor

from evals.metrics.spread import standard_error
from mnif.signals import intersection_over_union, psnr

PROTOCOL = "PSNR of occupancies in [0, 1], clipped, peak 1; inside is above one half"


def occupancy_scores(values: Tensor, targets: Tensor) -> dict[str, np.ndarray]:
    """``psnr`` in dB, ``iou`` and ``accuracy`` of each shape, [B] float64.

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
    """The scores of batches as those of all shapes."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def mean_figures(scores: dict[str, np.ndarray], ending: str) -> dict[str, float]:
    """``NAME_ending`` and its standard error ``NAME_ending_std`` for each score."""
    found: dict[str, float] = {}
    for name, numbers in scores.items():
        found |= {f"{name}_{ending}": float(numbers.mean()), f"{name}_{ending}_std": standard_error(numbers)}
    return found
