"""What `benchmarks/gpu.py` writes of its parts: results.json, results.md and chart.png."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnif.utils.files import write_json, written_atomically
from mnif.utils.json_files import read_json

Part = dict[str, Any]


@dataclass(frozen=True)
class Reach:
    """What one H100 is to reach.

    Attributes:
        words: what is measured.
        part: in which part.
        work: a pattern of the row, and of the one that stands for it in miniature.
        figure: of that row.
        bound: that it is to reach.
        at_most: from above; else from below.
    """

    words: str
    part: str
    work: str
    figure: str
    bound: float
    at_most: bool = False


_HOURS = "hours of celeba-hq-s, stage one"
_CAVIA = r"CAVIA second order, (S, 64×64, batch 32|tiny.*), (tf32|float32)"

REACHES = [
    Reach("CAVIA of second order, S at 64×64, batch 32: times the plain form", "fields", _CAVIA, "ratio", 8),
    Reach("the same: share of the card's TF32 rate", "fields", _CAVIA, "of peak", 0.3),
    Reach(
        *("auto-decoding, S at 64×64: times the plain form", "fields"),
        *(r"auto-decoding, (S, 64×64, batch 32|tiny.*), (tf32|float32)", "ratio", 6),
    ),
    Reach(
        *("decode S at batch 1,024: share of the card's TF32 rate", "fields"),
        *(r"decode (S, 64×64, batch 1024|tiny, batch 4), (tf32|float32)", "of peak", 0.4),
    ),
    Reach(
        *("encoder and mixing, default form at 32×32: images/s", "fields"),
        *(r"encoder \+ mixing, (default form, .*|tiny.*), forward, (tf32|float32)", "ours, images/s", 50_000),
    ),
    Reach(
        *("one step at batch 1 as a CUDA graph: ms", "sampling"),
        *(r"student, 1 step, batch 1, CUDA graph", "p50, ms", 1, True),
    ),
    Reach("800 epochs of celeba-hq-s at the measured rate: hours", "fields", _CAVIA, _HOURS, 3, True),
]


def read_parts(output_dir: Path) -> dict[str, Part]:
    """The parts that have left something, by name."""
    return {path.stem: read_json(path) for path in sorted((output_dir / "parts").glob("[!.]*.json"))}


def write_report(output_dir: Path) -> None:
    parts = read_parts(output_dir)
    write_json(output_dir / "results.json", parts)
    with written_atomically(output_dir / "results.md") as temporary:
        temporary.write_text(markdown(parts))
    if any(bars(parts).values()):
        with written_atomically(output_dir / "chart.png") as temporary:
            draw_chart(bars(parts), temporary)


def markdown(parts: dict[str, Part]) -> str:
    """A table for each part, with the columns that its results have."""
    if not parts:
        return "Nothing has been measured.\n"
    first = next(iter(parts.values()))
    told = [f"{name} {shown(value)}" for name, value in first["machine"].items()]
    lines = ["# Measured by `benchmarks/gpu.py`" + (" --tiny: figures mean nothing" if first["tiny"] else ""), ""]
    lines += [", ".join(told), "", *reached(parts), ""]
    for name, part in parts.items():
        rows = [flat(row) for row in part["rows"]]
        columns = list(dict.fromkeys(column for row in rows for column in row if column != "work"))
        lines += [f"## {name}" + ("" if part["finished"] else ", cut off"), ""]
        lines += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            lines.append(f"| {row['work']} | {' | '.join(shown(row.get(column, '')) for column in columns)} |")
        lines.append("")
    return "\n".join(lines)


def reached(parts: dict[str, Part]) -> list[str]:
    """A table of what one H100 is to reach, what was measured, and whether that is enough."""
    lines = ["## Reach, on one H100", "", "| | asked | measured | met |", "|---|---|---|---|"]
    for reach in REACHES:
        part = parts.get(reach.part, {"rows": [], "device": "", "tiny": False})
        found = [row for row in part["rows"] if re.fullmatch(reach.work, row["work"])]
        value = found[-1].get(reach.figure) if found else None
        enough = value is not None and (value <= reach.bound if reach.at_most else value >= reach.bound)
        met = "yes" if enough else "no"
        if value is None:
            met = "not measured"
        elif part["tiny"] or not part["device"].startswith("cuda"):
            met = "not judged: this is no GPU's figure"
        asked = f"{'≤' if reach.at_most else '≥'} {shown(float(reach.bound))}"
        lines.append(f"| {reach.words} | {asked} | {'' if value is None else shown(value)} | {met} |")
    return lines


TOLD = ("psnr_train", "psnr_heldout", "fd_lite0", "fd_lite0_floor", "fd_lite0_gaussian")
"""Of all that commands have measured, what tables have; floor is real against real."""


def flat(row: dict[str, Any]) -> dict[str, Any]:
    metrics = row.get("metrics", {})
    return {name: value for name, value in row.items() if name != "metrics"} | {
        name: metrics[name] for name in TOLD if name in metrics
    }


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value).replace("|", "/")


def bars(parts: dict[str, Part]) -> dict[str, tuple[float, float]]:
    """Pictures per second, ours and the plain form's (0 where it found no memory), by work."""
    rows = parts.get("fields", {"rows": []})["rows"]
    return {
        row["work"]: (row["ours, images/s"], row.get("plain, images/s", 0.0))
        for row in rows
        if "ours, images/s" in row
    }


def draw_chart(rates: dict[str, tuple[float, float]], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.4 * len(rates)), layout="constrained")
    for offset, (name, column) in enumerate((("mnif", 0), ("plain PyTorch", 1))):
        places = [row + 0.4 * offset for row in range(len(rates))]
        drawn = axes.barh(places, [pair[column] for pair in rates.values()], height=0.38, label=name)
        axes.bar_label(drawn, [f"{pair[column]:,.0f}" for pair in rates.values()], padding=3, fontsize=8)
    axes.set_yticks([row + 0.2 for row in range(len(rates))], list(rates), fontsize=8)
    axes.set(xscale="log", xlabel="pictures per second")
    axes.margins(x=0.15)
    axes.invert_yaxis()
    figure.legend(loc="outside upper left", ncols=2)
    figure.savefig(path, dpi=110, format="png")
    pyplot.close(figure)
