"""Are samples new? How near sampled latents lie to training latents, and what to make of it."""

from typing import Any

import numpy as np

from evals.metrics.manifold import are_copies, nearest_neighbour_distances, unit_of_novelty
from evals.metrics.spread import spread_over_halves, standard_error
from mnif.latents import LatentTable

COPYING_BELOW = 0.9
EXPECTED_SHARE = 0.05  # of samples that do not copy, by the definition of copied_share


def memorisation_figures(samples: np.ndarray, table: LatentTable) -> dict[str, float]:
    """How near sampled latents [N, D] lie to training latents, by the measure of held-out ones, with standard errors.

    All are standardised per dimension, as the prior sees them.
    """
    mean, std = (statistic.numpy() for statistic in table.mean_and_std())
    parts = (samples, table.latents[table.held_out].numpy(), table.train.numpy())
    drawn, held_out, train = ((part - mean) / std for part in parts)
    distances, _ = nearest_neighbour_distances(drawn, train)
    unit, copies = unit_of_novelty(held_out, train), are_copies(distances, held_out, train)
    return {
        "nn_ratio_latents": float(np.median(distances)) / unit,
        "nn_ratio_latents_std": spread_over_halves(distances, lambda some: float(np.median(some))) / unit,
        "copied_share_latents": float(copies.mean()),
        "copied_share_latents_std": standard_error(copies),
    }


def copying_verdict(figures: dict[str, Any]) -> str | None:
    """What the memorisation figures say, in words; None if they are missing.

    In pictures the decoder's blur keeps even a copy away from its original, so the smaller of the two ratios counts.
    """
    ratios = [figures[name] for name in ("nn_ratio", "nn_ratio_latents") if name in figures]
    if not ratios:
        return None
    if min(ratios) < COPYING_BELOW:
        return "copies: its samples lie nearer to training pictures than unseen pictures do"
    share = figures.get("copied_share_latents", 0.0)
    if share > 2 * EXPECTED_SHARE:
        return f"copies at times: {share:.0%} of its samples are nearer to a training picture than 95 % of unseen ones"
    return (
        "does not copy more than unseen pictures do: its samples lie as far from training pictures as those, which "
        "may themselves be variants of training designs"
    )
