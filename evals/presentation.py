"""The figures of one or several evaluations as people read them: tables, each figure above its controls, and plots."""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_LABELS = {
    "nn_ratio": "nn_ratio, 1 is as new as unseen data",
    "nn_ratio_latents": "nn_ratio in latents",
    "copied_share_latents": "copied share in latents, 0.05 is none",
    "psnr_train": "PSNR, training, dB",
    "psnr_heldout": "PSNR, held-out, dB",
    "ssim_train": "SSIM, training",
    "ssim_heldout": "SSIM, held-out",
    "border_step_ratio_heldout": "step across cell borders, held-out, share of the originals'",
}


_LESS_IS_BETTER = ("fid", "fd_", "kid", "kd_", "rfid", "rfd_", "mmd", "chamfer", "emd")


_MORE_IS_BETTER = ("precision", "recall", "density", "coverage", "cov", "psnr", "ssim", "iou", "accuracy")


_ORDER = ("fid", "fd_", "kid", "kd_", "precision", "recall", "density", "coverage", "nn_", "copied", "psnr", "ssim")


_AFTER = {
    "gaussian": "Gaussian latents",
    "pca": "Gaussian over PCA",
    "floor": "real against real",
    "copies": "copies of training instances",
    "encoder": "encoder alone",
    "inner_loop": "inner loop alone",
}


_WITHIN = {"pca": "PCA, as many numbers", "mean": "mean of the training set", "floor": "real against real"}


_ELSEWHERE = ("seconds", "peak_rss_mb", "images_per_second")  # not quality


_DETAILS = ("_std", "_test", "_subset_mean", "_test_encoder", "_test_inner_loop", "border_step_ratio_train")


@dataclass(frozen=True)
class TableRow:
    """One figure of every evaluation.

    Attributes:
        label: with an arrow towards better.
        cells: one for each evaluation, "–" where it is unknown.
        control: whether it is a control of the figure above.
    """

    label: str
    cells: list[str]
    control: bool = False


def table_rows(evaluations: Sequence[Mapping[str, Any]]) -> list[TableRow]:
    """The rows of a table of evaluations, each the content of a ``metrics.json``."""
    rows = []
    for name in _metrics(evaluations):
        rows.append(TableRow(_label(name), [_cell(metrics, name) for metrics in evaluations]))
        for label, control in _controls(name):
            if any(control in metrics for metrics in evaluations):
                rows.append(TableRow(label, [_cell(metrics, control) for metrics in evaluations], control=True))
    return rows


def markdown_table(head: Sequence[str], rows: Sequence[TableRow]) -> str:
    """The table in Markdown; controls are in italics."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        label = f"*– {row.label}*" if row.control else row.label
        lines.append("| " + " | ".join([label, *row.cells]) + " |")
    return "\n".join(lines) + "\n"


def protocol_line(protocol: Mapping[str, Any]) -> str:
    """What the numbers were measured under, in a sentence."""
    return "Protocol: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in protocol.items()) + "."


def evaluation_markdown(metrics: Mapping[str, Any], name: str) -> str:
    """One evaluation: its table, protocol, warnings and command."""
    parts = [markdown_table(["figure", name], table_rows([metrics]))]
    parts += [f"**{warning}**\n" for warning in metrics.get("warnings", [])]
    if "protocol" in metrics:
        parts.append(protocol_line(metrics["protocol"]) + "\n")
    parts.append(f"`{metrics['command']}`\n")
    return "\n".join(parts)


def _metrics(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all figures that get a row of their own."""
    names = dict.fromkeys(
        name for metrics in evaluations for name, value in metrics.items() if isinstance(value, float)
    )
    controls = {control for name in names for _, control in _controls(name)}
    splits = [name for name in names if name not in controls and name not in _ELSEWHERE]
    shown = [name for name in splits if not name.endswith(_DETAILS)]
    return sorted(shown, key=lambda name: next((i for i, word in enumerate(_ORDER) if name.startswith(word)), 99))


def _controls(name: str) -> Iterator[tuple[str, str]]:
    """Label and name of every control that a figure may have."""
    for ending, label in _AFTER.items():
        yield label, f"{name}_{ending}"
    head, _, part = name.rpartition("_")
    for word, label in _WITHIN.items():
        yield label, f"{head}_{word}_{part}"


def _label(name: str) -> str:
    arrow = " ↓" if name.startswith(_LESS_IS_BETTER) else " ↑" if name.startswith(_MORE_IS_BETTER) else ""
    return _LABELS.get(name, name) + arrow


def _cell(metrics: Mapping[str, Any], name: str) -> str:
    if name not in metrics:
        return "–"
    spread = metrics.get(f"{name}_std")
    return f"{metrics[name]:.4g}" + (f" ± {spread:.1g}" if spread is not None else "")


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
    qualities = [name for name in _QUALITIES if any(name in metrics for metrics in evaluations.values())]
    of_models = {name: metrics for name, metrics in evaluations.items() if "model" in metrics}
    if not of_models or not qualities:
        return None
    figure = Figure(figsize=(4.2 * len(COSTS), 3.4 * len(qualities)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(qualities), len(COSTS), squeeze=False)
    for quality, panels in zip(qualities, grid, strict=True):
        for (cost, label), axes in zip(COSTS.items(), panels, strict=True):
            for name, metrics in of_models.items():
                if quality in metrics and cost in metrics["model"]:
                    spread = metrics.get(f"{quality}_std", 0.0)
                    axes.errorbar(metrics["model"][cost], metrics[quality], spread, fmt="o", capsize=3, label=name)
            floors = [metrics[f"{quality}_floor"] for metrics in of_models.values() if f"{quality}_floor" in metrics]
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
