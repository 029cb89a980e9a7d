"""What `mnif pilot` found, as people read it: Markdown, and a page with curves, from what ``pilot.json`` holds."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from evals.charts import Points, sizes_chart
from evals.report.provenance import provenance
from evals.report.templates import as_svgs, rendered
from mnif.comparison.summary import markdown_table
from mnif.latents.pca import pca_warnings
from mnif.utils.errors import markdown_code, printable

_SHORT = {
    "whole": "whole",
    "missing": "half missing",
    "noise": "noise 0.2",
    "shift": "shifted",
    "few": "few values",
}

_CAPTIONS = {
    "bases": "Held-out instances, refined, with what seeds differ by; dashed: training instances, and PCA of as many "
    "numbers. A ring marks the knee.",
    "multiply_adds": "Held-out instances against the multiplications of one instance, from its latent on.",
    "bytes": "Held-out instances against the bytes that a bundle's sampler holds for the decoder.",
    "robustness": "Latents found in spoilt held-out instances, against the clean original.",
    "samples": "Samples of a short prior against held-out instances; dashed: training instances in their place.",
}

Settings = Sequence[Mapping[str, Any]]


def pilot_text(pilot: Mapping[str, Any]) -> str:
    """Writes ``pilot.md``: what is recommended, why, and tables of quality and cost."""
    lines = [f"# What size is worth on {printable(pilot['data'])}", "", markdown_code(pilot["command"]), ""]
    lines += [_introduction(pilot), ""]
    for each in pilot["recommendations"]:
        lines += [f"- **{each['name']}**: {_setting(each)}, {each['reason']}.", ""]
        lines += [f"  {markdown_code(each['command'])}", ""]
    for line in [*_remarks(pilot), pilot["knee_rule"]]:
        lines += [line, ""]
    lines += [*markdown_table(quality_rows(pilot)), "", *_notes(pilot), ""]
    lines += markdown_table(cost_rows(pilot))
    return "\n".join(lines) + "\n"


def pilot_page(pilot: Mapping[str, Any]) -> str:
    """Writes ``pilot.html``: the same on one page that needs nothing else, with curves."""
    return rendered(
        "pilot.html.jinja",
        pilot=pilot,
        introduction=_introduction(pilot),
        recommendations=[
            dict(each) | {"setting": _setting(each), "words": each["command"].split(" --")}
            for each in pilot["recommendations"]
        ],
        figures=[_figure(pilot, each) for each in pilot["recommendations"]],
        remarks=_remarks(pilot),
        charts=as_svgs(charts_of(pilot)),
        captions=_CAPTIONS,
        tables={"Quality": quality_rows(pilot), "Cost": cost_rows(pilot)},
        notes=_notes(pilot),
        provenance=provenance(),
    )


def charts_of(pilot: Mapping[str, Any]) -> dict[str, Figure]:
    """Plots quality against M, cost and bytes, robustness against M, and samples where there are some."""
    quality, label = pilot["quality"], _name_of(pilot["quality"])
    train = quality.replace("heldout", "train")
    curves = _curves(pilot)

    def against(cost: str, scale: float = 1.0) -> dict[str, Points]:
        return {name: _points(curve, cost, quality, scale) for name, curve in curves.items()}

    training = {
        f"{name}, training" if len(curves) > 1 else "training": _points(curve, "num_bases", train)
        for name, curve in curves.items()
    }
    controls = {
        f"PCA of {components} numbers": _points(settings, "num_bases", _pca(quality))
        for components, settings in _by_latent_dim(pilot["settings"]).items()
        if all(_pca(quality) in each["means"] for each in settings)
    }
    knees = {name: _knee_of(pilot, curve) for name, curve in curves.items()}
    marked = {f"knee, M = {place[0]:g}": place for place in knees.values() if place is not None}
    charts = {
        "bases": sizes_chart(against("num_bases"), "bases M", label, training | controls, marked),
        "multiply_adds": sizes_chart(
            against("decode_multiply_adds", 1e-6), f"million multiply-adds a {pilot['unit']}", label
        ),
        "bytes": sizes_chart(against("shipped_bytes", 1e-3), "kB that ship", label),
    }
    (first, *_) = curves.values()
    found = {_SHORT[name]: _points(first, "num_bases", f"psnr_heldout_{name}") for name in pilot["conditions"]}
    charts["robustness"] = sizes_chart(found, "bases M", "PSNR of probes, dB")
    if pilot["prior_steps"] and all("samples_distance" in each["means"] for each in pilot["settings"]):
        samples = {
            name if len(curves) > 1 else "samples": _points(curve, "num_bases", "samples_distance")
            for name, curve in curves.items()
        }
        floor = {"training instances": _points(first, "num_bases", "samples_distance_floor")}
        charts["samples"] = sizes_chart(samples, "bases M", "energy distance", floor)
    return charts


def quality_rows(pilot: Mapping[str, Any]) -> list[list[str]]:
    """Lays out a table of quality, a row for each setting and its head first."""
    first = pilot["settings"][0]["means"]
    qualities = [name for name in ("psnr", "iou") if f"{name}_heldout" in first]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {}
    for name in qualities:
        shown = _name_of(name).removesuffix(", dB")
        columns[f"{shown} train"] = _cell(f"{name}_train")
        columns[f"{shown} held-out"] = _cell(f"{name}_heldout")
        columns[f"{shown} of PCA, held-out"] = _cell(f"{name}_pca_heldout", spread=False)
    columns |= {f"probes: {_SHORT[name]}": _cell(f"psnr_heldout_{name}") for name in pilot["conditions"]}
    if "samples_distance" in first:
        columns["samples' distance"] = _cell("samples_distance")
    return _rows(pilot["settings"], columns)


def cost_rows(pilot: Mapping[str, Any]) -> list[list[str]]:
    """Lays out a table of costs, a row for each setting and its head first."""
    unit = pilot["unit"]
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "steps": _cell("train_steps", "{:,.0f}", spread=False),
        "training s": _cell("train_seconds", "{:.1f}", spread=False),
        f"{unit}s/s": _cell("images_per_second", "{:,.0f}", spread=False),
        f"ms per new {unit}, found": _cell("seconds_per_instance_finder_batch_1", "{:.3g}", 1e3, spread=False),
        "refined": _cell("seconds_per_instance_refined_batch_1", "{:.3g}", 1e3, spread=False),
        f"ms to decode a {unit}": _cell("decode_milliseconds", "{:.3g}", spread=False),
        "multiply-adds, million": _cell("decode_multiply_adds", "{:,.2f}", 1e-6, spread=False),
        "baked, kB": _cell("field_bytes", "{:,.1f}", 1e-3, spread=False),
        "ships, kB": _cell("shipped_bytes", "{:,.0f}", 1e-3, spread=False),
        "decoder parameters": _cell("decoder_parameters", "{:,.0f}", spread=False),
    }
    return _rows(pilot["settings"], columns)


def _rows(settings: Settings, columns: Mapping[str, Callable[[Mapping[str, Any]], str]]) -> list[list[str]]:
    rows = [[_setting(each), *(column(each) for column in columns.values())] for each in settings]
    return [["setting", *columns], *rows]


def _cell(name: str, form: str = "", scale: float = 1.0, spread: bool = True) -> Callable[[Mapping[str, Any]], str]:
    """Makes what writes a figure of a setting, with the spread over seeds behind it if that is asked for."""
    form = form or ("{:.2f}" if name.startswith("psnr") else "{:.3f}")

    def write(setting: Mapping[str, Any]) -> str:
        if name not in setting["means"]:
            return "–"
        mean = form.format(scale * setting["means"][name])
        return f"{mean} ± {form.format(scale * setting['spreads'][name])}" if spread else mean

    return write


def _introduction(pilot: Mapping[str, Any]) -> str:
    count, machine, unit = pilot["instances"], pilot["machine"], pilot["unit"]
    if pilot["train_seconds"]:
        budget = f"{pilot['train_seconds']:g} seconds of optimizer steps each"
    else:
        budget = f"{pilot['runs'][0]['train_steps']:,} steps each, so larger ones had more seconds"
    total = sum(run["train_seconds"] for run in pilot["runs"])
    threads = "one thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    return (
        f"{len(pilot['runs'])} runs of {pilot['seeds']} seeds, {budget}, {total:,.0f} seconds together, on "
        f"{threads} of {machine['device']}: {count['train']:,} {unit}s to learn from, "
        f"{count['heldout']:,} held out."
    )


def _remarks(pilot: Mapping[str, Any]) -> list[str]:
    """Says what a reader of the recommendations must know besides."""
    quality, settings, lines = pilot["quality"], pilot["settings"], []
    for cells, place in pilot["knees"].items():
        where = "there is none" if place is None else f"M = {place}"
        lines.append(f"The knee with {cells} cells along each axis: {where}.")
    *_, best = pilot["recommendations"]
    best_setting = _setting_of(pilot, best)
    largest = max(each["num_bases"] for each in settings)
    if best["num_bases"] == largest:
        lines.append(f"The best is the largest that was tried, M = {largest}: more may be better still.")
    lines.append(
        "What is good enough here was so in longer runs where that was measured; in some small M caught up, in others "
        "large M went ahead, so try the neighbours too where it matters."
    )
    control = best_setting["means"].get(_pca(quality))
    if control is not None and best_setting["means"][quality] < control:
        lines.append("The best is still below PCA of as many numbers: these runs are too short to tell quality by.")
    return lines


def _notes(pilot: Mapping[str, Any]) -> list[str]:
    """Explains the tables."""
    conditions = ", or ".join(pilot["conditions"].values())
    notes = [
        "Means over seeds ± their standard deviation. *held-out* is refined by Adam on the latent alone. *probes*: "
        f"PSNR in dB against the clean original of {pilot['instances']['probes']:,} held-out {pilot['unit']}s, of "
        f"refined latents found in {conditions}.",
        "*ships*: bytes that a bundle's sampler holds for the decoder: its graph in mixed precision, and the map from "
        "latents to coefficients in int8. *baked*: the fields of one instance in float32. Milliseconds are of this "
        "machine, one at a time, in PyTorch.",
    ]
    for pca in pilot["controls"]["pca"]:
        notes += [f"{line}." for line in pca_warnings(pca["components"], pilot["instances"]["train"])]
    return notes


def _curves(pilot: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of each number of cells, by what a chart calls them."""
    several = sorted({each["cells"] for each in pilot["settings"]})
    return {
        f"{cells} cells" if len(several) > 1 else "held out": [
            each for each in pilot["settings"] if each["cells"] == cells
        ]
        for cells in several
    }


def _by_latent_dim(settings: Settings) -> dict[int, Settings]:
    """The settings whose latents have one and the same number of numbers, and so one PCA; of each M the first."""
    sizes: dict[int, dict[int, Mapping[str, Any]]] = {}
    for each in settings:
        sizes.setdefault(int(each["means"]["latent_dim"]), {}).setdefault(each["num_bases"], each)
    return {components: list(of_each_m.values()) for components, of_each_m in sizes.items()}


def _points(settings: Settings, horizontal: str, vertical: str, scale: float = 1.0) -> Points:
    """Points of a curve over the settings that have its figure: size, scaled, mean, spread."""
    return [
        (
            each["num_bases"] if horizontal == "num_bases" else scale * each["means"][horizontal],
            each["means"][vertical],
            each["spreads"][vertical],
        )
        for each in settings
        if vertical in each["means"]
    ]


def _knee_of(pilot: Mapping[str, Any], curve: Settings) -> tuple[float, float] | None:
    size = pilot["knees"][str(curve[0]["cells"])]
    return next(
        ((each["num_bases"], each["means"][pilot["quality"]]) for each in curve if each["num_bases"] == size), None
    )


def _setting_of(pilot: Mapping[str, Any], recommendation: Mapping[str, Any]) -> Mapping[str, Any]:
    wanted = recommendation["num_bases"], recommendation["cells"]
    return next(each for each in pilot["settings"] if (each["num_bases"], each["cells"]) == wanted)


def _figure(pilot: Mapping[str, Any], recommendation: Mapping[str, Any]) -> str:
    setting, quality = _setting_of(pilot, recommendation), pilot["quality"]
    unit = " dB" if quality.startswith("psnr") else " IoU"
    return f"{_cell(quality)(setting)}{unit}, {setting['means']['shipped_bytes'] / 1e3:,.0f} kB"


def _setting(setting: Mapping[str, Any]) -> str:
    return f"M = {setting['num_bases']}, {setting['cells']} cells"


def _name_of(quality: str) -> str:
    return "PSNR, dB" if quality.startswith("psnr") else "IoU"


def _pca(quality: str) -> str:
    return quality.replace("_heldout", "_pca_heldout")
