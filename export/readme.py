"""The README of a bundle: what lies in it, and the commands that work on a device as they stand."""

from collections.abc import Mapping
from typing import Any

from export.graphs.specs import KINDS
from mnif.signals.registry import signal_class


def bundle_readme(manifest: dict[str, Any], with_weights: bool = False) -> str:
    """Writes Markdown for a manifest (without files and digest), for whoever unpacks the bundle on a board.

    Args:
        manifest: of the bundle.
        with_weights: ``weights.safetensors`` lies in it.
    """
    graphs = manifest["graphs"]
    shown = {name: graph for name, graph in graphs.items() if graph["reference"] is not None}
    kinds = [kind for kind in KINDS if any(graph["kind"] == kind for graph in graphs.values())]
    return _TEXT.format(
        version=manifest["package"]["version"],
        rows="\n".join(_row(graph) for graph in shown.values()),
        further=_further(len(graphs) - len(shown)),
        kinds="\n".join(_kind(kind, manifest) for kind in kinds),
        values=_values(manifest),
        precision=" ".join(_PRECISIONS[name] for name in manifest["precision"]),
        weights=_WEIGHTS if with_weights else "",
        sample=_SAMPLE if manifest["sampling"] else "",
        commands="\n".join(trtexec_command(name, graph) for name, graph in shown.items()),
        gate=_gate(manifest),
    )


def trtexec_command(name: str, graph: Mapping[str, Any]) -> str:
    """Writes the line that builds and times one graph's engine with TensorRT, to be run in the bundle folder."""
    shapes = [
        f"--{flag}Shapes={','.join(f'{source}:{_by(sizes[key])}' for source, sizes in graph['profile'].items())}"
        for flag, key in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum"))
    ]
    typed = ["--stronglyTyped"] if graph["half"] else []
    return " ".join(["trtexec", f"--onnx={graph['file']}", f"--saveEngine={name}.engine", *shapes, "--noTF32", *typed])


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _row(graph: Mapping[str, Any]) -> str:
    sources, results = (
        ", ".join(f"`{tensor['name']} [{', '.join(map(str, tensor['shape']))}]`" for tensor in graph[side])
        for side in ("inputs", "outputs")
    )
    stored = "" if graph["storage"] == "fp32" else f", stored in {graph['storage']}"
    return f"| `{graph['file']}` | {graph['precision']}{stored} | {sources} | {results} | {graph['psnr']:.1f} |"


def _further(count: int) -> str:
    if not count:
        return ""
    return f"\n{count} further baked graphs are the same with other weights; `manifest.json` says what each shows.\n"


def _kind(kind: str, manifest: dict[str, Any]) -> str:
    sampling, grid = manifest["sampling"], manifest["grid"]
    return f"- **{kind}**: " + KINDS[kind].description.format(
        steps=" or ".join(map(str, sampling["num_inference_steps"])) if sampling else "",
        scheduler=sampling["scheduler"] if sampling else "",
        end="coefficients" if manifest["radiance"] else "values on the grid",
        grid=" × ".join(map(str, grid["resolution"])),
        cells=grid["cells"] ** grid["dimensions"],
    )


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
    "sines in float32; TensorRT 10 and later is to take types as they are (`--stronglyTyped`), for TensorRT 8 "
    "`device/build.py` sets them layer by layer.",
}

_WEIGHTS = "`weights.safetensors` has the decoder's weights by name.\n"

_SAMPLE = """
    python3 device/sample.py --num 16 --seed 0 --output_dir out
"""

_TEXT = """\
# mnif bundle

Written by mnif {version}. `manifest.json` has every shape, hash and measured figure.

| graph | precision | inputs | outputs | dB against float64 |
|---|---|---|---|---|
{rows}
{further}
{kinds}

{values}

{precision}
Decibels are peak signal-to-noise ratios on the inputs in `reference.npz`, in the graph's own precision, with the
model's own weights in float64 as the truth. All graphs are opset 17, one file each. `reference.npz` has inputs
(float32) and exact outputs (float64).
{weights}
## On the device

Copy this folder to the board. Its tools need Python 3.8, NumPy, and TensorRT or ONNX Runtime:

    python3 device/build.py
    python3 device/verify.py
    python3 device/bench.py
{sample}
## By hand, with trtexec

Build engines on the board they run on, in this folder; an engine is tied to its GPU and TensorRT version. On JetPack
`trtexec` lies in `/usr/src/tensorrt/bin`.

```sh
{commands}
```

{gate}
"""
