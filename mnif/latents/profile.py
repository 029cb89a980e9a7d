"""The reference profile of a model: how held-out instances score, so that others can be told from them.

It lies in the model folder, ``profile/profile.json`` beside ``profile/arrays.safetensors``. What a score is stands in
:mod:`mnif.latents.surprise`, how a profile is made in :mod:`mnif.latents.calibration`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import torch
from msgspec import Meta
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.latents import surprise
from mnif.latents.inference import LatentInit, infer_latents
from mnif.latents.patches import observed_grid, observed_values, patch_residuals, patches_of
from mnif.latents.surprise import KINDS, SCORES
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.utils.errors import UserError
from mnif.utils.files import folder_written_atomically, save_tensors, write_json
from mnif.utils.json_files import Size, read_json
from mnif.utils.model_folders import PROFILE, model_folder_in

FALSE_ALARM_RATE = 0.05
"""The share of instances like the held-out ones that a verdict may call doubtful or out, unless told otherwise."""

FULL_COVARIANCE = 1024
"""Numbers in a latent; of larger ones each counts by itself."""
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
        channels: of a pixel.
        network: whether one tells damage.
        statistics: that a look was known by in earlier versions.
        kinds: of damage that are told, in order.
        scores: in order.
        refinement_steps: by which the latents were found; 0: by the model's encoder or inner loop alone.
        gap_steps: of the refinement whose gaps are known; 0: none are.
    """

    format: Literal["mnif-profile/1", "mnif-profile/2", "mnif-profile/3"] = "mnif-profile/3"
    fingerprints: Annotated[list[str], Meta(min_length=1)]
    data: str
    instances: Size
    false_alarm_rate: _Rate
    patches: list[Size]
    grid: Annotated[list[Size], Meta(min_length=1, max_length=3)]
    channels: Size = 1
    network: bool = False
    statistics: list[str] = []
    kinds: list[str] = []
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
        reasons: of each instance, of :data:`mnif.latents.surprise.REASONS`.
        deviations: [N, P], each patch's residual in its own standard deviations.
    """

    scores: np.ndarray
    surprises: np.ndarray
    p_values: np.ndarray
    reasons: list[str]
    deviations: np.ndarray


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

    def score(self, latents: np.ndarray, residuals: np.ndarray, looks: np.ndarray) -> Scored:
        """Scores instances by their latents [N, D], their patches' residuals [N, P] and looks [N, K + 1]."""
        scores = surprise.scores_of(self.arrays, latents, residuals, looks)
        surprises = surprise.surprises_of(self.arrays, scores)
        p_values = surprise.p_values_of(self.arrays, surprise.alarms_of(self.arrays, surprises))
        reasons = surprise.reasons_of(self.arrays, surprises, looks)
        return Scored(scores, surprises, p_values, reasons, surprise.patch_deviations(self.arrays, residuals))

    def looks(self, values: np.ndarray) -> np.ndarray:
        """Computes how observed values [B, (views,) pixels…, C] look, [B, K + 1]."""
        return surprise.look_of(self.arrays, values, self.record.patches)

    def rate(self, asked: float | None) -> float:
        """Settles the false-alarm rate: the one asked for, or the profile's own.

        Raises:
            UserError: the profile comes from too few instances for it.
        """
        rate, least = asked or self.record.false_alarm_rate, surprise.least_rate(len(self.arrays["alarms"]))
        if not least <= rate < 1 or asked == 0:
            raise UserError(
                f"--false_alarm_rate {asked:g}: the profile's {self.record.instances} held-out instances allow "
                f"{math.ceil(least * 1000) / 1000:g} to 1 (two thirds of them set the threshold)"
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
            save_tensors(tensors, folder / "arrays.safetensors", {"format": self.record.format})
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
    if (record.format, record.kinds, record.scores) != ("mnif-profile/3", list(KINDS), list(SCORES)):
        raise UserError(
            f"{folder}: scores of another version of mnif; `mnif monitor --fit --model {model} --data DATA` makes the "
            "profile anew"
        )
    if record.patches != patches_of(record.grid):
        raise UserError(f"{folder / 'profile.json'}: patches {record.patches} are not those of a grid {record.grid}")
    return Profile(record, _read_arrays(folder / "arrays.safetensors", record, decoder.config.latent_dim))


def _read_arrays(path: Path, record: ProfileRecord, latent_dim: int) -> dict[str, np.ndarray]:
    """Reads the arrays, each of the shape that the record makes it."""
    patches, scores = math.prod(record.patches), len(SCORES)
    shapes: dict[str, tuple[int | None, ...]] = {
        **surprise.look_shapes(record.grid, record.patches, record.channels, record.network),
        "latent_mean": (latent_dim,),
        "latent_whitening": (latent_dim,) * (2 if latent_dim <= FULL_COVARIANCE else 1),
        **dict.fromkeys(("residual_mean", "residual_std"), (patches,)),
        "ranks": (scores, None),
        **dict.fromkeys(("tail_start", "tail_scale", "weights"), (scores,)),
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
        if array.dtype not in (np.float16, np.float32, np.float64) or not len(array) or not np.isfinite(array).all():
            raise UserError(f"{path}: {name} holds something else than finite numbers")
    wrong = surprise.wrong_array(arrays)
    if wrong:
        raise UserError(f"{path}: {wrong}")
    return arrays


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
    residuals = patch_residuals(decoder, signal, rows, latents, profile.record.patches)
    looks = np.concatenate([profile.looks(values) for values in observed_values(signal, rows)])
    return latents, profile.score(latents.cpu().numpy(), residuals, looks)
