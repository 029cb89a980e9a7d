"""A comparison as people read it: tables in Markdown, and curves over seconds."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from mnif.latents.pca import pca_warnings
from mnif.utils.errors import markdown_code, printable

_SHORT = {"whole": "whole", "missing": "half missing", "noise": "noise 0.2", "shift": "shifted"}


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Markdown with a table of quality, controls included, and one of cost; the content of ``compare.json``."""
    runs, unit, count = comparison["runs"], comparison["unit"], comparison["instances"]
    machine = comparison["machine"]
    steps = ", ".join(str(steps) for steps in sorted({run["refinement_steps"] for run in runs}))
    budget = (
        f"{comparison['train_seconds']:g} seconds of optimizer steps"
        if comparison["train_seconds"]
        else f"{runs[0]['train_steps']:,} steps"
    )
    lines = [
        f"# Ways of learning compared on {printable(comparison['data'])}",
        "",
        markdown_code(comparison["command"]),
        "",
        f"{budget} each on {machine['threads']} thread(s) of {machine['device']}: {count['train']:,} {unit}s to learn "
        f"from, {count['heldout']:,} held out.",
        "",
        *markdown_table(_quality_rows(comparison)),
        "",
        *_pca_lines(comparison),
        "Means over instances; PSNR in dB. *finder*: the latent that encoder or inner loop names at once. "
        f"*refined*: improved by Adam on the latent alone, steps: {steps} (from zero where there is no finder, and "
        "five times as many).",
        f"*probes*: PSNR against the clean original of {count['probes']:,} held-out {unit}s, refined latents found in "
        + ", or ".join(comparison["conditions"].values())
        + ".",
        "",
        *markdown_table(_cost_rows(runs, unit)),
        "",
        f"*training s* has validations in it. *ms per new {unit}*: the median of three batches of 1 / 32, divided by "
        "their size. *peak MB* is of the whole process.",
    ]
    augmented = [f"{run['name']} ({', '.join(run['augmented'])})" for run in runs if run["augmented"]]
    if augmented and len(augmented) < len(runs):
        lines += ["", f"Changed at random while training, which the others cannot be: {', '.join(augmented)}."]
    return "\n".join(lines) + "\n"


def curves_image(curves: Mapping[str, Sequence[Mapping[str, Any]]], results: Mapping[str, Mapping[str, Any]]) -> bytes:
    """A PNG of PSNR over seconds of training, one line for each run: training instances left, held-out ones right.

    Args:
        curves: the rows of each run's ``metrics.jsonl``.
        results: of each run; the refined ``psnr_heldout`` is a dot at its end.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for number, (name, rows) in enumerate(curves.items()):
        colour = f"C{number % 10}"
        for axes, metric_name in ((left, "psnr_train"), (right, "psnr_heldout")):
            points = [(row["seconds"], row[metric_name]) for row in rows if metric_name in row]
            axes.plot(
                *zip(*points, strict=True) if points else ([], []), color=colour, marker=".", linewidth=1.6, label=name
            )
        result = results[name]
        right.plot(result["train_seconds"], result["psnr_heldout"], "o", color=colour, markersize=6)
    left.set(title="training instances", xlabel="seconds of training", ylabel="PSNR [dB]")
    right.set(title="held-out instances (dot: refined latents)", xlabel="seconds of training")
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _quality_rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    runs, controls = comparison["runs"], comparison["controls"]
    parts = [name.removesuffix("_train") for name in runs[0] if name.endswith("_train") and "_pca_" not in name]
    metrics = sorted({name for name in parts if f"{name}_heldout" in runs[0]}, key=lambda name: (name != "psnr", name))
    head = ["run"]
    for figure in metrics:
        shown = figure.replace("psnr", "PSNR").replace("iou", "IoU").replace("_", " ")
        head += [f"{shown} train", f"{shown} held-out, finder", f"{shown} held-out, refined"]
    head += [f"probes: {_SHORT[name]}" for name in comparison["conditions"]]
    rows = [head]
    for run in runs:
        row = [run["name"]]
        for figure in metrics:
            latent_init = run.get(f"{figure}_heldout_{run['method']}")
            row += [
                _quality(figure, value) for value in (run[f"{figure}_train"], latent_init, run[f"{figure}_heldout"])
            ]
        rows.append([*row, *(_quality("psnr", run[f"psnr_heldout_{name}"]) for name in comparison["conditions"])])
    for label, control in [
        *((f"control: PCA, {pca['components']} components", pca) for pca in controls["pca"]),
        *([("control: mean instance", controls["mean"])] if "mean" in controls else []),
    ]:
        row, is_known_by_heart = [label], bool(_warnings_of(control, comparison))
        for figure in metrics:
            train, held_out = (_quality(figure, control.get(f"{figure}_{part}")) for part in ("train", "heldout"))
            row += [f"({train})" if is_known_by_heart else train, "–", held_out]
        rows.append(row + ["–"] * len(comparison["conditions"]))
    return rows


def _warnings_of(control: Mapping[str, Any], comparison: Mapping[str, Any]) -> list[str]:
    """Says so where a control's figures on training instances mean nothing."""
    return pca_warnings(control["components"], comparison["instances"]["train"]) if "components" in control else []


def _pca_lines(comparison: Mapping[str, Any]) -> list[str]:
    lines = [line for control in comparison["controls"]["pca"] for line in _warnings_of(control, comparison)]
    return [*(f"In brackets: {line}." for line in lines), *([""] if lines else [])]


def _cost_rows(runs: Sequence[Mapping[str, Any]], unit: str) -> list[list[str]]:
    rows = [
        [
            "run",
            "steps",
            "training s",
            f"{unit}s/s",
            f"ms per new {unit}, finder",
            f"ms per new {unit}, refined",
            "decoder parameters",
            "fields × parameters",
            "multiply-adds per value",
            "peak MB",
        ]
    ]
    for run in runs:
        rows.append(
            [
                run["name"],
                f"{run['train_steps']:,}",
                f"{run['train_seconds']:.1f}",
                f"{run['images_per_second']:,.0f}",
                _milliseconds(run, "finder"),
                _milliseconds(run, "refined"),
                f"{run['decoder_parameters']:,}",
                f"{run['fields_per_instance']:,} × {run['field_parameters']:,}",
                f"{run['multiply_adds_per_value']:,}",
                f"{run['peak_rss_mb']:,.0f}" if "peak_rss_mb" in run else "–",
            ]
        )
    return rows


def _quality(figure: str, value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if figure.startswith("psnr") else f"{value:.3f}"


def _milliseconds(run: Mapping[str, Any], kind: str) -> str:
    found = [run.get(f"seconds_per_instance_{kind}_batch_{size}") for size in (1, 32)]
    return " / ".join(f"{1000 * seconds:.3g}" for seconds in found if seconds is not None) or "–"


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Writes a table, its head the first row, with columns aligned in the source too, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [line(rows[0]), rule, *(line(row) for row in rows[1:])]
