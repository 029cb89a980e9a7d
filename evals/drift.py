"""Whether instances come from where the held-out ones of a profile came from, and what to do if they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from mnif.latents.calibration import one_of_each
from mnif.latents.profile import Profile, Scored
from mnif.latents.surprise import SCORES
from mnif.models.mnif_model import MNIFModel

ADVICE = {
    "keep": "no test tells these instances from the held-out ones; keep the model",
    "refine": "they differ, but the bases can draw them: search for latents (`mnif encode --preset best`, with "
    "--robust if parts are rubbish) and do not trust the encoder alone; if they are blurred, noisy or moved, mend "
    "what records them",
    "grow": "some of them the bases cannot draw, even with latents searched for: add bases for the new kind",
    "refit": "most of them the bases cannot draw, even with latents searched for: fit a model to such data",
}
"""What to do, and why."""

FAMILIES = {
    "alarms": "more of them are doubtful or out than held-out ones would be (beta-binomial)",
    "scores": "a score has another distribution (Kolmogorov and Smirnov)",
    "latents": "a number of the latent has another distribution (Kolmogorov and Smirnov)",
    "coefficients": "a basis is used more or less (Kolmogorov and Smirnov, root mean square over cells and layers)",
}
"""The tests of each kind, and what a small p-value means."""

LEAST_INSTANCES = 8
"""That tests can tell anything of."""


@dataclass(frozen=True)
class Test:
    """One test of a family: what it is of, its p-value as it is, and Holm's for all tests together."""

    family: str
    subject: str
    p_value: float
    adjusted: float


def compare(
    profile: Profile, decoder: MNIFModel, scored: Scored, latents: Tensor, groups: Sequence[str], rate: float
) -> list[Test]:
    """Tests whether instances are of the distribution of the profile's.

    Args:
        profile: the model's.
        decoder: the model.
        scored: N instances beside the profile.
        latents: theirs, [N, D].
        groups: of each; one instance of each group counts, as tests are of independent ones.
        rate: of false alarms.

    Returns:
        All tests, the smallest p-value first.
    """
    known, alone = profile.arrays["reference_latents"], one_of_each(groups)
    numbers, scores = latents.cpu().numpy()[alone], scored.scores[alone]
    families: dict[str, dict[Any, float]] = {
        "alarms": {"share": alarms_p_value(profile, scored.p_values[alone], rate)},
        "scores": dict(zip(SCORES, _two_samples(profile.arrays["reference_scores"], scores), strict=True)),
        "latents": dict(enumerate(_two_samples(known, numbers))),
        "coefficients": dict(enumerate(_two_samples(*(_basis_use(decoder, rows) for rows in (known, numbers))))),
    }
    rows = [(family, str(name), p) for family, tests in families.items() for name, p in tests.items()]
    adjusted = holm(np.array([p for _, _, p in rows]))
    tests = [Test(*row, float(value)) for row, value in zip(rows, adjusted, strict=True)]
    return sorted(tests, key=lambda test: (test.adjusted, test.p_value))


def alarms_p_value(profile: Profile, p_values: np.ndarray, rate: float) -> float:
    """The chance of so many alarms or more among exchangeable instances.

    Their number is beta-binomial, as the threshold comes from m instances itself: with k = ⌊rate (m + 1)⌋ it is
    binomial with a share drawn from Beta(k, m + 1 − k).
    """
    m, count = len(profile.arrays["alarms"]), len(p_values)
    k = math.floor(rate * (m + 1) + 1e-9)
    alarms = int((p_values <= rate).sum())
    return float(stats.betabinom(count, k, m + 1 - k).sf(alarms - 1))


def holm(p_values: np.ndarray) -> np.ndarray:
    """Adjusts p-values [n] so that all tests together are wrong at no more than a level (Holm, 1979)."""
    order = np.argsort(p_values)
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p_values[order]), 1)
    return adjusted


def advice(significant: bool, undrawable: float, rate: float) -> str:
    """Chooses what to do: a key of :data:`ADVICE`.

    Args:
        significant: whether any test is, after the correction for all.
        undrawable: the share of instances whose residual is beyond that of nearly all (1 − ``rate``) held-out ones
            even with latents searched for.
        rate: of false alarms.
    """
    if not significant:
        return "keep"
    if undrawable <= 2 * rate:
        return "refine"
    return "grow" if undrawable <= 0.5 else "refit"


def undrawable_share(profile: Profile, residual_scores: np.ndarray, rate: float) -> float:
    """The share of residual scores [N] beyond the (1 − ``rate``) quantile of the profile's."""
    known = profile.arrays["reference_scores"][:, list(SCORES).index("residual")]
    return float((residual_scores > np.quantile(known, 1 - rate)).mean())


def _two_samples(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Kolmogorov and Smirnov's p-value for each column of [n, C] and [m, C]."""
    columns = zip(one.T, other.T, strict=True)
    return [float(stats.ks_2samp(a, b, method="asymp").pvalue) for a, b in columns]


@torch.no_grad()
def _basis_use(decoder: MNIFModel, latents: np.ndarray) -> np.ndarray:
    """How much each instance uses each basis: root mean square coefficients over cells and layers, [N, M]."""
    parts = torch.from_numpy(latents).to(decoder.device).split(64)
    use = [decoder.coefficients(some).square().mean(dim=(1, 2)).sqrt() for some in parts]
    return torch.cat(use).cpu().numpy()


def counts_of(tests: list[Test], level: float) -> dict[str, dict[str, int]]:
    """For each family how many tests are ``significant``, and how many there are, ``all``."""
    return {
        family: {
            "significant": sum(test.adjusted <= level for test in tests if test.family == family),
            "all": sum(test.family == family for test in tests),
        }
        for family in FAMILIES
    }
