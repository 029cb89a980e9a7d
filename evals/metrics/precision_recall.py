"""Are samples like real instances (precision, density), and are all real instances met (recall, coverage)?

Each set is seen as balls around its instances that reach to the k-th nearest of the same set (Kynkäänniemi et al.,
Improved Precision and Recall Metric, NeurIPS 2019; Naeem et al., Reliable Fidelity and Diversity Metrics, ICML 2020).
"""

from dataclasses import dataclass

import numpy as np

from evals.metrics.frechet import checked_features
from mnif.utils.errors import UserError

_TILE = 1024


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """What each instance says of the overlap of two sets; every metric is the mean of one of these.

    Attributes:
        precision: [N] bool, which samples lie in a real instance's ball.
        density: [N] how many real balls a sample lies in, over k.
        recall: [M] bool, which real instances lie in a sample's ball.
        coverage: [M] bool, which real balls have a sample in them.
    """

    precision: np.ndarray
    density: np.ndarray
    recall: np.ndarray
    coverage: np.ndarray


def precision_recall(
    samples: np.ndarray, real: np.ndarray, neighbours: int, real_radii: np.ndarray | None = None
) -> PrecisionRecall:
    """Compares every pair, exactly, in tiles: memory does not grow with the number of pairs.

    Args:
        samples: [N, D] features.
        real: [M, D].
        neighbours: k, the neighbour a ball reaches to.
        real_radii: ``knn_radii(real, neighbours)``, if it is known already.

    Raises:
        UserError: a set has no k-th neighbour, different dimensions, or values that are not finite.
    """
    if not 1 <= neighbours < min(len(samples), len(real)):
        raise UserError(
            f"--neighbours {neighbours}: must be at least 1 and less than both counts, {len(samples)} samples and "
            f"{len(real)} real instances"
        )
    real_radii = knn_radii(real, neighbours) if real_radii is None else real_radii
    sample_radii = knn_radii(samples, neighbours)
    inside, met = np.zeros(len(samples), dtype=np.int64), np.zeros(len(real), dtype=bool)
    covered = np.zeros(len(real), dtype=bool)
    for rows in _tiles(len(samples)):
        for columns in _tiles(len(real)):
            squares = _squared_distances(samples[rows], real[columns])
            in_real = squares < real_radii[columns]
            inside[rows] += in_real.sum(axis=1)
            covered[columns] |= in_real.any(axis=0)
            met[columns] |= (squares < sample_radii[rows, None]).any(axis=0)
    return PrecisionRecall(inside > 0, inside / neighbours, met, covered)


def knn_radii(features: np.ndarray, neighbours: int) -> np.ndarray:
    """Finds the squared distance of every instance [N, D] to its k-th nearest of the others, [N]."""
    squared = np.empty(len(features))
    for rows in _tiles(len(features)):
        nearest = np.empty((rows.stop - rows.start, 0))
        for columns in _tiles(len(features)):
            squares = _squared_distances(features[rows], features[columns])
            if rows == columns:
                np.fill_diagonal(squares, np.inf)
            nearest = np.concatenate([nearest, squares], axis=1)
            if nearest.shape[1] > neighbours:
                nearest = np.partition(nearest, neighbours - 1, axis=1)[:, :neighbours]
        squared[rows] = nearest.max(axis=1)
    return squared


def _tiles(count: int) -> list[slice]:
    return [slice(start, min(start + _TILE, count)) for start in range(0, count, _TILE)]


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = checked_features(x), checked_features(y, np.shape(x)[1])
    squares = np.square(x).sum(axis=1)[:, None] - 2 * x @ y.T + np.square(y).sum(axis=1)
    return np.maximum(squares, 0.0)
