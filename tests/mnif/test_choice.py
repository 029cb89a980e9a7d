"""Which size is chosen, on curves whose answer is known."""

from collections.abc import Sequence
from typing import Any

import pytest

from mnif.comparison.choice import Candidate, candidates_of, knee, recommendations

SIZES = (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("bend", [1, 2, 3, 4])
def test_the_knee_of_two_straight_lines_is_where_they_meet(bend: int) -> None:
    """Three dB a doubling up to there, a fifth of one beyond."""
    qualities = [20 + 3 * min(place, bend) + 0.2 * max(place - bend, 0) for place in range(len(SIZES))]
    assert knee(SIZES, qualities) == bend


def test_a_curve_that_saturates_bends_where_it_is_steep_as_its_chord() -> None:
    """1 - exp(-x) over x from 0 to 5 is furthest from its chord at x = ln(5 / (1 - exp(-5)))  = 1.616."""
    sizes = [2 ** (place / 10) for place in range(51)]
    qualities = [1 - 2.718281828459045 ** -(place / 10) for place in range(51)]
    assert knee(sizes, qualities) == 16


@pytest.mark.parametrize(
    "qualities",
    [
        [20, 21, 22, 23, 24, 25],  # straight
        [20, 20.1, 20.3, 21, 23, 27],  # hollow
        [25, 24, 23, 22, 21, 20],  # falls
        [20, 20, 20, 20, 20, 20],
        [20, 25, 21, 21, 21, 21],  # the best is the next one: no room for a bend
    ],
)
def test_curves_that_do_not_bend_have_no_knee(qualities: Sequence[float]) -> None:
    assert knee(SIZES, qualities) is None


def test_what_falls_behind_the_best_does_not_move_the_knee() -> None:
    rises = [20, 23, 26, 26.4]
    assert knee(SIZES, [*rises, 25, 24]) == knee(SIZES[:4], rises) == 2


def candidate(num_bases: int, *qualities: float, cells: int = 4, shipped_bytes: int | None = None) -> Candidate:
    return Candidate(num_bases, cells, qualities, {"shipped_bytes": shipped_bytes or 1000 * num_bases}, {})


def chosen(*candidates: Candidate, **options: Any) -> list[int]:
    return [each.candidate.num_bases for each in recommendations(candidates, "psnr_heldout", **options)]


def test_recommendations_grow_from_good_enough_to_best() -> None:
    curve = [candidate(8, 20, 20), candidate(16, 24.2, 24.2), candidate(32, 24.8, 24.8), candidate(64, 25, 25)]
    assert chosen(*curve) == [16, 32, 64]
    assert chosen(*curve, good_enough=5.5) == [8, 32, 64]
    assert chosen(*curve, good_enough=0) == [32, 32, 64]  # no finer than what is as good


def test_what_seeds_differ_by_is_no_difference() -> None:
    """The best by 0.5 dB, of seeds that lie two apart: the standard deviation is the square root of two."""
    assert chosen(candidate(8, 20, 20), candidate(16, 24.5, 24.5), candidate(32, 24, 26)) == [16, 16, 32]
    (_, balanced, _) = recommendations([candidate(16, 24.5, 24.5), candidate(32, 24, 26)], "psnr_heldout")
    assert "within 1.4 dB of the best" in balanced.reason


def test_bytes_decide_among_equals() -> None:
    coarse = candidate(64, 25, 25, cells=2, shipped_bytes=5000)
    fine = candidate(32, 25.1, 25.1, cells=8, shipped_bytes=9000)
    assert chosen(coarse, fine) == [64, 64, 32]


def test_runs_of_a_setting_are_taken_together() -> None:
    results = [
        {"num_bases": size, "cells": 4, "psnr_heldout": size + noise, "name": "a", "only_once": 1.0}
        for size in (16, 8)
        for noise in (0.0, 2.0)
    ]
    del results[0]["only_once"]
    first, second = candidates_of(results)
    assert (first.num_bases, second.num_bases) == (8, 16)
    assert first.qualities == (8.0, 10.0)
    assert (first.quality, first.spread) == (9.0, pytest.approx(2**0.5))
    assert first.means["psnr_heldout"] == 9.0
    assert "only_once" in first.means
    assert "only_once" not in second.means
