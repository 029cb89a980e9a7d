"""The README of a bundle: what lies in it, and the commands that work on a device as they stand."""

from typing import Any


def bundle_readme(manifest: dict[str, Any]) -> str:
    """Markdown for a manifest (without its digest), to be read by whoever unpacks the bundle on a board."""
    grid, sampling, graphs = manifest["grid"], manifest["sampling"], manifest["graphs"]
    rows = [
        f"| `{graph['file']}` | `{_tensor(graph['input'])}` | `{_tensor(graph['output'])}` | "
        f"{manifest['measured'][name]['parity']:.1e} |"
        for name, graph in graphs.items()
    ]
    return _TEXT.format(
        version=manifest["package"]["version"],
        rows="\n".join(rows),
        steps=sampling["num_inference_steps"],
        scheduler=sampling["scheduler"],
        resolution=grid["resolution"],
        seed=sampling["seed"],
        cells=grid["cells"] ** grid["dimensions"],
        commands="\n".join(trtexec_command(name, graph) for name, graph in graphs.items()),
        gate=_gate(manifest),
    )


def trtexec_command(name: str, graph: dict[str, Any]) -> str:
    """The line that builds and times one graph's engine with TensorRT, to be run in the bundle folder."""
    profile = graph["profile"]
    shapes = [
        f"--{flag}Shapes={graph['input']['name']}:{'x'.join(map(str, profile[key]))}"
        for flag, key in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum"))
    ]
    return " ".join(["trtexec", f"--onnx={graph['file']}", f"--saveEngine={name}.engine", *shapes, "--noTF32"])


def _tensor(entry: dict[str, Any]) -> str:
    return f"{entry['name']} [{', '.join(map(str, entry['shape']))}]"


def _gate(manifest: dict[str, Any]) -> str:
    reports = [figures["tensorrt_rtx"] for figures in manifest["measured"].values() if figures["tensorrt_rtx"]]
    if not reports:
        return "The compile gate was not run: TensorRT-RTX was absent or switched off at export."
    targets = ", ".join(reports[0]["compute_capabilities"])
    return (
        f"At export, TensorRT-RTX {reports[0]['version']} compiled every graph for {targets} without a GPU. This is a "
        "compile gate, not a Jetson build: it shows that the graphs parse and compile, and says nothing of a board's "
        "speed. Its plans would not run on a Jetson and are not kept; seconds and sizes stand in `manifest.json`."
    )


_TEXT = """\
# mnif bundle

Written by mnif {version}. `manifest.json` has every shape, hash and measured figure.

| graph | input | output | max abs(ONNX Runtime - PyTorch) |
|---|---|---|---|
{rows}

- **sampler**: standard normal noise to values, {steps} steps of {scheduler} unrolled, {resolution} pixels per axis.
- **decoder**: mixture coefficients to values, {resolution} pixels per axis.
- **baked_NNNN**: one picture (sample NNNN of seed {seed}) as {cells} coordinate network(s), one per cell, at any
  resolution. Each cell is asked at its own coordinates, [-1, 1] across the cell; `runtime.py` lays out the points
  and blends neighbouring cells.

Values lie in about [-1, 1]; a pixel is `round(clip(value, -1, 1) * 127.5 + 127.5)`. Coordinate 0 runs down the rows,
coordinate 1 along the columns; the centre of pixel r of n lies at (r + 1/2) / n. All graphs are float32, opset 17,
one file each. `weights.safetensors` has the model's weights by name, `reference.npz` an input and PyTorch's output
for every graph (`sampler.input`, `sampler.output`, ...).

## Pictures on any CPU

Needs `numpy` and `onnxruntime`, nothing else:

    python runtime.py --num_samples 16 --seed 0 --output_dir out

## Engines on a Jetson

Build them on the board they run on, in this folder; an engine is tied to its GPU and TensorRT version. On JetPack
`trtexec` lies in `/usr/src/tensorrt/bin`.

```sh
{commands}
```

{gate}
"""
