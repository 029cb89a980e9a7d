"""Whether to trust what an encoder made of an observation: verdicts by the bundle's reference profile.

A profile is what `mnif fit` and `mnif monitor` learned of held-out instances. The scores themselves are those of
:mod:`.surprise`, which is a copy of :mod:`mnif.latents.surprise` to the byte.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import surprise
from .bundle import BundleError, BundleFolder, entry
from .runtime import Encoded

PROFILE = "profile.npz"

_STRIKING = 3.0  # standard deviations from which on a patch is named

_NAMED = 4  # patches, at most

_BATCH = 64


class Verdict(NamedTuple):
    """What is thought of one instance.

    Attributes:
        verdict: ``"in"``, ``"doubtful"`` or ``"out"``.
        p_value: conformal, in (0, 1].
        reason: a kind of damage, or the most surprising score.
        scores: all of them.
        patches: those of which the field misses unusually much, the worst first: the place of each along every axis.
    """

    verdict: str
    p_value: float
    reason: str
    scores: dict[str, float]
    patches: list[list[int]]


class Gate:
    """A bundle's reference profile at work.

    Args:
        folder: the bundle.
        latent_dim: numbers in a latent.
        shape: pixels along each axis of an observation, and channels.
        rate: share of instances like the held-out ones that may be called doubtful or out; None: the profile's.

    Raises:
        BundleError: there is no profile, it is damaged, or it comes from too few instances for the rate.
    """

    def __init__(self, folder: BundleFolder, latent_dim: int, shape: Sequence[int], rate: float | None = None):
        described = folder.manifest.get("profile")
        if described is None:
            raise BundleError(f"{folder.path}: no reference profile is in it; export a model that has one")
        self.patches: list[int] = entry(described, "patches", kind=list)
        self.rate = float(described["false_alarm_rate"]) if rate is None else rate
        self._arrays = folder.arrays(PROFILE)
        self._check(f"{folder.path / PROFILE}", latent_dim, shape)
        least = surprise.least_rate(len(self._arrays["alarms"]))
        if not least <= self.rate < 1:
            raise BundleError(f"--false_alarm_rate {self.rate:g}: the profile allows {least:.2g} to 1")

    def __call__(self, values: np.ndarray, encoded: Encoded) -> list[Verdict]:
        """Judges instances that were seen whole, by their values [N, pixels…, C] and what the encoder made of them."""
        if encoded.patch_residuals is None:
            raise BundleError("the encoder's graph has no patch_residuals; export the bundle again")
        residual = encoded.patch_residuals
        parts = [values[begin : begin + _BATCH] for begin in range(0, len(values), _BATCH)]
        look = np.concatenate([surprise.look_of(self._arrays, part, self.patches) for part in parts])
        scores = surprise.scores_of(self._arrays, encoded.latents, residual, look)
        surprises = surprise.surprises_of(self._arrays, scores)
        p_values = surprise.p_values_of(self._arrays, surprise.alarms_of(self._arrays, surprises))
        verdicts = surprise.verdicts_of(self._arrays, p_values, self.rate)
        reasons = surprise.reasons_of(self._arrays, surprises, look)
        deviations = surprise.patch_deviations(self._arrays, residual)
        return [self._verdict(*row) for row in zip(verdicts, p_values, reasons, scores, deviations)]

    def _verdict(
        self, verdict: int, p_value: float, reason: str, scores: np.ndarray, deviations: np.ndarray
    ) -> Verdict:
        worst = [int(each) for each in np.argsort(-deviations, kind="stable")[:_NAMED] if deviations[each] > _STRIKING]
        return Verdict(
            surprise.VERDICTS[verdict],
            float(p_value),
            reason,
            {name: float(each) for name, each in zip(surprise.SCORES, scores)},
            [[int(place) for place in np.unravel_index(each, self.patches)] for each in worst],
        )

    def _check(self, where: str, latent_dim: int, shape: Sequence[int]) -> None:
        """Makes sure that the arrays are those that scores are made with."""
        patches, scores = math.prod(self.patches), len(surprise.SCORES)
        looks = surprise.look_shapes(shape[:-1], self.patches, shape[-1], "conv_0" in self._arrays)
        shapes: dict[str, list[tuple]] = {
            **{name: [each] for name, each in looks.items()},
            "latent_mean": [(latent_dim,)],
            "latent_whitening": [(latent_dim, latent_dim), (latent_dim,)],
            "residual_mean": [(patches,)],
            "residual_std": [(patches,)],
            "tail_start": [(scores,)],
            "tail_scale": [(scores,)],
            "weights": [(scores,)],
        }
        for name, allowed in shapes.items():
            if name not in self._arrays or self._arrays[name].shape not in allowed:
                raise BundleError(f"{where}: damaged ({name}); export the bundle again")
        ranks, alarms = (self._arrays.get(name, np.zeros(0)) for name in ("ranks", "alarms"))
        counts = ranks.ndim == 2 and len(ranks) == scores and ranks.size > 0 and alarms.ndim == 1 and alarms.size > 0
        if not counts or not all(np.isfinite(array).all() for array in self._arrays.values()):
            raise BundleError(f"{where}: damaged (ranks, alarms, or what is no number); export the bundle again")
        wrong = surprise.wrong_array(self._arrays)
        if wrong:
            raise BundleError(f"{where}: damaged ({wrong}); export the bundle again")


def describe(verdict: Verdict) -> str:
    """Says in words why an instance is not trusted, and where."""
    places = ", ".join("(" + ", ".join(map(str, place)) + ")" for place in verdict.patches)
    return surprise.REASONS[verdict.reason] + (f"; patches {places}" if places else "")
