"""Distances from instances to their nearest neighbours: are samples new, or copies of what was trained on?"""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from evals.metrics.uncertainty import spread_over_halves, standard_error
from mnif.latents.table import LatentTable
from mnif.utils.errors import UserError


def nearest_neighbour_distances(
    queries: np.ndarray, references: np.ndarray, chunk: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest reference of every query, exactly.

    Args:
        queries: [N, D].
        references: [R, D]; a query that is among them finds itself.
        chunk: queries at a time; a matrix of [chunk, R] float64 is held.

    Returns:
        Euclidean distances [N] float64, exactly 0 for a copy, and indices of the references [N] int64.

    Raises:
        UserError: not two-dimensional, different dimensions, no references, a chunk below 1, or values that are not
            finite.
    """
    queries, references = np.asarray(queries, dtype=np.float64), np.asarray(references, dtype=np.float64)
    if queries.ndim != 2 or references.ndim != 2 or queries.shape[1] != references.shape[1] or not len(references):
        raise UserError(
            f"neighbours: {list(queries.shape)} against {list(references.shape)}; [N, D], [R, D] is needed"
        )
    if not (np.isfinite(queries).all() and np.isfinite(references).all()):
        raise UserError("neighbours: the features hold NaN or infinity; look at what they come from")
    if chunk < 1:
        raise UserError(f"neighbours: a chunk of {chunk}; at least 1 is needed")
    centre = references.mean(axis=0)  # far from the origin |q|² + |r|² − 2qr would cancel to nothing
    centred = references - centre
    lengths = np.square(centred).sum(axis=1)
    distances, indices = np.empty(len(queries)), np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        indices[rows] = np.argmin(lengths - 2 * (queries[rows] - centre) @ centred.T, axis=1)
        # The product only picks the winner: its own rounding would give a copy a distance above zero.
        distances[rows] = np.linalg.norm(queries[rows] - references[indices[rows]], axis=1)
    return distances, indices


def novelty_ratio(distances: np.ndarray, unit: float) -> tuple[float, float]:
    """Tells how close samples come to training instances, by the measure of real instances that were held out.

    About 1: samples are as new as real unseen data. Well below 1: training instances are copied. Above 1: samples lie
    away from the data.

    Args:
        distances: [N] from each sample to its nearest training instance.
        unit: the median of such distances of held-out instances (:func:`unit_of_novelty`).

    Returns:
        The median of the distances in this unit, and its standard error.
    """
    return float(np.median(distances)) / unit, spread_over_halves(
        distances, lambda some: float(np.median(some))
    ) / unit


def unit_of_novelty(held_out: np.ndarray, train: np.ndarray) -> float:
    """Computes the median distance of held-out instances to their nearest training instance: novelty's unit.

    Raises:
        UserError: as :func:`nearest_neighbour_distances`; no held-out instances; or half of them are training
            instances, so that there is nothing to measure by.
    """
    if not len(held_out):
        raise UserError("nn_ratio: 0 held-out instances; some are needed")
    unit = float(np.median(nearest_neighbour_distances(held_out, train)[0]))
    if unit == 0:
        raise UserError("nn_ratio: half of the held-out instances are in the training set; split the data again")
    return unit


def are_copies(distances: np.ndarray, held_out: np.ndarray, train: np.ndarray, quantile: float = 0.05) -> np.ndarray:
    """Tells which samples lie nearer to training instances than all but a few held-out instances do, [N] bool.

    A median hides a prior that copies half of the time and draws something unseen the other half; the share of these
    does not. A prior that draws as new instances as the held-out ones has a share of ``quantile``.

    Args:
        distances: [N] from each sample to its nearest training instance.
        held_out: [H, D] of real instances that were kept out of training, without their near duplicates.
        train: [R, D] of the training instances.
        quantile: how many of the held-out instances may be nearer than the threshold.

    Raises:
        UserError: as :func:`nearest_neighbour_distances`.
    """
    return distances < np.quantile(nearest_neighbour_distances(held_out, train)[0], quantile)


COPYING_BELOW = 0.9

EXPECTED_SHARE = 0.05  # of samples that do not copy, by the definition of are_copies


def memorisation_metrics(samples: np.ndarray, table: LatentTable) -> dict[str, float]:
    """Measures how near sampled latents [N, D] lie to training ones, in units of held-out ones, with standard errors.

    All are standardised per dimension, as the prior sees them.
    """
    mean, scale = (statistic.numpy() for statistic in table.mean_and_std())
    sets = (samples, table.latents[table.held_out].numpy(), table.train.numpy())
    drawn, held_out, train = ((latents - mean) / scale for latents in sets)
    distances, _ = nearest_neighbour_distances(drawn, train)
    ratio, std = novelty_ratio(distances, unit_of_novelty(held_out, train))
    copies = are_copies(distances, held_out, train)
    return {
        "nn_ratio_latents": ratio,
        "nn_ratio_latents_std": std,
        "copied_share_latents": float(copies.mean()),
        "copied_share_latents_std": standard_error(copies),
    }


FEWEST_HELD_OUT = 20
"""Of fewer held-out instances no twentieth can be told apart, and their median is anything."""

Copying = Literal["none", "at times", "copies", "unknown"]


def held_out_count(metrics: Mapping[str, Any]) -> int | None:
    """Reads from an evaluation's protocol how many instances were held out; None if it does not say."""
    protocol = metrics.get("protocol", {})
    counts = (protocol.get(f"held_out_{noun}") for noun in ("images", "shapes", "objects"))
    return next((count for count in counts if isinstance(count, int)), None)


def copying_of(metrics: Mapping[str, Any]) -> Copying | None:
    """Tells what the metrics of memorisation mean; None if they are missing.

    In pictures the decoder's blur keeps even a copy away from its original, so the smaller of the two ratios counts.
    """
    ratios = [metrics[name] for name in ("nn_ratio", "nn_ratio_latents") if name in metrics]
    if not ratios:
        return None
    held_out = held_out_count(metrics)
    if held_out is not None and held_out < FEWEST_HELD_OUT:
        return "unknown"
    if min(ratios) < COPYING_BELOW:
        return "copies"
    return "at times" if metrics.get("copied_share_latents", 0.0) > 2 * EXPECTED_SHARE else "none"


def copying_verdict(metrics: Mapping[str, Any], noun: str = "instance") -> str | None:
    """Says :func:`copying_of` in words, in which an instance is called ``noun``."""
    copying = copying_of(metrics)
    if copying is None:
        return None
    if copying == "unknown":
        return (
            f"cannot be judged: {held_out_count(metrics)} {noun}s were held out, and at least {FEWEST_HELD_OUT} are "
            "needed to know how near unseen ones lie"
        )
    if copying == "copies":
        return f"copies: its samples lie nearer to training {noun}s than unseen {noun}s do"
    if copying == "at times":
        share = metrics["copied_share_latents"]
        return f"copies at times: {share:.0%} of its samples are nearer to a training {noun} than 95 % of unseen ones"
    return (
        f"does not copy more than unseen {noun}s do: its samples lie as far from training {noun}s as those, which "
        "may themselves be variants of training designs"
    )
