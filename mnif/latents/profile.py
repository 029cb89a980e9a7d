"""The reference profile of a model: how held-out instances score, so that others can be told from them.

It lies in the model folder, ``profile/profile.json`` beside ``profile/arrays.safetensors``. Half of the held-out
instances make the scores (means, covariances, how rare a score is), the other half, which no score has seen, the
thresholds (split conformal prediction: Vovk, Gammerman and Shafer, 2005; Lei et al., 2018). Instances of one group
stay in one half. What a score is stands in :mod:`mnif.latents.surprise`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.latents import surprise
from mnif.latents.inference import LatentInit, infer_latents
from mnif.latents.surprise import SCORES, STATISTICS, TAIL
from mnif.models.io import PROFILE, model_folder_in
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Signal
from mnif.utils.errors import UserError
from mnif.utils.files import folder_written_atomically, save_tensors, write_json
from mnif.utils.json_files import Size, read_json

FALSE_ALARM_RATE = 0.05
"""The share of instances like the held-out ones that a verdict may call doubtful or out, unless told otherwise."""

_FORMAT = "mnif-profile/1"
_MOST_PATCHES = 64
_LEAST_PIXELS = 4  # along an axis of a patch
_FULL_COVARIANCE = 1024  # numbers in a latent; of larger ones each counts by itself
_FOLDS = 5
_LEAST_SHAPED = 10  # instances that make the scores
_REFERENCE = 1000  # instances kept to compare others with
_BATCH = 64
_SHARES = {"residual": 0.08, "patch": 0.08, "latent": 0.08}  # of false alarms; the others share the rest

_Rate = Annotated[float, Meta(gt=0, lt=1)]


class ProfileRecord(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A ``profile.json``.

    Attributes:
        fingerprints: of the decoder, as it is and in half precision.
        data: what the held-out instances were of.
        instances: how many there were.
        false_alarm_rate: that verdicts are given at, unless told otherwise.
        patches: along each axis.
        grid: pixels along each axis of what was observed.
        statistics: of each patch, in order.
        scores: in order.
        refinement_steps: by which the latents were found; 0: by the model's encoder or inner loop alone.
        gap_steps: of the refinement whose gaps are known; 0: none are.
    """

    format: Literal["mnif-profile/1"] = _FORMAT
    fingerprints: list[str]
    data: str
    instances: Size
    false_alarm_rate: _Rate
    patches: list[Size]
    grid: list[Size]
    statistics: list[str]
    scores: list[str]
    refinement_steps: Annotated[int, Meta(ge=0)]
    gap_steps: Annotated[int, Meta(ge=0)] = 0


@dataclass(frozen=True, eq=False)
class Scored:
    """Instances beside a profile.

    Attributes:
        scores: [N, S].
        surprises: [N, S], how rare each score is.
        p_values: [N], conformal.
        deviations: [N, P], each patch's residual in its own standard deviations.
    """

    scores: np.ndarray
    surprises: np.ndarray
    p_values: np.ndarray
    deviations: np.ndarray

    def reasons(self) -> list[str]:
        """Names the most surprising score of each instance."""
        return [list(SCORES)[index] for index in self.surprises.argmax(axis=1)]


@dataclass(frozen=True, eq=False)
class Profile:
    """A reference profile.

    Attributes:
        record: what it is of.
        arrays: those of :mod:`mnif.latents.surprise`, and of the instances that set the thresholds
            ``reference_latents`` [R, D] and ``reference_scores`` [R, S]; ``gaps`` [m] ascending where
            ``record.gap_steps`` is not 0.
    """

    record: ProfileRecord
    arrays: dict[str, np.ndarray]

    def score(self, latents: np.ndarray, statistics: Mapping[str, np.ndarray]) -> Scored:
        """Scores instances by their latents [N, D] and the statistics of their patches, each [N, P]."""
        scores = surprise.scores_of(self.arrays, latents, statistics)
        surprises = surprise.surprises_of(self.arrays, scores)
        p_values = surprise.p_values_of(self.arrays, surprise.alarms_of(self.arrays, surprises))
        return Scored(scores, surprises, p_values, surprise.patch_deviations(self.arrays, statistics["residual"]))

    def rate(self, asked: float | None) -> float:
        """Settles the false-alarm rate: the one asked for, or the profile's own.

        Raises:
            UserError: the profile comes from too few instances for it.
        """
        rate, least = asked or self.record.false_alarm_rate, surprise.least_rate(len(self.arrays["alarms"]))
        if not least <= rate < 1 or asked == 0:
            raise UserError(
                f"--false_alarm_rate {asked:g}: the profile's {self.record.instances} held-out instances allow "
                f"{math.ceil(least * 1000) / 1000:g} to 1 (half of them set the threshold)"
            )
        return rate

    def verdicts(self, scored: Scored, rate: float) -> list[str]:
        """Judges each instance at a false-alarm rate: ``in``, ``doubtful`` or ``out``."""
        return [surprise.VERDICTS[number] for number in surprise.verdicts_of(self.arrays, scored.p_values, rate)]

    def gap_p_values(self, gaps: np.ndarray) -> np.ndarray:
        """Conformal p-values of the way that refinement took, [N]."""
        known = self.arrays["gaps"]
        return (1 + len(known) - np.searchsorted(known, gaps)) / (len(known) + 1)

    def save(self, model: Path) -> None:
        """Writes the profile into a model folder, in the place of an older one, atomically."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.arrays.items()}
        with folder_written_atomically(model_folder_in(model) / PROFILE) as folder:
            save_tensors(tensors, folder / "arrays.safetensors", {"format": _FORMAT})
            write_json(folder / "profile.json", msgspec.to_builtins(self.record))


def load_profile(model: Path, decoder: MNIFModel) -> Profile:
    """Reads the profile of a model folder, or of its run's.

    Raises:
        UserError: there is none, it is damaged, or it is another decoder's.
    """
    folder = model_folder_in(model) / PROFILE
    if not (folder / "profile.json").is_file():
        raise UserError(f"{folder}: no profile; `mnif monitor --fit --model {model} --data DATA` makes it")
    record = read_json(folder / "profile.json", ProfileRecord)
    if decoder.fingerprint() not in record.fingerprints:
        raise UserError(
            f"{folder}: the profile of another decoder ({record.fingerprints[0][:12]}, not "
            f"{decoder.fingerprint()[:12]}); `mnif monitor --fit --model {model} --data DATA` makes it anew"
        )
    if (tuple(record.statistics), tuple(record.scores)) != (STATISTICS, tuple(SCORES)):
        raise UserError(f"{folder}: scores of another version; `mnif monitor --fit` makes the profile anew")
    return Profile(record, _read_arrays(folder / "arrays.safetensors", record, decoder.config.latent_dim))


def _read_arrays(path: Path, record: ProfileRecord, latent_dim: int) -> dict[str, np.ndarray]:
    """Reads the arrays, each of the shape that the record makes it."""
    patches, scores = math.prod(record.patches), len(SCORES)
    features = patches * len(STATISTICS)
    shapes: dict[str, tuple[int | None, ...]] = {
        "latent_mean": (latent_dim,),
        "latent_whitening": (latent_dim,) * (2 if latent_dim <= _FULL_COVARIANCE else 1),
        **{f"{kind}_mean": (features,) for kind in ("log", "root")},
        **{f"{kind}_whitening": (features, features) for kind in ("log", "root")},
        **{name: (patches,) for name in ("residual_mean", "residual_std")},
        "sharpness": (1,),
        "ranks": (scores, None),
        **{name: (scores,) for name in ("tail_start", "tail_scale", "shares")},
        "alarms": (None,),
        "reference_latents": (None, latent_dim),
        "reference_scores": (None, scores),
    }
    shapes |= {"gaps": (None,)} if record.gap_steps else {}
    try:
        with safe_open(path, framework="np") as file:
            arrays = {}
            for name, shape in shapes.items():
                found = file.get_slice(name).get_shape()
                if len(found) != len(shape) or any(f != s for f, s in zip(found, shape, strict=True) if s is not None):
                    raise UserError(f"{path}: {name} is {found}; {list(shape)} is needed")
                arrays[name] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged profile ({str(error).splitlines()[0]})") from None
    for name, array in arrays.items():
        if array.dtype not in (np.float32, np.float64) or not len(array) or not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds something else than finite numbers")
    return arrays


def patches_of(grid: Sequence[int]) -> list[int]:
    """How many patches an instance is cut into along each axis: at most 64 in all, of 4 pixels at least."""
    most = int(_MOST_PATCHES ** (1 / len(grid)) + 1e-9)
    return [max(1, min(most, pixels // _LEAST_PIXELS)) for pixels in grid]


def observed_grid(signal: Signal, rows: ArrayDataset) -> list[int]:
    """The pixels along each axis of what is observed of an instance: of its grid, or of one view.

    Raises:
        UserError: it is observed in some other way.
    """
    (first,) = rows.subset(np.arange(1)).batches(1)
    shape = list(signal.observe(first).values.shape[1:-1])
    if isinstance(signal, GridSignal):
        return shape
    if signal.num_views(first):
        return shape[1:]
    raise UserError(f"a {signal.noun} is seen neither on a grid nor in views: there is no profile of such")


@torch.no_grad()
def patch_statistics(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latents: Tensor, patches: Sequence[int]
) -> dict[str, np.ndarray]:
    """Measures how each patch of the rows looks, and how latents [N, D] show it.

    Args:
        decoder: the model.
        signal: the model's.
        rows: N instances.
        latents: theirs.
        patches: along each axis.

    Returns:
        For each of :data:`mnif.latents.surprise.STATISTICS` [N, P] float64; those of views are their means.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in STATISTICS}
    for batch, some in zip(rows.batches(_BATCH, decoder.device), latents.split(_BATCH), strict=True):
        observation = signal.observe(batch)
        predictions = signal.predict(decoder, decoder.coefficients(some.to(decoder.device)), observation)
        for name, values in statistics_of(observation.values, predictions, patches).items():
            found[name].append(values.double().cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def statistics_of(values: Tensor, predictions: Tensor, patches: Sequence[int]) -> dict[str, Tensor]:
    """Computes the statistics of each patch, [B, P], of values and predictions [B, (views,) pixels…, C]."""
    residual = predictions - values
    axes = range(values.ndim - 1 - len(patches), values.ndim - 1)
    squares = {
        "residual": residual.square(),
        "residual_curvature": _second_differences(residual, axes).square(),
        "slope": sum(_first_differences(values, axis).square() for axis in axes),
        "curvature": _second_differences(values, axes).square(),
    }
    return {name: _mean_in_patches(square.mean(dim=-1), patches) for name, square in squares.items()}


def _first_differences(values: Tensor, axis: int) -> Tensor:
    """Differences of each pixel and the next along an axis, 0 at its end."""
    last = values.narrow(axis, values.shape[axis] - 1, 1)
    return values.diff(dim=axis, append=last)


def _second_differences(values: Tensor, axes: Sequence[int]) -> Tensor:
    """Sums second differences over axes; beyond its ends an axis goes on as its last pixel."""
    total = torch.zeros_like(values)
    for axis in axes:
        first, last = values.narrow(axis, 0, 1), values.narrow(axis, values.shape[axis] - 1, 1)
        total += torch.cat([first, values, last], dim=axis).diff(n=2, dim=axis)
    return total


def _mean_in_patches(squares: Tensor, patches: Sequence[int]) -> Tensor:
    """Means over the patches of the last axes, and over the axes before them, but for the first: [B, P]."""
    for axis, count in enumerate(patches, start=squares.ndim - len(patches)):
        pixels = squares.shape[axis]
        owner = torch.arange(pixels, device=squares.device) * count // pixels
        shares = F.one_hot(owner, count).to(squares)
        squares = torch.movedim(torch.movedim(squares, axis, -1) @ (shares / shares.sum(dim=0)), -1, axis)
    squares = squares.flatten(1, -len(patches) - 1).mean(dim=1) if squares.ndim > len(patches) + 1 else squares
    return squares.flatten(1)


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


def score_rows(
    profile: Profile, decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latent_init: LatentInit
) -> tuple[Tensor, Scored]:
    """Scores rows as the profile's own instances were: with latents [N, D] found in the same way, which it gives too.

    Args:
        profile: the model's.
        decoder: the model.
        signal: the model's.
        rows: N instances.
        latent_init: what the model's folder has.

    Raises:
        UserError: the rows are of another shape than the profile's instances.
    """
    grid = observed_grid(signal, rows)
    if grid != profile.record.grid:
        raise UserError(f"{signal.noun}s of {grid} pixels; the profile is of {profile.record.grid}")
    steps = profile.record.refinement_steps
    latents = torch.cat([*infer_latents(decoder, signal, rows, latent_init, steps, progress=steps > 0)])
    statistics = patch_statistics(decoder, signal, rows, latents, profile.record.patches)
    return latents, profile.score(latents.cpu().numpy(), statistics)


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
        rate: of false alarms; the calibrating half gets as many instances as that needs, if need be.

    Returns:
        The arrays, and the rows that set the thresholds.
    """
    parts = _parts(groups, 2)
    shaping, calibrating = np.flatnonzero(parts == 0), np.flatnonzero(parts == 1)
    least = math.ceil(1 / rate - 1e-9) - 1
    if min(len(shaping) - _LEAST_SHAPED, len(calibrating) - least) < 0:
        raise UserError(f"{len(set(groups))} groups among {len(groups)} held-out instances: too few to make halves of")
    arrays = _shapes(latents[shaping], _rows(statistics, shaping))
    # How rare a score is can only be told on instances that its means and covariances have not seen.
    scores, folds = np.empty((len(shaping), len(SCORES))), _parts([groups[row] for row in shaping], _FOLDS)
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


def _parts(groups: Sequence[str], count: int) -> np.ndarray:
    """Deals instances to parts of about equal size at random, those of one group to one part: [N]."""
    names = sorted(set(groups))
    order = np.random.default_rng([count, len(names)]).permutation(len(names))
    sizes = {name: 0 for name in names}
    for group in groups:
        sizes[group] += 1
    filled, part = np.zeros(count, np.int64), {}
    for number in order:
        name = names[number]
        part[name] = int(filled.argmin())
        filled[part[name]] += sizes[name]
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

    if rows.shape[1] > _FULL_COVARIANCE:
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
    rest = (1 - sum(_SHARES.values())) / (len(SCORES) - len(_SHARES))
    return {
        "ranks": np.sort(scores, axis=0).T,
        "tail_start": start,
        "tail_scale": scale,
        "shares": np.array([_SHARES.get(name, rest) for name in SCORES]),
    }
