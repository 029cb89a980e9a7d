"""The report's curves, drawn by matplotlib without a display."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

LABELS = {
    "loss": "training loss",
    "psnr_train": "training pictures",
    "psnr_heldout": "held-out pictures",
    "validation_loss": "held-out latents",
    "validation_loss_train": "training latents",
}


COSTS = {
    "num_inference_steps": "denoising steps",
    "multiply_adds_per_value": "multiply-adds of the fields per value",
    "num_bases": "bases M",
}
"""What quality is paid with, as in ``model`` of a ``metrics.json``."""

_QUALITIES = ("fid", "fd_lite0", "mmd_chamfer", "psnr_heldout", "iou_heldout")


def comparison_plot(evaluations: Mapping[str, Mapping[str, Any]]) -> bytes | None:
    """A PNG of quality against what it costs, a panel for each kind of cost; None if no evaluation is of a model.

    Args:
        evaluations: name → content of ``metrics.json``.
    """
    qualities = [name for name in _QUALITIES if any(name in figures for figures in evaluations.values())]
    of_models = {name: figures for name, figures in evaluations.items() if "model" in figures}
    if not of_models or not qualities:
        return None
    figure = Figure(figsize=(4.2 * len(COSTS), 3.4 * len(qualities)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(qualities), len(COSTS), squeeze=False)
    for quality, panels in zip(qualities, grid, strict=True):
        for (cost, label), axes in zip(COSTS.items(), panels, strict=True):
            for name, figures in of_models.items():
                if quality in figures and cost in figures["model"]:
                    spread = figures.get(f"{quality}_std", 0.0)
                    axes.errorbar(figures["model"][cost], figures[quality], spread, fmt="o", capsize=3, label=name)
            floors = [figures[f"{quality}_floor"] for figures in of_models.values() if f"{quality}_floor" in figures]
            if floors:
                axes.axhline(min(floors), color="grey", linestyle=":", linewidth=1, label="real against real")
            axes.set(xlabel=label, ylabel=quality)
            axes.grid(alpha=0.3)
    grid[0][0].legend(frameon=False, fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def curve_plot(
    rows: list[dict[str, Any]], stage: str, names: list[str], vertical: str, logarithmic: bool = False
) -> bytes | None:
    """A PNG of figures ``names`` of one stage over its steps; None if the stage has none of them.

    Args:
        rows: of ``metrics.jsonl``.
        stage: the command's name.
        names: the figures, as in the rows.
        vertical: label of the vertical axis, with its unit.
        logarithmic: vertical axis.
    """
    figure = Figure(figsize=(5.2, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in names:
        points = [(row["step"], row[name]) for row in rows if row["stage"] == stage and name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=LABELS.get(name, name), linewidth=1.6)
    if not axes.lines:
        return None
    if logarithmic:
        axes.set_yscale("log")
    axes.set(xlabel=f"step of mnif {stage}", ylabel=vertical)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
