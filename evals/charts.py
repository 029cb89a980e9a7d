"""Curves of training, and quality against what it costs, as charts: PNG files, or SVG in the colours of a page."""

import io
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

LABELS = {
    "loss": "training loss",
    "psnr_train": "training",
    "psnr_heldout": "held out",
    "validation_loss": "held out",
    "validation_loss_train": "training",
}

COSTS = {
    "num_inference_steps": "denoising steps",
    "multiply_adds_per_value": "multiply-adds of the fields per value",
    "num_bases": "bases M",
}
"""What quality is paid with, as in ``model`` of a ``metrics.json``."""

_QUALITIES = ("fid", "fd_lite0", "fd_resnet", "mmd_chamfer", "psnr_heldout", "iou_heldout")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, 2008
_INK = "#010101"  # of axes and words; the page puts its own in this place
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mnif",
    "axes.prop_cycle": cycler(color=_COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_FEW = 25  # points of a curve that are shown as points too
_NAMES_WITHIN = 4  # that find room among the curves


def comparison_chart(evaluations: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Plots quality against what it costs, a panel for each kind of cost; None if no evaluation is of a model.

    Args:
        evaluations: name → content of ``metrics.json``.
    """
    qualities = [name for name in _QUALITIES if any(name in metrics for metrics in evaluations.values())]
    of_models = {name: metrics for name, metrics in evaluations.items() if "model" in metrics}
    if not of_models or not qualities:
        return None
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * len(COSTS), 3.4 * len(qualities)), dpi=110, layout="constrained")
        grid = figure.subplots(len(qualities), len(COSTS), squeeze=False)
        for quality, panels in zip(qualities, grid, strict=True):
            for cost, axes in zip(COSTS, panels, strict=True):
                _compare(axes, of_models, quality, cost)
        grid[0][0].legend(frameon=False, fontsize="small")
    return figure


def _compare(axes: Axes, evaluations: Mapping[str, Mapping[str, Any]], quality: str, cost: str) -> None:
    for name, metrics in evaluations.items():
        if quality in metrics and cost in metrics["model"]:
            spread = metrics.get(f"{quality}_std", 0.0)
            axes.errorbar(metrics["model"][cost], metrics[quality], spread, fmt="o", capsize=3, label=name)
    floors = [metrics[f"{quality}_floor"] for metrics in evaluations.values() if f"{quality}_floor" in metrics]
    if floors:
        axes.axhline(min(floors), color="grey", linestyle=":", linewidth=1, label="real against real")
    axes.set(xlabel=COSTS[cost], ylabel=quality)
    axes.grid(alpha=0.3)


def histogram_chart(known: Sequence[float], now: Sequence[float], horizontal: str) -> Figure:
    """Draws the density of numbers now over that of known ones, outlined; both in the same bins.

    Args:
        known: at least one number.
        now: likewise.
        horizontal: label of the horizontal axis.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel()
        low, high = min(*known, *now), max(*known, *now)
        bins = [low + (high - low + 1e-9) * step / 30 for step in range(31)]
        axes.hist(now, bins, density=True, color=_COLOURS[1], alpha=0.55, label="now")
        axes.hist(known, bins, density=True, histtype="step", color=_COLOURS[0], linewidth=1.8, label="held out")
        axes.set(xlabel=horizontal, ylabel="density")
        axes.legend(frameon=False)
    return figure


def curve_chart(
    rows: Sequence[Mapping[str, Any]], stage: str, names: Sequence[str], vertical: str, logarithmic: bool = False
) -> Figure | None:
    """Plots metrics ``names`` of one command over its steps; None if none of them has two points.

    Args:
        rows: of ``metrics.jsonl``.
        stage: the command's name.
        names: the metrics, as in the rows.
        vertical: label of the vertical axis, with its unit.
        logarithmic: vertical axis.
    """
    curves = {
        name: [(row["step"], row[name]) for row in rows if row["stage"] == stage and row.get(name) is not None]
        for name in names
    }
    if all(len(points) < 2 for points in curves.values()):
        return None
    with mpl.rc_context(_STYLE):
        figure, axes = _panel()
        for name, points in curves.items():
            if points:
                marker = "o" if len(points) <= _FEW else None
                axes.plot(
                    *zip(*points, strict=True),
                    label=LABELS.get(name, name),
                    linewidth=1.6,
                    marker=marker,
                    markersize=3,
                )
        if logarithmic:
            axes.set_yscale("log")
        axes.set(xlabel=f"step of mnif {stage}", ylabel=vertical)
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    return figure


Points = Sequence[tuple[float, float, float]]
"""Of a curve: where, how high, and the spread there."""


def sizes_chart(
    curves: Mapping[str, Points],
    horizontal: str,
    vertical: str,
    dashed: Mapping[str, Points] = MappingProxyType({}),
    marked: Mapping[str, tuple[float, float]] = MappingProxyType({}),
) -> Figure:
    """Plots figures against a size, with bars of their spread; far apart, sizes stand on a logarithmic axis.

    Args:
        curves: by what they are called.
        horizontal: label of the axis of sizes.
        vertical: label of the other axis, with its unit.
        dashed: further curves, without bars; in the colour of a curve if their name begins with its.
        marked: points with a ring around them, and a word for each.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel()
        for number, (name, points) in enumerate(curves.items()):
            sizes, heights, spreads = zip(*points, strict=True)
            axes.errorbar(
                sizes,
                heights,
                spreads,
                fmt="o-",
                color=f"C{number}",
                capsize=3,
                linewidth=1.6,
                markersize=4,
                label=name,
            )
        for number, (name, points) in enumerate(dashed.items(), len(curves)):
            sizes, heights, _ = zip(*points, strict=True)
            same = next((f"C{other}" for other, curve in enumerate(curves) if name.startswith(curve)), f"C{number}")
            axes.plot(sizes, heights, "--", color=same, linewidth=1.2, label=name)
        for word, place in marked.items():
            axes.plot(*place, "o", markersize=12, fillstyle="none", color=_INK, linewidth=1)
            axes.annotate(
                word, place, textcoords="offset points", xytext=(-8, 7), ha="right", fontsize="small", color=_INK
            )
        places = [size for points in curves.values() for size, _, _ in points]
        if max(places) >= 4 * min(places):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
        axes.set(xlabel=horizontal, ylabel=vertical)
        axes.grid(alpha=0.3)
        names = axes.get_legend_handles_labels()
        if len(names[1]) > _NAMES_WITHIN:
            figure.legend(*names, loc="outside upper center", ncols=len(names[1]), frameon=False, fontsize="x-small")
        elif len(names[1]) > 1:
            axes.legend(frameon=False, fontsize="small")
    return figure


def steps_chart(distances: Mapping[str, float]) -> Figure | None:
    """Plots how far samples lie from the training latents against denoising steps, as `mnif distill` measured it.

    Args:
        distances: ``student_STEPS`` and ``teacher_STEPS``, with the controls ``held_out`` and ``gaussian``.

    Returns:
        None if no model was measured.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel()
        for who in ("teacher", "student"):
            named = ((re.fullmatch(rf"{who}_(\d+)", name), value) for name, value in distances.items())
            points = sorted((int(match[1]), value) for match, value in named if match)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=who, linewidth=1.6, markersize=4)
        if not axes.lines:
            return None
        for control, label in (("held_out", "held-out latents"), ("gaussian", "Gaussian latents")):
            if control in distances:
                style = ":" if control == "held_out" else "--"
                axes.axhline(distances[control], color="grey", linestyle=style, linewidth=1, label=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda steps, _: f"{steps:g}")
        axes.set(xlabel="denoising steps", ylabel="energy distance from the data")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def removal_chart(shares: Sequence[float], curves: Mapping[str, Sequence[float]], horizontal: str) -> Figure:
    """Plots what is left of quality, in dB, against the share of bases that was taken away.

    Args:
        shares: in percent, above 0.
        curves: PSNR at each share, by the name of the order in which bases were taken.
        horizontal: label of the horizontal axis.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel()
        for name, values in curves.items():
            axes.plot(shares, values, "o-", label=name, linewidth=1.6, markersize=4)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:g}")
        axes.set(xlabel=horizontal, ylabel="PSNR of what is left, dB")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def importance_chart(layers: Mapping[str, Sequence[float]]) -> Figure:
    """Plots each basis's share of all that is lost without bases, in percent, in order, a colour for each layer.

    Args:
        layers: the shares of the bases of each layer, by its name.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _panel()
        order = sorted((-share, name) for name, shares in layers.items() for share in shares)
        for name in layers:
            places = [(place, -share) for place, (share, owner) in enumerate(order, 1) if owner == name]
            axes.plot(*zip(*places, strict=True), "o", markersize=2.5, label=name)
        axes.set(xlabel="rank of the basis", ylabel="share of what is lost, %")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, markerscale=2)
    return figure


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(5.2, 3.2), dpi=120, layout="constrained")
    return figure, figure.add_subplot()


def as_png(figure: Figure) -> bytes:
    """Draws a chart on white."""
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def as_svg(figure: Figure, name: str) -> str:
    """Draws a chart as an SVG element in the ink of the page around it, with its colours ``--series-1`` and so on.

    Args:
        figure: the chart.
        name: begins the element's ids, which must be unique in the page.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>|\s*<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg).replace(_INK, "currentColor")
    for number, colour in enumerate(_COLOURS, 1):
        svg = svg.replace(colour, f"var(--series-{number})")
    opening, _, drawing = svg.partition(">")
    return re.sub(r' (width|height)="[^"]*"', "", opening) + ">" + drawing
