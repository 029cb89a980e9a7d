"""How close values come to exact ones.

This file stands by itself (Python 3.8, NumPy) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

import numpy as np


def peak_of(exact: np.ndarray) -> float:
    """2, the width of [-1, 1], or twice the largest magnitude where that is above 1 (densities, coefficients)."""
    return 2 * max(1.0, float(np.abs(exact).max()))


def psnr(values: np.ndarray, exact: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB, 206 at most for a peak of 2."""
    error = float(np.mean((values.astype(np.float64) - exact) ** 2))
    return float(10 * np.log10(peak_of(exact) ** 2 / max(error, 1e-20)))
