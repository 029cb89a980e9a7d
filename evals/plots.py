"""The report's curves, drawn by matplotlib without a display."""

import io
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
