"""The README of a bundle: what lies in it, and the commands that work on a device as they stand."""

from collections.abc import Mapping
from typing import Any

from export.graphs.specs import KINDS
from export.tensorrt_tools import GENERATIONS, polygraphy_commands, trtexec_command
from mnif.signals.registry import signal_class


def bundle_readme(manifest: dict[str, Any], with_weights: bool = False) -> str:
    """Writes Markdown for a manifest (without files and digest), for whoever unpacks the bundle on a board.

    Args:
        manifest: of the bundle.
        with_weights: ``weights.safetensors`` lies in it.
    """
    graphs = manifest["graphs"]
    shown = {name: graph for name, graph in graphs.items() if graph["reference"] is not None}
    compared = {name: graph for name, graph in shown.items() if KINDS[graph["kind"]].served}
    oldest, opting, newest = GENERATIONS
    kinds = [kind for kind in KINDS if any(graph["kind"] == kind for graph in graphs.values())]
    return _TEXT.format(
        version=manifest["package"]["version"],
        rows="\n".join(_row(graph, manifest["measured"][name]) for name, graph in shown.items()),
        further=_further(len(graphs) - len(shown)),
        kinds="\n".join(_kind(kind, manifest) for kind in kinds),
        values=_values(manifest),
        precision=" ".join(_PRECISIONS[name] for name in manifest["precision"]),
        weights=_WEIGHTS if with_weights else "",
        sample=(_SAMPLE if manifest["sampling"] else "") + _encode(manifest),
        loss=_loss(shown, manifest),
        opting=opting.title,
        oldest=oldest.title,
        newest=newest.title,
        commands="\n".join(trtexec_command(name, graph, opting) for name, graph in shown.items()),
        old_commands="\n".join(trtexec_command(name, graph, oldest) for name, graph in shown.items()),
        polygraphy="\n".join(line for graph in compared.values() for line in polygraphy_commands(graph, opting)),
        gate=_gate(manifest),
    )


def _row(graph: Mapping[str, Any], measured: Mapping[str, Any]) -> str:
    sources, results = (
        ", ".join(f"`{tensor['name']} [{', '.join(map(str, tensor['shape']))}]`" for tensor in graph[side])
        for side in ("inputs", "outputs")
    )
    stored = "" if graph["storage"] == "fp32" else f", stored in {graph['storage']}"
    quality = f"{graph['psnr']:.1f} | {measured['max_abs']:.1e}"
    return f"| `{graph['file']}` | {graph['precision']}{stored} | {sources} | {results} | {quality} |"


def _loss(graphs: Mapping[str, Any], manifest: dict[str, Any]) -> str:
    """Says what each graph in fewer bits than float32 costs, in decibels and in steps of a pixel."""
    lines = []
    for name, graph in graphs.items():
        if graph["precision"] == graph["storage"] == "fp32":
            continue
        error = manifest["measured"][name]["max_abs"]
        single = graphs.get(name.removesuffix("_mixed"), graph)
        beside = f" (float32: {single['psnr']:.1f} dB)" if single is not graph else ""
        steps = pixel_steps(graph, manifest, error)
        pixels = "" if steps is None else f", {steps:.2f} of a pixel's 255 steps"
        lines.append(f"- `{name}`: {graph['psnr']:.1f} dB{beside}, no value off by more than {error:.1e}{pixels}")
    return "\n".join(lines) or "- no graph of this bundle: all are float32."


def pixel_steps(graph: Mapping[str, Any], manifest: Mapping[str, Any], error: float) -> float | None:
    """Counts an error of a value in steps of an 8-bit pixel; None for values that do not become pixels."""
    output = graph["outputs"][0]["name"]
    is_pixel = output == "colours" or (output == "values" and manifest["grid"]["dimensions"] == 2)
    return error * 127.5 if is_pixel else None


def _encode(manifest: Mapping[str, Any]) -> str:
    """Tells of device/encode.py, where there is an encoder."""
    if not any(graph["kind"] == "encoder" for graph in manifest["graphs"].values()):
        return ""
    profile = manifest["profile"]
    judged = _UNJUDGED if profile is None else _JUDGED.format(**profile, rate=profile["false_alarm_rate"])
    return _ENCODE.format(judged=judged)


def _further(count: int) -> str:
    if not count:
        return ""
    return f"\n{count} further baked graphs are the same with other weights; `manifest.json` says what each shows.\n"


def _kind(kind: str, manifest: dict[str, Any]) -> str:
    graphs = [graph for graph in manifest["graphs"].values() if graph["kind"] == kind]
    return f"- **{kind}**: {KINDS[kind].described(manifest, graphs)}"


def _values(manifest: dict[str, Any]) -> str:
    channels, stored = manifest["values"]["channels"], manifest["values"]["padded_channels"]
    text = signal_class(manifest["signal"]).values_note
    return text if channels == stored else f"{text} Of {stored} channels the first {channels} count, the others are 0."


def _gate(manifest: dict[str, Any]) -> str:
    reports = [metrics["tensorrt_rtx"] for metrics in manifest["measured"].values() if metrics["tensorrt_rtx"]]
    if not reports:
        return "The compile gate was not run: TensorRT-RTX was absent or switched off at export."
    version, targets = reports[0]["version"], ", ".join(reports[0]["compute_capabilities"])
    return (
        f"At export, TensorRT-RTX {version} compiled {len(reports)} graphs (of the baked ones the first) for compute "
        f"capabilities {targets}, without a GPU. This is a compile gate, not a Jetson build: it shows "
        "that the graphs parse and compile, and says nothing of a board's speed. Its plans would not run on a Jetson "
        "and are not kept; seconds and sizes stand in `manifest.json`."
    )


_PRECISIONS = {
    "fp32": "**fp32** computes in float32; keep TF32 off.",
    "mixed": "**mixed** multiplies hidden layers in float16 between Cast nodes, and keeps the first layer, biases and "
    "sines in float32; TensorRT 10 is told to take types as they are, 11 knows nothing else, and for TensorRT 8 "
    "`device/build.py` sets them layer by layer.",
}

_WEIGHTS = "`weights.safetensors` has the decoder's weights by name.\n"

_SAMPLE = """
    python3 device/sample.py --num 16 --seed 0 --output_dir out
"""

_ENCODE = """
    python3 device/encode.py --data PICTURES --output_dir latents

writes `latents.safetensors` (a latent table, for `mnif decode` too), `coefficients.npy` for the decoder,
`fields.npy` with the parameters of every cell's network (`Field` of `export.device.runtime` evaluates them), and
`scores.json`: how far what they decode to is from what was observed, of each cell and of all. {judged}
"""

_JUDGED = """\
The profile in
`profile.npz` ({instances} held-out instances of {data}) judges whether each instance is of the kind that the model
knows: in, doubtful or out, and why. Of instances like those, {rate:.0%} or fewer are doubtful or out."""

_UNJUDGED = """\
There is no
reference profile in this bundle, so nothing is said of what to trust."""

_TEXT = """\
# mnif bundle

Written by mnif {version}. `manifest.json` has every shape, hash and measured figure.

| graph | precision | inputs | outputs | dB against float64 | largest error |
|---|---|---|---|---|---|
{rows}
{further}
{kinds}

{values}

{precision}
Decibels are peak signal-to-noise ratios on the inputs in `reference.npz`, in the graph's own precision, with the
model's own weights in float64 as the truth; so is the largest error. All graphs are opset 17, one file each, and say
what they are (open one in Netron). `reference.npz` has inputs (float32) and exact outputs (float64).
{weights}
## What fewer bits cost

Half precision and narrow storage are a choice, and this is its price, measured on the inputs in `reference.npz`.
Rounding a picture to 8 bits is an error of 58.9 dB and half a step by itself.

{loss}

`device/sample.py`, `device/bench.py` and `load_bundle` take `fp32` or `mixed` by name.

## On the device

Copy this folder to the board. Its tools need Python 3.8, NumPy, and TensorRT or ONNX Runtime:

    python3 device/build.py
    python3 device/verify.py
    python3 device/bench.py
{sample}
A newer bundle need not be sent whole: `mnif export --since` with a copy of this one writes a delta, and

    python3 device/update.py --delta DELTA

makes the newer one here; `--undo` goes back.

## By hand, with trtexec

Build engines on the board they run on, in this folder; an engine is tied to its GPU and TensorRT version. On JetPack
`trtexec` lies in `/usr/src/tensorrt/bin`. A flag that a version does not know ends it, so take your version's lines.

**{opting}**; also {newest}, where `--stronglyTyped` is always on and may be left out:

```sh
{commands}
```

**{oldest}**, where `--stronglyTyped` is unknown and mixed graphs are built by our own tool:

```sh
{old_commands}
```

## By hand, with Polygraphy

`pip install polygraphy` on the board: what a graph is made of, and TensorRT beside ONNX Runtime on random inputs. With
TensorRT 8 leave out `--strongly-typed` (of mixed graphs it then chooses the types itself: use `device/verify.py`).

```sh
{polygraphy}
```

{gate}
"""
