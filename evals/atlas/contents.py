"""An atlas as its templates and its file of figures take it: names, numbers, and pictures as text within a limit."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from evals.atlas.measured import Atlas, basis_names
from evals.atlas.plates import BasisPlate, Draughtsman, Strip, SubjectPlate
from evals.atlas.removal import RemovalTest
from evals.report.embedded import webp_uri
from mnif.utils.process import progress_bar

PAGE_BYTES = 12_000_000
"""Of all pictures together, so that a page stays below 15 MB."""

_QUALITIES = (85, 70, 50, 30, 15)  # of WebP, tried in turn
_NEIGHBOURS = 3


def drawn_plates(atlas: Atlas, count: int) -> tuple[dict[int, BasisPlate], list[SubjectPlate]]:
    """Draws the ``count`` most important bases and all that subjects name, and the subjects."""
    draughtsman = Draughtsman(atlas.mixture)
    bar = progress_bar(
        list(zip(atlas.subjects, atlas.rises, strict=True)), desc="explaining", unit=atlas.mixture.signal.noun
    )
    subjects = [draughtsman.subject(subject, rises, atlas.named) for subject, rises in bar]
    named = [strip.basis for subject in subjects for strip in subject.strips]
    wanted = dict.fromkeys([*atlas.order[:count], *named])
    chosen = sorted(wanted, key=atlas.order.index)
    bar = progress_bar(chosen, desc="drawing bases", unit="basis")
    return {basis: draughtsman.basis(basis, atlas.usage, atlas.latents, atlas.ids) for basis in bar}, subjects


def contents(
    atlas: Atlas, plates: dict[int, BasisPlate], subjects: Sequence[SubjectPlate], limit: int = PAGE_BYTES
) -> dict[str, Any]:
    """Writes bases and subjects for the templates, in the best quality of which all fit into ``limit`` bytes."""
    for quality in _QUALITIES:
        writer = _Writer(atlas, list(plates), quality)
        bases = [writer.basis(basis, plate) for basis, plate in plates.items()]
        explained = [writer.subject(plate) for plate in subjects]
        if writer.bytes <= limit:
            break
    number = sum(not subject.is_sample for subject in atlas.subjects)
    strip = subjects[0].strips[0]
    return {
        "bases": bases,
        "instances": explained[:number],
        "samples": explained[number:],
        "steps": [step_words(step) for step in strip.steps],
        "as_it_is": strip.steps.index(0),
        "sides": len(strip.frames),
        "side_words": [f"{360 * side // len(strip.frames)}°" for side in range(len(strip.frames))],
    }


class _Writer:
    """Writes plates for the templates, and counts the bytes of their pictures."""

    def __init__(self, atlas: Atlas, shown: list[int], quality: int) -> None:
        self.atlas, self.quality, self.bytes = atlas, quality, 0
        self.names, self.layers = basis_names(atlas.mixture.decoder)
        self.place = {basis: place for place, basis in enumerate(shown)}

    def basis(self, basis: int, plate: BasisPlate) -> dict[str, Any]:
        usage = self.atlas.usage
        rows = {"with it": plate.shown, "without it": plate.without, f"difference, × {plate.gain}": plate.difference}
        return self._named(basis) | {
            "layer": self.layers[basis],
            "share": 100 * float(self.atlas.importance[basis]),
            "use": float(usage.cells.flatten(1)[:, basis].square().mean().sqrt()),
            "active": 100 * float(usage.active.flatten()[basis]),
            "users": plate.users,
            "tile": self._picture(plate.difference[0]),
            "rows": {name: self._sheet(pictures[None]) for name, pictures in rows.items()},
            "cells": self._map(plate.cells),
            "together": self._nearest(basis, usage.correlation),
            "alike": self._nearest(basis, usage.likeness),
        }

    def subject(self, plate: SubjectPlate) -> dict[str, Any]:
        return {
            "name": plate.name,
            "original": None if plate.original is None else self._picture(plate.original),
            "beside_original": None if plate.beside_original is None else self._picture(plate.beside_original),
            "picture": self._sheet(plate.shown[:, None]),
            "psnr": psnr_of(plate.error),
            "left": self._sheet(plate.left[:, None]),
            "left_psnr": psnr_of(plate.left_error),
            "others": self._sheet(plate.left_others[:, None]),
            "others_psnr": psnr_of(plate.left_others_error),
            "cells": self._map(plate.cells),
            "strips": [self._strip(strip) for strip in plate.strips],
        }

    def _strip(self, strip: Strip) -> dict[str, Any]:
        return self._named(strip.basis) | {
            "share": 100 * strip.share,
            "psnr": psnr_of(strip.error),
            "frames": self._sheet(strip.frames),
            "adds": self._sheet(strip.difference[:, None]),
            "gain": strip.gain,
            "cells": self._map(strip.cells),
        }

    def _named(self, basis: int) -> dict[str, Any]:
        return {"name": self.names[basis], "place": self.place.get(basis)}

    def _nearest(self, basis: int, by: Any) -> list[dict[str, Any]]:
        found = self.atlas.usage.nearest(basis, _NEIGHBOURS, by)
        return [self._named(other) | {"value": value} for other, value in found]

    def _sheet(self, pictures: np.ndarray) -> dict[str, Any]:
        return self._picture(on_a_sheet(pictures)) | {"rows": pictures.shape[0], "columns": pictures.shape[1]}

    def _picture(self, picture: np.ndarray) -> dict[str, Any]:
        return self._embedded(picture, quality=self.quality)

    def _map(self, cells: np.ndarray | None) -> dict[str, Any] | None:
        return None if cells is None else self._embedded(cells, lossless=True, exact=True)

    def _embedded(self, picture: np.ndarray, **options: Any) -> dict[str, Any]:
        uri = webp_uri(Image.fromarray(picture), **options)
        self.bytes += len(uri)
        return {"uri": uri, "width": picture.shape[1], "height": picture.shape[0]}


def on_a_sheet(pictures: np.ndarray) -> np.ndarray:
    """Lays pictures [rows, columns, H, W, 3] out as one, [rows · H, columns · W, 3]."""
    rows, columns, height, width, channels = pictures.shape
    return pictures.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def step_words(step: float) -> str:
    """Says in words what a step of a coefficient is."""
    signed = f"{step:+g}".replace("-", "−")
    words: dict[float, str] = {-2: "turned around", -1: "without", 1: "doubled"}
    return "as it is" if step == 0 else f"{signed}: {words[step]}" if step in words else signed


def psnr_of(error: float) -> float:
    """The PSNR in dB of a mean squared error of values in [-1, 1]; at most 100."""
    return -10 * math.log10(max(error / 4, 1e-10))


def truth(test: RemovalTest, count: int) -> dict[str, Any]:
    """What a test found at one count, for the page and the file: rises of the squared error, and their ratios."""
    place = test.counts.index(count)
    others, as_large = test.ratios(count)
    return {
        "of": test.of,
        "removed": count,
        "rise_strongest": test.strongest[place],
        "rise_random": test.random[place],
        "rise_same_sum": test.same_sum[place],
        "ratio_random": _finite(others),
        "ratio_same_sum": _finite(as_large),
        "lowest_ratio_random": _finite(test.lowest[place]),
        "psnr": psnr_of(test.before),
        "psnr_strongest": psnr_of(test.before + test.strongest[place]),
        "psnr_random": psnr_of(test.before + test.random[place]),
        "psnr_same_sum": psnr_of(test.before + test.same_sum[place]),
    }


def removal_curves(test: RemovalTest) -> tuple[list[float], dict[str, list[float]]]:
    """The shares in percent and the PSNR of what is left, for :func:`evals.charts.removal_chart`."""
    orders = {"the strongest": test.strongest, "as large, at random": test.same_sum, "at random": test.random}
    shares = [100 * count / test.of for count in test.counts]
    return shares, {name: [psnr_of(test.before + rise) for rise in rises] for name, rises in orders.items()}


def figures(atlas: Atlas) -> dict[str, Any]:
    """What the file of figures holds: the tests, and every basis from the most important one on."""
    names, layers = basis_names(atlas.mixture.decoder)
    use = atlas.usage.cells.flatten(1).square().mean(dim=0).sqrt()
    explained = [subject.name for subject in atlas.subjects]
    return {
        "coefficients": truth(atlas.of_parts, atlas.named),
        "bases_in_all_cells": truth(atlas.of_bases, atlas.named_bases),
        "explained": explained,
        "bases": [
            {
                "name": names[basis],
                "layer": layers[basis],
                "importance": float(atlas.importance[basis]),
                "use": float(use[basis]),
                "active": float(atlas.usage.active.flatten()[basis]),
            }
            for basis in atlas.order
        ],
    }


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None
