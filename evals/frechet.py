"""The Fréchet distance between two sets of features, each taken as a Gaussian.

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

(Dowson and Landau, J. Multivariate Analysis 1982; on network features: Heusel et al., NeurIPS 2017.) Moments are kept
in float64 and covariances divide by n − 1. As is the custom, the *squared* distance is what is reported.
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mnif.errors import UserError
from mnif.files import written_atomically

_NEGATIVE_TOLERANCE = 1e-6  # of the largest eigenvalue; what float32 statistics leave of a zero


@dataclass(frozen=True, eq=False)
class Moments:
    """A set of features seen as a Gaussian.

    Attributes:
        mean: [D] float64.
        covariance: [D, D] float64, unbiased.
        count: how many samples they were taken from, at least 2.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int


class MomentSums:
    """n, Σx and Σxxᵀ in float64, from which moments follow; sums of parts add up, so parts may come in any order.

    Attributes:
        count: samples seen.
        total: [D] their sum.
        outer: [D, D] the sum of their outer products.
    """

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self.total = np.zeros(dimension)
        self.outer = np.zeros((dimension, dimension))

    def update(self, features: np.ndarray) -> None:
        """Takes in ``features`` [n, D].

        Raises:
            UserError: another shape, or values that are not finite.
        """
        features = _checked(features, len(self.total))
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.outer += features.T @ features

    def merge(self, other: "MomentSums") -> None:
        """Takes in what another process or shard has summed."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def moments(self) -> Moments:
        """Mean and covariance of all samples so far.

        Raises:
            UserError: fewer than two samples.
        """
        _check_count(self.count)
        mean = self.total / self.count
        covariance = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Moments(mean, covariance, self.count)


def moments_of(features: np.ndarray) -> Moments:
    """Mean and covariance of ``features`` [N, D].

    Raises:
        UserError: not two-dimensional, fewer than two samples, or values that are not finite.
    """
    features = _checked(features)
    sums = MomentSums(features.shape[1])
    sums.update(features)
    return sums.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Fréchet distance between two Gaussians, at least 0.

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: unlike the root
    of the product itself it cannot come out complex.

    Raises:
        UserError: different dimensions, values that are not finite, or a covariance with truly negative eigenvalues.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"Fréchet distance: {len(a.mean)} features against {len(b.mean)}; use one extractor for both")
    for moments in (a, b):
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
            raise UserError("Fréchet distance: the moments hold NaN or infinity; compute them again")
    eigenvalues, eigenvectors = np.linalg.eigh(a.covariance)
    root = eigenvectors * np.sqrt(_without_tiny_negatives(eigenvalues))  # its columns; root @ root.T is Σ₁
    product = np.linalg.eigvalsh(root.T @ b.covariance @ root)
    overlap = np.sqrt(_without_tiny_negatives(product)).sum()
    return _distance(a.mean, b.mean, np.trace(a.covariance), np.trace(b.covariance), overlap)


def frechet_distance_from_features(x: np.ndarray, y: np.ndarray) -> float:
    """The squared Fréchet distance between ``x`` [N, D] and ``y`` [M, D], at least 0.

    With fewer samples than features on a side the covariances are never formed: Σ = AᵀA for the centred samples A,
    and tr (Σ₁ Σ₂)^½ is the nuclear norm of A₁ A₂ᵀ. That is faster, and exact where the covariance is singular.

    Raises:
        UserError: not two-dimensional, different dimensions, fewer than two samples, or values that are not finite.
    """
    x, y = _checked(x), _checked(y, np.shape(x)[1])
    if min(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(moments_of(x), moments_of(y))
    _check_count(min(len(x), len(y)))
    centred_x = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    centred_y = (y - y.mean(axis=0)) / np.sqrt(len(y) - 1)
    overlap = np.linalg.svd(centred_x @ centred_y.T, compute_uv=False).sum()
    return _distance(x.mean(axis=0), y.mean(axis=0), np.square(centred_x).sum(), np.square(centred_y).sum(), overlap)


def save_moments(path: Path, moments: Moments, protocol: str) -> None:
    """Writes ``.npz`` statistics: ``mu`` and ``sigma``, which FID programs read, with ``num`` and ``protocol``.

    The file is whole or not there at all: it is written under a temporary name and then renamed.

    Args:
        path: of the file, ending in ``.npz``.
        moments: what to keep.
        protocol: all that must agree for distances to be comparable: extractor, data set, split, resolution.
    """
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.covariance, num=moments.count, protocol=np.str_(protocol))


def load_moments(path: Path, protocol: str) -> Moments:
    """The moments :func:`save_moments` wrote under the same ``protocol``.

    Raises:
        UserError: the file is missing or broken, or states another protocol or none.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            found = str(file["protocol"])
            moments = Moments(file["mu"], file["sigma"], int(file["num"]))
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: no statistics with mu, sigma, num and protocol ({error}); delete it") from None
    if found != protocol:
        raise UserError(f"{path}: made under the protocol {found}, not {protocol}; delete it or name another file")
    return moments


def _distance(mean_x: np.ndarray, mean_y: np.ndarray, trace_x: float, trace_y: float, overlap: float) -> float:
    distance = np.square(mean_x - mean_y).sum() + trace_x + trace_y - 2 * overlap
    return max(float(distance), 0.0)  # analytically never negative, so what is below zero is rounding


def _without_tiny_negatives(eigenvalues: np.ndarray) -> np.ndarray:
    if eigenvalues[0] < -_NEGATIVE_TOLERANCE * abs(eigenvalues[-1]):
        raise UserError(f"Fréchet distance: a covariance has the eigenvalue {eigenvalues[0]:.3g}; compute it again")
    return np.maximum(eigenvalues, 0.0)


def _checked(features: np.ndarray, dimension: int | None = None) -> np.ndarray:
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[1] != (dimension or features.shape[1]):
        raise UserError(f"features are {list(features.shape)}; [N, {dimension or 'D'}] is needed")
    if not np.isfinite(features).all():
        raise UserError("features hold NaN or infinity; look at the pictures they come from")
    return features


def _check_count(count: int) -> None:
    if count < 2:
        raise UserError(f"Fréchet distance: {count} samples; at least 2 are needed")
