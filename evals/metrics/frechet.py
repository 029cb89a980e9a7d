"""The Fréchet distance between two sets of features, each taken as a Gaussian.

    d² = |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

(Dowson and Landau, J. Multivariate Analysis 1982; on network features: Heusel et al., NeurIPS 2017.) Moments are kept
in float64 and covariances divide by n − 1. As is the custom, the *squared* distance is what is reported.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mnif.data.arrays import npz_arrays, npz_names
from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically
from mnif.utils.json_files import parse_json

_NEGATIVE_TOLERANCE = 1e-6  # of the largest eigenvalue; what float32 statistics leave of a zero

_ROWS_AT_ONCE = 4096

_STATISTICS = "mu, sigma, num and protocol"


@dataclass(frozen=True, eq=False)
class Moments:
    """A set of features seen as a Gaussian.

    Attributes:
        mean: [D] float64.
        covariance: [D, D] float64, unbiased.
        count: how many samples they were taken from, at least 2.
        factor: [n, D] float64 with factorᵀ factor = covariance, the centred samples over √(n − 1), if there are fewer
            samples n than features.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    factor: np.ndarray | None = None

    @cached_property
    def root(self) -> np.ndarray:
        """[D, D] with root rootᵀ = covariance; kept, because one reference is compared with many sets."""
        eigenvalues, eigenvectors = np.linalg.eigh(self.covariance)
        return eigenvectors * np.sqrt(_without_tiny_negatives(eigenvalues))


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
        features = checked_features(features, len(self.total))
        self.count += len(features)
        self.total += features.sum(axis=0)
        self.outer += features.T @ features

    def merge(self, other: "MomentSums") -> None:
        """Takes in what another process or shard has summed."""
        self.count += other.count
        self.total += other.total
        self.outer += other.outer

    def moments(self) -> Moments:
        """Computes mean and covariance of all samples so far.

        Raises:
            UserError: fewer than two samples.
        """
        _check_count(self.count)
        mean = self.total / self.count
        covariance = (self.outer - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Moments(mean, covariance, self.count)


def moments_of(features: np.ndarray) -> Moments:
    """Computes mean and covariance of ``features`` [N, D], read a few thousand rows at a time.

    Raises:
        UserError: not two-dimensional, fewer than two samples, or values that are not finite.
    """
    if np.ndim(features) != 2 or len(features) < np.shape(features)[1]:
        return _few_moments(checked_features(features))
    sums = MomentSums(features.shape[1])
    for start in range(0, len(features), _ROWS_AT_ONCE):
        sums.update(features[start : start + _ROWS_AT_ONCE])
    return sums.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Computes the squared Fréchet distance between two Gaussians, at least 0.

    tr (Σ₁ Σ₂)^½ is the sum of the square roots of the eigenvalues of Σ₂^½ Σ₁ Σ₂^½, which is symmetric: unlike the root
    of the product itself it cannot come out complex. Where both sides have fewer samples than features, it is the
    nuclear norm of A₁ A₂ᵀ (Σ = AᵀA); where one has, A₁ Σ₂ A₁ᵀ is the smaller matrix.

    Args:
        a: one Gaussian.
        b: the other; give the one that is compared with many here, its root is kept.

    Raises:
        UserError: different dimensions, values that are not finite, or a covariance with truly negative eigenvalues.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"Fréchet distance: {len(a.mean)} features against {len(b.mean)}; use one extractor for both")
    for moments in (a, b):
        if not (np.isfinite(moments.mean).all() and np.isfinite(moments.covariance).all()):
            raise UserError("Fréchet distance: the moments hold NaN or infinity; compute them again")
    trace = np.trace(a.covariance) + np.trace(b.covariance)
    distance = np.square(a.mean - b.mean).sum() + trace - 2 * _trace_of_root(a, b)
    return max(float(distance), 0.0)  # analytically never negative, so what is below zero is rounding


def frechet_distance_from_features(x: np.ndarray, y: np.ndarray) -> float:
    """Computes the squared Fréchet distance between ``x`` [N, D] and ``y`` [M, D], at least 0.

    Raises:
        UserError: not two-dimensional, different dimensions, fewer than two samples, or values that are not finite.
    """
    return frechet_distance(moments_of(x), moments_of(y))


def save_moments(path: Path, moments: Moments, protocol: Mapping[str, str]) -> None:
    """Writes ``.npz`` statistics: ``mu`` and ``sigma``, which FID programs read, with ``num`` and ``protocol``.

    The file is whole or not there at all: it is written under a temporary name and then renamed.

    Args:
        path: of the file, ending in ``.npz``.
        moments: what to keep.
        protocol: all that must agree for distances to be comparable, and what else a reader should know.
    """
    text = np.str_(json.dumps(dict(protocol), sort_keys=True))
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=moments.mean, sigma=moments.covariance, num=moments.count, protocol=text)


def is_statistics(path: Path) -> bool:
    """Tells whether a file holds statistics rather than data."""
    return path.suffix == ".npz" and path.is_file() and "mu" in npz_names(path)


def load_moments(path: Path, protocol: Mapping[str, str]) -> Moments:
    """Loads what :func:`save_moments` wrote under a protocol that agrees in everything ``protocol`` states.

    Raises:
        UserError: the file is missing or broken, or states another protocol or none.
    """
    arrays = npz_arrays(path, _STATISTICS, ("mu", "sigma", "num", "protocol"))
    try:
        found = parse_json(str(arrays["protocol"][()]).encode(), dict[str, str], "its protocol")
        moments = Moments(arrays["mu"], arrays["sigma"], int(arrays["num"][()]))
        _check_moments(moments)
    except (UserError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: no statistics with mu, sigma, num and protocol ({error}); delete it") from None
    for name, value in protocol.items():
        if found.get(name) != value:
            raise UserError(
                f"{path}: made with {name} {found.get(name)!r:.80}, not {value!r:.80}; make it again with these"
            )
    return moments


def _check_moments(moments: Moments) -> None:
    """Raises a ValueError unless they are finite, at least two samples', and of one dimension."""
    mean, covariance = moments.mean, moments.covariance
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise ValueError(f"mu is {list(mean.shape)}, sigma {list(covariance.shape)}; [D] and [D, D] are needed")
    if not all(array.dtype.kind == "f" and np.isfinite(array).all() for array in (mean, covariance)):
        raise ValueError("mu or sigma holds something else than finite numbers")
    if moments.count < 2:
        raise ValueError(f"{moments.count} samples; at least 2 are needed")


def _trace_of_root(a: Moments, b: Moments) -> float:
    """Computes tr (Σ₁ Σ₂)^½."""
    if a.factor is not None and b.factor is not None:
        return float(np.linalg.svd(a.factor @ b.factor.T, compute_uv=False).sum())
    if b.factor is not None:
        a, b = b, a
    product = a.factor @ b.covariance @ a.factor.T if a.factor is not None else b.root.T @ a.covariance @ b.root
    return float(np.sqrt(_without_tiny_negatives(np.linalg.eigvalsh(product))).sum())


def _few_moments(features: np.ndarray) -> Moments:
    _check_count(len(features))
    mean = features.mean(axis=0)
    factor = (features - mean) / np.sqrt(len(features) - 1)
    return Moments(mean, factor.T @ factor, len(features), factor)


def _without_tiny_negatives(eigenvalues: np.ndarray) -> np.ndarray:
    if eigenvalues[0] < -_NEGATIVE_TOLERANCE * abs(eigenvalues[-1]):
        raise UserError(f"Fréchet distance: a covariance has the eigenvalue {eigenvalues[0]:.3g}; compute it again")
    return np.maximum(eigenvalues, 0.0)


def checked_features(features: np.ndarray, dimension: int | None = None) -> np.ndarray:
    """Converts features to float64.

    Raises:
        UserError: not [N, D], or values that are not finite.
    """
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or features.shape[1] != (dimension or features.shape[1]):
        raise UserError(f"features are {list(features.shape)}; [N, {dimension or 'D'}] is needed")
    if not np.isfinite(features).all():
        raise UserError("features hold NaN or infinity; look at the pictures they come from")
    return features


def _check_count(count: int) -> None:
    if count < 2:
        raise UserError(f"Fréchet distance: {count} samples; at least 2 are needed")
