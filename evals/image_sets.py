"""How far drawn pictures are from real ones, each metric beside its controls and with its standard error."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evals.features.extractor import Extractor
from evals.metrics.frechet import Moments, frechet_distance, moments_of
from evals.metrics.kernel import kernel_distance_of_subsets, kernel_distance_with_spread
from evals.metrics.neighbours import nearest_neighbour_distances, novelty_ratio, unit_of_novelty
from evals.metrics.precision_recall import knn_radii, precision_recall
from evals.metrics.uncertainty import (
    GROUPS,
    GroupedFeatures,
    frechet_at_infinity,
    frechet_at_infinity_spread,
    frechet_spread,
    standard_error,
)
from mnif.data.dataset import Split
from mnif.data.images import ImageData
from mnif.utils.errors import UserError


@dataclass(frozen=True)
class Reference:
    """The real pictures that drawn ones are compared with.

    Attributes:
        rows: of the data, those compared with.
        floor: of the data, those that stand for perfect samples.
        floor_rows: what the floor is compared with; a part of ``rows``.
        count: drawn pictures that are compared, no more than this if it is not None.
    """

    rows: np.ndarray
    floor: np.ndarray
    floor_rows: np.ndarray
    count: int | None


def reference_of(data: ImageData, splits: np.ndarray, part: str) -> Reference:
    """Chooses the part of the data that a protocol compares with.

    "half": half of the designs; the other half is the floor, and samples are no more than it has, so that both
    distances have the same bias. "train" and "all": the floor is one half of their designs against the other.

    Raises:
        UserError: the data are too few.
    """
    chosen = splits == Split.TRAIN if part == "train" else np.full(len(data), True)
    half = data.held_out(0.5)
    first, second = np.flatnonzero(chosen & half), np.flatnonzero(chosen & ~half)
    if min(len(first), len(second)) < GROUPS:
        raise UserError(
            f"--reference {data.name}: {len(first)} and {len(second)} pictures in the two halves of its designs; "
            f"at least {GROUPS} in each are needed"
        )
    if part == "half":
        return Reference(first, np.random.default_rng(0).permutation(second), first, len(second))
    return Reference(np.flatnonzero(chosen), second, first, None)


def set_metrics(
    features: Mapping[str, np.ndarray],
    real: np.ndarray,
    reference: Reference,
    extractor: Extractor,
    neighbours: int,
) -> dict[str, float]:
    """Measures each set of drawn pictures, and the floor, against real ones.

    Args:
        features: what a set's metrics end with ("" for the samples, "_gaussian" …) → [n, D].
        real: features of all real pictures.
        reference: the rows compared with.
        extractor: names the metrics.
        neighbours: k of precision, recall, density and coverage.

    Returns:
        For each set the Fréchet distance, the kernel distance, precision, recall, density and coverage, each with its
        standard error ``NAME_std``; for the samples also the Fréchet distance at infinity and the kernel
        distance over subsets.

    Raises:
        UserError: too few samples, or features that are not finite.
    """
    drawn = {name: rows[: reference.count] for name, rows in features.items()}
    floor = {"_floor": real[reference.floor[: len(drawn[""]) if reference.count is not None else None]]}
    metrics = _metrics(drawn, real[reference.rows], extractor, neighbours)
    metrics |= _metrics(floor, real[reference.floor_rows], extractor, neighbours)
    samples, others = drawn[""], real[reference.rows]
    metrics |= _infinity(GroupedFeatures(samples), moments_of(others), extractor)
    mean, spread = kernel_distance_of_subsets(samples, others)
    return metrics | {f"{extractor.kernel}_subset_mean": mean, f"{extractor.kernel}_subset_std": spread}


def frechet_metrics(features: Mapping[str, np.ndarray], reference: Moments, extractor: Extractor) -> dict[str, float]:
    """Measures the Fréchet distances of sets of drawn pictures from statistics alone, with standard errors.

    Args:
        features: as for :func:`set_metrics`.
        reference: the statistics.
        extractor: names the metrics.

    Raises:
        UserError: too few samples, other features than the statistics have, or features that are not finite.
    """
    metrics: dict[str, float] = {}
    for ending, rows in features.items():
        grouped, name = GroupedFeatures(rows), f"{extractor.frechet}{ending}"
        metrics[name] = frechet_distance(grouped.moments(), reference)
        metrics[f"{name}_std"] = frechet_spread(grouped, reference)
        if ending == "":
            metrics |= _infinity(grouped, reference, extractor)
    return metrics


def novelty_metrics(
    samples: np.ndarray, held_out: np.ndarray, train: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """Measures ``nn_ratio`` with its standard error, if anything was held out, and finds neighbours.

    All are features [·, D].

    Returns:
        The metrics, and the row of the nearest training picture of every sample, [N].

    Raises:
        UserError: half of the held-out pictures are training pictures.
    """
    distances, nearest = nearest_neighbour_distances(samples, train)
    if not len(held_out):
        return {}, nearest
    ratio, std = novelty_ratio(distances, unit_of_novelty(held_out, train))
    return {"nn_ratio": ratio, "nn_ratio_std": std}, nearest


def _metrics(
    sets: Mapping[str, np.ndarray], real: np.ndarray, extractor: Extractor, neighbours: int
) -> dict[str, float]:
    moments, real_radii = moments_of(real), knn_radii(real, neighbours)
    metrics: dict[str, float] = {}
    for name, rows in sets.items():
        grouped = GroupedFeatures(rows)
        distance, spread = kernel_distance_with_spread(rows, real)
        metrics |= {
            f"{extractor.frechet}{name}": frechet_distance(grouped.moments(), moments),
            f"{extractor.frechet}{name}_std": frechet_spread(grouped, moments),
            f"{extractor.kernel}{name}": distance,
            f"{extractor.kernel}{name}_std": spread,
        }
        quality = precision_recall(rows, real, neighbours, real_radii)
        for metric in ("precision", "recall", "density", "coverage"):
            values = getattr(quality, metric)
            metrics[f"{metric}_{extractor.suffix}{name}"] = float(values.mean())
            metrics[f"{metric}_{extractor.suffix}{name}_std"] = standard_error(values)
    return metrics


def _infinity(samples: GroupedFeatures, reference: Moments, extractor: Extractor) -> dict[str, float]:
    name = f"{extractor.frechet}_infinity"
    return {
        name: frechet_at_infinity(samples, reference),
        f"{name}_std": frechet_at_infinity_spread(samples, reference),
    }
