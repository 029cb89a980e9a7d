"""How a profile is made of held-out instances.

Half of them make the scores (means, covariances, how rare a score is), the other half, which no score has seen, the
thresholds (split conformal prediction: Vovk, Gammerman and Shafer, 2005; Lei et al., 2018). Instances of one group
stay in one half, and one of them alone counts for a threshold, as variants of a design are no evidence of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.latents import surprise
from mnif.latents.patches import observed_grid, patch_statistics, patches_of
from mnif.latents.profile import FALSE_ALARM_RATE, FULL_COVARIANCE, Profile, ProfileRecord
from mnif.latents.surprise import SCORES, STATISTICS, TAIL
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.utils.errors import UserError

_FOLDS = 5
_LEAST_SHAPED = 10  # instances that make the scores
_REFERENCE = 1000  # instances kept to compare others with
# Of the false alarms, for each score. Where grain and sharpness are out they are far out; strength and layout need the
# room.
_SHARES = {
    "residual": 0.05,
    "patch": 0.05,
    "latent": 0.05,
    "sharpness": 0.09,
    "grain": 0.09,
    "strength": 0.36,
    "layout": 0.31,
}


def check_enough(instances: int, rate: float) -> None:
    """Refuses held-out instances that are too few for a false-alarm rate.

    Raises:
        UserError: they are too few; the message says how many are needed.
    """
    if not 0 < rate < 1:
        raise UserError(f"--false_alarm_rate {rate:g}: must lie between 0 and 1")
    needed = 2 * max(math.ceil(1 / rate - 1e-9) - 1, _LEAST_SHAPED)
    if instances < needed:
        raise UserError(
            f"{instances} held-out instances: a false-alarm rate of {rate:g} needs {needed} at least (half of them "
            "set the threshold); hold more out, or ask for a higher --false_alarm_rate"
        )


def fit_profile(
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    groups: Sequence[str],
    latents: Tensor,
    data: str,
    rate: float = FALSE_ALARM_RATE,
    refinement_steps: int = 0,
    refined: tuple[Tensor, int] | None = None,
) -> Profile:
    """Makes a profile of held-out instances.

    Args:
        decoder: the model.
        signal: the model's.
        rows: N instances that the model has not learned from.
        groups: of each; those of one group are no independent evidence.
        latents: [N, D], found as those to be judged will be.
        data: the name of the data.
        rate: false alarms, unless told otherwise later.
        refinement_steps: by which the latents were found; 0: by the model's encoder or inner loop alone.
        refined: the latents after refinement, and its steps, if that was done.

    Raises:
        UserError: the instances are too few for the rate, or have no patches.
    """
    check_enough(len(rows), rate)
    grid = observed_grid(signal, rows)
    patches = patches_of(grid)
    statistics = patch_statistics(decoder, signal, rows, latents, patches)
    numbers = latents.cpu().numpy()
    arrays, calibrating = fit_arrays(numbers, statistics, groups, rate)
    if refined is not None:
        arrays["gaps"] = np.sort(refinement_gaps(numbers, refined[0].cpu().numpy())[calibrating])
    record = ProfileRecord(
        fingerprints=[decoder.fingerprint(), *decoder.rounded_fingerprints()],
        data=data,
        instances=len(rows),
        false_alarm_rate=rate,
        patches=patches,
        grid=grid,
        statistics=list(STATISTICS),
        scores=list(SCORES),
        refinement_steps=refinement_steps,
        gap_steps=0 if refined is None else refined[1],
    )
    return Profile(record, arrays)


def refinement_gaps(first: np.ndarray, refined: np.ndarray) -> np.ndarray:
    """Root mean square over a latent's numbers of the way that refinement took, [N]."""
    return np.sqrt(np.square(refined.astype(np.float64) - first).mean(axis=1))


def fit_arrays(
    latents: np.ndarray, statistics: Mapping[str, np.ndarray], groups: Sequence[str], rate: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Makes a profile's arrays.

    Args:
        latents: [N, D].
        statistics: of the patches, each [N, P].
        groups: of each instance.
        rate: of false alarms.

    Returns:
        The arrays, and the rows that set the thresholds.

    Raises:
        UserError: there are too few groups.
    """
    parts = _parts(groups, 2)
    shaping, calibrating = np.flatnonzero(parts == 0), np.flatnonzero(parts == 1)
    # Variants are no evidence of their own.
    calibrating = calibrating[one_of_each([groups[row] for row in calibrating.tolist()])]
    least = math.ceil(1 / rate - 1e-9) - 1
    if min(len(shaping) - _LEAST_SHAPED, len(calibrating) - least) < 0:
        raise UserError(f"{len(set(groups))} groups among {len(groups)} held-out instances: too few to make halves of")
    arrays = _shapes(latents[shaping], _rows(statistics, shaping))
    # How rare a score is can only be told on instances that its means and covariances have not seen.
    scores, folds = np.empty((len(shaping), len(SCORES))), _parts([groups[row] for row in shaping.tolist()], _FOLDS)
    for fold in range(_FOLDS):
        seen, unseen = shaping[folds != fold], shaping[folds == fold]
        if len(unseen):
            shapes = _shapes(latents[seen], _rows(statistics, seen))
            scores[folds == fold] = surprise.scores_of(shapes, latents[unseen], _rows(statistics, unseen))
    arrays |= _tails(scores)
    of_others = surprise.scores_of(arrays, latents[calibrating], _rows(statistics, calibrating))
    arrays["alarms"] = np.sort(surprise.alarms_of(arrays, surprise.surprises_of(arrays, of_others)))
    arrays["reference_latents"] = latents[calibrating][:_REFERENCE].astype(np.float32)
    arrays["reference_scores"] = of_others[:_REFERENCE]
    return arrays, calibrating


def _rows(statistics: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: values[rows] for name, values in statistics.items()}


def one_of_each(groups: Sequence[str]) -> np.ndarray:
    """Picks the first row of each group: rows that are independent of one another."""
    return np.sort(np.unique(np.asarray(groups), return_index=True)[1])


def _parts(groups: Sequence[str], count: int) -> np.ndarray:
    """Deals groups of instances to parts at random, as many to each: the part of every instance, [N]."""
    names = sorted(set(groups))
    order = np.random.default_rng([count, len(names)]).permutation(len(names))
    part = {names[name]: place % count for place, name in enumerate(order.tolist())}
    return np.array([part[group] for group in groups])


def _shapes(latents: np.ndarray, statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Means, spreads and covariances that scores are made with."""
    residual = statistics["residual"]
    arrays = {
        "residual_mean": residual.mean(axis=0),
        # No patch is so well drawn that a hundredth of the usual error counts as much.
        "residual_std": residual.std(axis=0) + 0.01 * residual.mean() + 1e-6,
        "sharpness": np.median(surprise.sharpness_of(statistics), keepdims=True),
    }
    features = {
        "latent": latents,
        "root": surprise.root_features(statistics),
        "log": surprise.log_features(statistics),
    }
    for name, rows in features.items():
        arrays[f"{name}_mean"], arrays[f"{name}_whitening"] = _mean_and_whitening(rows)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _mean_and_whitening(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean of [N, D], and a factor of the inverse of its covariance, shrunk as Ledoit and Wolf (2004) do."""
    from sklearn.covariance import LedoitWolf  # not needed where a profile is only read

    if rows.shape[1] > FULL_COVARIANCE:
        return rows.mean(axis=0), 1 / (rows.std(axis=0) + 1e-6)
    fitted = LedoitWolf().fit(rows)
    variances, directions = np.linalg.eigh(fitted.covariance_)
    least = max(1e-8, 1e-6 * variances[-1])
    return fitted.location_, directions / np.sqrt(np.maximum(variances, least)) @ directions.T


def _tails(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Of scores [n, S]: their order, and an exponential tail for the highest fifth."""
    start = np.quantile(scores, 1 - TAIL, axis=0)
    excess = [column[column > begin] - begin for column, begin in zip(scores.T, start, strict=True)]
    scale = np.array([some.mean() if len(some) else 0.0 for some in excess]) + 1e-3
    return {
        "ranks": np.sort(scores, axis=0).T,
        "tail_start": start,
        "tail_scale": scale,
        "shares": np.array([_SHARES[name] for name in SCORES]),
    }
