"""Verdicts on instances, and why: which score, which patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mnif.latents.calibration import refinement_gaps
from mnif.latents.profile import Profile, Scored
from mnif.latents.surprise import REASONS, SCORES, VERDICTS
from mnif.utils.errors import printable

_PATCHES = 4  # that are named
_DEVIATION = 3.0  # standard deviations from which on a patch is named
_SHOWN = 5  # instances in a summary


def judge(profile: Profile, scored: Scored, ids: Sequence[str], rate: float) -> dict[str, Any]:
    """Judges instances, as it is written to ``metrics.json``.

    Args:
        profile: the model's.
        scored: N instances beside it.
        ids: theirs.
        rate: of false alarms.

    Returns:
        ``false_alarm_rate``, ``counts`` of the verdicts, and ``instances``: by id the verdict, its conformal
        ``p_value``, the ``reason`` (a kind of damage or a score), all ``scores``, and the ``patches`` that the field
        misses most, by their place along each axis from 0 on; of views, these are means.
    """
    verdicts = profile.verdicts(scored, rate)
    instances = {
        id: {
            "verdict": verdicts[row],
            "p_value": round(float(scored.p_values[row]), 5),
            "reason": scored.reasons[row],
            "scores": dict(zip(SCORES, (round(float(score), 4) for score in scored.scores[row]), strict=True)),
            "patches": missed_patches(scored.deviations[row], profile.record.patches),
        }
        for row, id in enumerate(ids)
    }
    counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
    return {"false_alarm_rate": rate, "counts": counts, "instances": instances}


def missed_patches(deviations: np.ndarray, patches: Sequence[int]) -> list[list[int]]:
    """Finds the patches [P] that the field misses most, at most four, the worst first."""
    worst = [int(patch) for patch in np.argsort(-deviations)[:_PATCHES] if deviations[patch] > _DEVIATION]
    return [[int(place) for place in np.unravel_index(patch, tuple(patches))] for patch in worst]


def add_gaps(judged: dict[str, Any], profile: Profile, first: Tensor, refined: Tensor) -> None:
    """Adds to each instance how far refinement moved its latent, ``gap``, and the ``gap_p_value`` of that.

    The verdict stays: its false-alarm rate is that of the other scores.
    """
    gaps = refinement_gaps(first.cpu().numpy(), refined.cpu().numpy())
    for instance, gap, p_value in zip(judged["instances"].values(), gaps, profile.gap_p_values(gaps), strict=True):
        instance |= {"gap": round(float(gap), 4), "gap_p_value": round(float(p_value), 5)}


def summary(judged: dict[str, Any]) -> str:
    """Says how many instances are in, doubtful and out, and names the worst, in some lines."""
    counts, rate = judged["counts"], judged["false_alarm_rate"]
    total = sum(counts.values())
    lines = [
        f"gate: {', '.join(f'{counts[verdict]} {verdict}' for verdict in VERDICTS)} of {total} "
        f"(of instances like the held-out ones, {rate:.0%} or fewer would be doubtful or out)"
    ]
    outside = {id: one for id, one in judged["instances"].items() if one["verdict"] != "in"}
    for id, one in sorted(outside.items(), key=lambda item: item[1]["p_value"])[:_SHOWN]:
        where = "".join(f" {tuple(patch)}" for patch in one["patches"])
        where = f"; patches{where}" if where else ""
        lines.append(f"  {printable(id)}: {one['verdict']}, {REASONS[one['reason']]} ({one['reason']}){where}")
    return "\n".join(lines)
