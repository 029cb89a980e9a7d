"""How a profile is made of training and held-out instances.

How sound instances look is learned from the observations that the model was trained on, and how damaged ones do from
damaged copies of them (:mod:`mnif.latents.damage`). A third of the held-out instances makes what needs the model
(residuals, latents, and how rare each score is), the others, which no score has seen, the thresholds (split conformal
prediction: Vovk, Gammerman and Shafer, 2005; Lei et al., 2018). Instances of one group stay in one part, and one of
them alone counts for a threshold, as variants of a design are no evidence of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.latents import surprise
from mnif.latents.damage import damaged
from mnif.latents.damage_network import learn_damage
from mnif.latents.patches import observed_grid, observed_values, patch_residuals, patches_of
from mnif.latents.profile import FALSE_ALARM_RATE, FULL_COVARIANCE, Profile, ProfileRecord
from mnif.latents.surprise import KINDS, NUMBERS, SCORES, TAIL
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.utils.errors import UserError

_FOLDS = 5
_LEAST_SHAPED = 10  # instances that make the scores
_SHAPING = 3  # one part of so many makes the scores
_REFERENCE = 1000  # instances kept to compare others with
_SOUND = 4096  # training instances that say how sound ones look, at most
_DAMAGED = 512  # and that are damaged for the regression
_PIXELS = 2**23  # of those that are damaged, at most; of sound ones eight times as many
_BATCH = 64
_NETWORK_FROM = 500  # pictures; fewer are too few to learn a network from
_SQUARED_FROM = 100  # instances; squares of numbers learned from fewer tell those few from all others
# How probable kinds of damage are beside one another: the two that are hardest to tell count twice.
_PRIORS = {"noise": 1.0, "blur": 1.0, "occlusion": 1.0, "shift": 2.0, "foreign": 2.0}
# Of each score's surprise in the alarm, in order. Strength knows most of foreign pictures, and of what few can tell.
_WEIGHTS = (1.0, 1.0, 0.1, 0.1, 0.1)
_WEIGHTS_BY_SQUARES = (1.0, 0.1, 0.25, 0.25, 0.25)


@dataclass(frozen=True)
class TrainingInstances:
    """What a model was trained on: the rows, and the group of each."""

    rows: ArrayDataset
    groups: Sequence[str]


def check_enough(instances: int, rate: float) -> None:
    """Refuses held-out instances that are too few for a false-alarm rate.

    Raises:
        UserError: they are too few; the message says how many are needed.
    """
    if not 0 < rate < 1:
        raise UserError(f"--false_alarm_rate {rate:g}: must lie between 0 and 1")
    thresholds = math.ceil(1 / rate - 1e-9) - 1
    needed = max(math.ceil(thresholds * _SHAPING / (_SHAPING - 1)), _LEAST_SHAPED * _SHAPING)
    if instances < needed:
        raise UserError(
            f"{instances} held-out instances: a false-alarm rate of {rate:g} needs {needed} at least (two thirds of "
            "them set the threshold); hold more out, or ask for a higher --false_alarm_rate"
        )


def fit_profile(
    decoder: MNIFModel,
    signal: Signal,
    trained: TrainingInstances,
    rows: ArrayDataset,
    groups: Sequence[str],
    latents: Tensor,
    data: str,
    rate: float = FALSE_ALARM_RATE,
    refinement_steps: int = 0,
    refined: tuple[Tensor, int] | None = None,
) -> Profile:
    """Makes a profile of training and held-out instances.

    Args:
        decoder: the model.
        signal: the model's.
        trained: what it was trained on.
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
    arrays = fit_looks(signal, trained, patches)
    held_out = HeldOut(
        latents.cpu().numpy(),
        patch_residuals(decoder, signal, rows, latents, patches),
        _looks_of(arrays, signal, rows, patches),
        groups,
    )
    arrays, calibrating = fit_arrays(arrays, held_out, rate)
    if refined is not None:
        arrays["gaps"] = np.sort(refinement_gaps(held_out.latents, refined[0].cpu().numpy())[calibrating])
    record = ProfileRecord(
        fingerprints=[decoder.fingerprint(), *decoder.rounded_fingerprints()],
        data=data,
        instances=len(rows),
        false_alarm_rate=rate,
        patches=patches,
        grid=grid,
        channels=_channels(signal, rows),
        network="conv_0" in arrays,
        kinds=list(KINDS),
        scores=list(SCORES),
        refinement_steps=refinement_steps,
        gap_steps=0 if refined is None else refined[1],
    )
    return Profile(record, arrays)


def refinement_gaps(first: np.ndarray, refined: np.ndarray) -> np.ndarray:
    """Root mean square over a latent's numbers of the way that refinement took, [N]."""
    return np.sqrt(np.square(refined.astype(np.float64) - first).mean(axis=1))


def _looks_of(arrays: dict[str, np.ndarray], signal: Signal, rows: ArrayDataset, patches: Sequence[int]) -> np.ndarray:
    """Computes the looks of N instances, [N, K + 1]."""
    return np.concatenate([surprise.look_of(arrays, some, patches) for some in observed_values(signal, rows)])


def fit_looks(signal: Signal, trained: TrainingInstances, patches: Sequence[int]) -> dict[str, np.ndarray]:
    """Learns how sound instances look, and damaged ones: the arrays up to ``root_whitening``, and ``weights``.

    Damage of pictures is told by a network if there are enough to learn from, that of others by a regression.

    Raises:
        UserError: the training instances are too few.
    """
    views = _views(signal, trained.rows)
    if len(patches) == 2 and not views and len(trained.groups) >= _NETWORK_FROM:
        return _fit_network(signal, trained, patches)
    parts = _parts(trained.groups, _SHAPING)
    pixels = math.prod(observed_grid(signal, trained.rows)) * max(1, views)
    sound = _some(np.flatnonzero(parts != 0), min(_SOUND, max(_BATCH, 8 * _PIXELS // pixels)))
    spoilt = _some(np.flatnonzero(parts == 0), min(_DAMAGED, max(_BATCH, _PIXELS // pixels)))
    if min(len(sound), len(spoilt)) < _LEAST_SHAPED:
        raise UserError(
            f"{len(trained.groups)} training instances of {len(set(trained.groups))} groups: too few to learn how "
            "sound ones look"
        )
    boxes = _boxes_of(signal, trained.rows.subset(sound), patches)
    arrays = _gaussian("log", surprise.log_features(boxes)) | _gaussian("root", surprise.root_features(boxes, patches))
    numbers: dict[str, list[np.ndarray]] = {}
    for seed, values in enumerate(observed_values(signal, trained.rows.subset(spoilt))):
        for kind, some in {"sound": values, **damaged(values, len(patches), seed)}.items():
            found = surprise.numbers_of(arrays, surprise.boxes_of(some, patches), patches)
            numbers.setdefault(kind, []).append(found)
    return arrays | _fit_kinds({kind: np.concatenate(some) for kind, some in numbers.items()})


def _fit_network(signal: Signal, trained: TrainingInstances, patches: Sequence[int]) -> dict[str, np.ndarray]:
    """Learns from pictures; each group, whose instances are variants of one another, is drawn as often as any."""
    pixels = math.prod(observed_grid(signal, trained.rows))
    rows = _some(np.arange(len(trained.groups)), min(_SOUND, max(_BATCH, 8 * _PIXELS // pixels)))
    pictures = np.concatenate([*observed_values(signal, trained.rows.subset(rows))])
    _, group, size = np.unique([trained.groups[row] for row in rows], return_inverse=True, return_counts=True)
    boxes = _boxes_of(signal, trained.rows.subset(rows), patches)
    network = learn_damage(pictures, 1 / size[group] / len(size))
    return network | _gaussian("root", surprise.root_features(boxes, patches)) | {"weights": np.array(_WEIGHTS)}


def _boxes_of(signal: Signal, rows: ArrayDataset, patches: Sequence[int]) -> np.ndarray:
    observed = observed_values(signal, rows)
    return np.concatenate([surprise.boxes_of(values, patches, moved=False)[:, 0] for values in observed])


def _gaussian(name: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    mean, whitening = _mean_and_whitening(rows, rows.shape[1])
    return {f"{name}_mean": mean.astype(np.float32), f"{name}_whitening": whitening.astype(np.float32)}


def _fit_kinds(numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fits each kind's log-odds against none, of numbers [n, 7] of ``sound`` instances and of each kind."""
    from sklearn.linear_model import LogisticRegression  # not needed where a profile is only read

    arrays = {"number_mean": numbers["sound"].mean(axis=0), "number_std": numbers["sound"].std(axis=0) + 1e-6}
    rows = np.concatenate([surprise.kind_features(arrays, numbers[kind]) for kind in ("sound", *KINDS)])
    squared = len(numbers["sound"]) >= _SQUARED_FROM
    if not squared:
        rows[:, len(NUMBERS) :] = 0  # what is not seen gets no weight
    kinds = np.repeat(np.arange(len(KINDS) + 1), len(numbers["sound"]))
    # As many sound ones as damaged ones, all kinds together.
    fitted = LogisticRegression(max_iter=2000).fit(rows, kinds, np.where(kinds == 0, len(KINDS), 1.0))
    priors = np.array([_PRIORS[kind] for kind in KINDS])
    return {
        **arrays,
        "kind_weights": fitted.coef_[1:] - fitted.coef_[0],
        "kind_offsets": fitted.intercept_[1:] - fitted.intercept_[0] + np.log(priors),
        "weights": np.array(_WEIGHTS_BY_SQUARES if squared else _WEIGHTS),
    }


@dataclass(frozen=True)
class HeldOut:
    """Held-out instances as they are scored: latents [N, D], residuals [N, P], looks [N, K + 1], and groups."""

    latents: np.ndarray
    residuals: np.ndarray
    looks: np.ndarray
    groups: Sequence[str]

    def rows(self, rows: np.ndarray) -> HeldOut:
        """Takes some of them."""
        groups = [self.groups[row] for row in rows.tolist()]
        return HeldOut(self.latents[rows], self.residuals[rows], self.looks[rows], groups)

    def scores(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """Scores them, [N, 5]."""
        return surprise.scores_of(arrays, self.latents, self.residuals, self.looks)


def fit_arrays(
    looks: dict[str, np.ndarray], held_out: HeldOut, rate: float
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Makes a profile's arrays of those of :func:`fit_looks` and held-out instances.

    Returns:
        The arrays, and the rows that set the thresholds.

    Raises:
        UserError: there are too few groups.
    """
    groups = held_out.groups
    parts = _parts(groups, _SHAPING)
    shaping, calibrating = np.flatnonzero(parts == 0), np.flatnonzero(parts != 0)
    # Variants are no evidence of their own.
    calibrating = calibrating[one_of_each([groups[row] for row in calibrating.tolist()])]
    least = math.ceil(1 / rate - 1e-9) - 1
    if min(len(shaping) - _LEAST_SHAPED, len(calibrating) - least) < 0:
        raise UserError(f"{len(set(groups))} groups among {len(groups)} held-out instances: too few to make thirds of")
    shapers = held_out.rows(shaping)
    arrays = looks | _shapes(shapers)
    # How rare a score is can only be told on instances that its means and covariances have not seen.
    scores, folds = np.empty((len(shaping), len(SCORES))), _parts(shapers.groups, _FOLDS)
    for fold in range(_FOLDS):
        seen, unseen = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(unseen):
            scores[unseen] = shapers.rows(unseen).scores(looks | _shapes(shapers.rows(seen)))
    arrays |= _tails(scores)
    calibrators = held_out.rows(calibrating)
    of_others = calibrators.scores(arrays)
    arrays["alarms"] = np.sort(surprise.alarms_of(arrays, surprise.surprises_of(arrays, of_others)))
    arrays["reference_latents"] = calibrators.latents[:_REFERENCE].astype(np.float32)
    arrays["reference_scores"] = of_others[:_REFERENCE]
    return arrays, calibrating


def one_of_each(groups: Sequence[str]) -> np.ndarray:
    """Picks the first row of each group: rows that are independent of one another."""
    return np.sort(np.unique(np.asarray(groups), return_index=True)[1])


def _parts(groups: Sequence[str], count: int) -> np.ndarray:
    """Deals groups of instances to parts at random, as many to each: the part of every instance, [N]."""
    names = sorted(set(groups))
    order = np.random.default_rng([count, len(names)]).permutation(len(names))
    part = {names[name]: place % count for place, name in enumerate(order.tolist())}
    return np.array([part[group] for group in groups])


def _some(rows: np.ndarray, most: int) -> np.ndarray:
    """Draws at most so many rows, in order."""
    return np.sort(np.random.default_rng(len(rows)).permutation(rows)[:most])


def _channels(signal: Signal, rows: ArrayDataset) -> int:
    return next(observed_values(signal, rows.subset(np.arange(1)))).shape[-1]


def _views(signal: Signal, rows: ArrayDataset) -> int:
    (first,) = rows.subset(np.arange(1)).batches(1)
    return signal.num_views(first)


def _shapes(held_out: HeldOut) -> dict[str, np.ndarray]:
    """Means, spreads and covariances of residuals and latents."""
    residual = held_out.residuals
    mean, whitening = _mean_and_whitening(held_out.latents, FULL_COVARIANCE)
    arrays = {
        "residual_mean": residual.mean(axis=0),
        # No patch is so well drawn that a hundredth of the usual error counts as much.
        "residual_std": residual.std(axis=0) + 0.01 * residual.mean() + 1e-6,
        "latent_mean": mean,
        "latent_whitening": whitening,
    }
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _mean_and_whitening(rows: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean of [N, D], and a factor of the inverse of its covariance, shrunk as Ledoit and Wolf (2004) do.

    With more than ``most`` numbers each counts by itself, and the factor is [D].
    """
    from sklearn.covariance import LedoitWolf  # not needed where a profile is only read

    if rows.shape[1] > most:
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
    }
