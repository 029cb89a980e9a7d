"""Which size to train, from the figures of several: the knee of a curve, and three settings worth their bytes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

TOLERANCES = {"psnr_heldout": (0.3, 1.0), "iou_heldout": (0.01, 0.03)}
"""For each quality that is chosen by, how far below the best is as good as it, and how far is good enough."""

_BEND = 0.1  # of the curve's height, the least that a knee stands out above the chord

KNEE_RULE = (
    "The knee of a curve is the M at which held-out quality lies highest above the straight line over log M from the "
    f"smallest M to the best one, if that is at least {_BEND:.0%} of the rise (Satopää et al., 2011); a straight or "
    "hollow curve has none."
)


@dataclass(frozen=True)
class Candidate:
    """A setting that was tried, over its seeds.

    Attributes:
        num_bases: M.
        cells: along each axis.
        qualities: held-out quality, one number for each seed.
        means: of every figure over the seeds.
        spreads: their standard deviations over the seeds, the square root of the unbiased variance.
    """

    num_bases: int
    cells: int
    qualities: tuple[float, ...]
    means: Mapping[str, float]
    spreads: Mapping[str, float]

    @property
    def quality(self) -> float:
        """The mean held-out quality."""
        return fmean(self.qualities)

    @property
    def spread(self) -> float:
        """The standard deviation of the held-out quality over seeds."""
        return stdev(self.qualities)


@dataclass(frozen=True)
class Recommendation:
    """A setting to train at full length.

    Attributes:
        name: "smallest", "balanced" or "best".
        candidate: the setting.
        reason: why, in a sentence.
    """

    name: str
    candidate: Candidate
    reason: str


def quality_name(result: Mapping[str, Any]) -> str:
    """Names the figure that sizes are chosen by: the IoU where shapes have one, else the PSNR."""
    return "iou_heldout" if "iou_heldout" in result else "psnr_heldout"


def candidates_of(results: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    """Groups runs of one setting, whatever their seed, by cells and then by M.

    Args:
        results: of runs, with ``num_bases``, ``cells`` and every run's figures; two seeds of each setting at least.
    """

    def setting(result: Mapping[str, Any]) -> tuple[int, int]:
        return result["cells"], result["num_bases"]

    quality, candidates = quality_name(results[0]), []
    for (cells, num_bases), group in groupby(sorted(results, key=setting), key=setting):
        runs = list(group)
        names = [name for name in runs[0] if all(_is_figure(run.get(name)) for run in runs)]
        figures = {name: [float(run[name]) for run in runs] for name in names}
        candidates.append(
            Candidate(
                num_bases,
                cells,
                tuple(figures[quality]),
                {name: fmean(values) for name, values in figures.items()},
                {name: stdev(values) for name, values in figures.items()},
            )
        )
    return candidates


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def knee(sizes: Sequence[float], qualities: Sequence[float]) -> int | None:
    """Finds the place in a curve beyond which a larger size brings less than before (:data:`KNEE_RULE`).

    Args:
        sizes: above 0, growing.
        qualities: one for each of them.

    Returns:
        Its number; None where the curve does not bend.
    """
    best = max(range(len(sizes)), key=lambda index: qualities[index])
    height, width = qualities[best] - qualities[0], math.log(sizes[best] / sizes[0])
    if best < 2 or not height > 0:
        return None
    above = [
        (qualities[index] - qualities[0]) / height - math.log(sizes[index] / sizes[0]) / width
        for index in range(best + 1)
    ]
    furthest = max(range(best + 1), key=lambda index: above[index])
    return furthest if above[furthest] >= _BEND else None


def recommendations(
    candidates: Sequence[Candidate], quality: str, good_enough: float | None = None
) -> list[Recommendation]:
    """Chooses the smallest good enough, a balanced and the best of what was tried; some may be one and the same.

    Best is the highest mean over seeds. Balanced are the fewest bytes whose mean is as good within what seeds differ
    by, smallest the fewest bytes that are good enough.

    Args:
        candidates: with ``shipped_bytes`` among their figures.
        quality: a name of :data:`TOLERANCES`.
        good_enough: how far below the best is good enough; default: of :data:`TOLERANCES`.
    """
    equal, enough = TOLERANCES[quality]
    best = max(candidates, key=lambda candidate: candidate.quality)
    equal = max(equal, best.spread)
    enough = max(enough if good_enough is None else good_enough, equal)
    unit = " dB" if quality.startswith("psnr") else " of IoU"

    def fewest_bytes(within: float) -> Candidate:
        near = [candidate for candidate in candidates if candidate.quality >= best.quality - within]
        return min(near, key=lambda candidate: (candidate.means["shipped_bytes"], candidate.num_bases))

    return [
        Recommendation("smallest", fewest_bytes(enough), f"the fewest bytes within {enough:.2g}{unit} of the best"),
        Recommendation(
            "balanced",
            fewest_bytes(equal),
            f"the fewest bytes within {equal:.2g}{unit} of the best: the larger of {TOLERANCES[quality][0]:g} and "
            "what its seeds differ by",
        ),
        Recommendation("best", best, "the highest held-out quality, mean over seeds"),
    ]
