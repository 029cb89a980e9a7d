"""`mnif export`: one folder with everything an edge device needs."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper
from safetensors.torch import save_file

from export import runtime
from export.cases import GraphCase, graph_cases
from export.engine import CompileReport, compile_with_rtx, rtx_is_installed
from export.nodes import IR_VERSION, OPSET
from export.readme import bundle_readme
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif import __version__
from mnif.arguments import parse_arguments
from mnif.errors import UserError
from mnif.files import folder_written_atomically, read_json, sha256_of_file, sha256_of_folder, write_json
from mnif.runs import command_line


@dataclass(kw_only=True)
class ExportArguments:
    """Write ONNX graphs, weights and a runtime without torch; every graph is compared with PyTorch first."""

    model: Path
    """The model folder, RUN/model."""
    output_dir: Path
    """The bundle folder; an older bundle there is replaced."""
    num_baked: int = 4
    """How many samples are baked into graphs of their own."""
    num_inference_steps: int = 20
    """Denoising steps of the sampler."""
    resolution: int | None = None
    """Pixels per axis of decoder and sampler; default: the training resolution."""
    seed: int = 0
    """Of the baked samples and of the reference inputs."""
    compile_rtx: Literal["auto", "on", "off"] = "auto"
    """Compile every graph with TensorRT-RTX, which needs no GPU: a compile gate, not a Jetson build. auto: where it is
    installed."""


def main(arguments: list[str]) -> None:
    """Runs `mnif export`."""
    options = parse_arguments(ExportArguments, arguments, "mnif export")
    pipeline = load_pipeline(options.model)
    inputs = {key: str(value) for key, value in asdict(options).items() if key != "output_dir"}
    inputs |= {"version": __version__, "model_sha256": sha256_of_folder(options.model)}
    if _holds(options.output_dir, inputs):
        print(f"{options.output_dir}: exported here before from this model with these flags; nothing to do")
        return
    export_bundle(pipeline, options, inputs)


def _holds(output: Path, inputs: dict[str, str]) -> bool:
    """Whether a bundle of the same inputs lies there, each file as it was written."""
    if not (output / "manifest.json").is_file():
        return False
    manifest = read_json(output / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("inputs") != inputs:
        return False
    found = _files(output)
    del found["manifest.json"]
    return found == manifest.get("files")


def export_bundle(pipeline: MNIFPipeline, options: ExportArguments, inputs: dict[str, str] | None = None) -> None:
    """Writes a bundle to ``options.output_dir``, whole or not at all.

    Args:
        pipeline: what to export, on the CPU in float32.
        options: the command's flags; ``options.model`` is not read.
        inputs: what the bundle depends on, noted in the manifest.

    Raises:
        UserError: a flag is out of range, the folder holds something else, the scheduler cannot be exported, a graph
            differs from PyTorch by more than its tolerance, or TensorRT-RTX refuses it.
    """
    for flag, least in (("num_baked", 0), ("num_inference_steps", 1), ("seed", 0)):
        if getattr(options, flag) < least:
            raise UserError(f"--{flag} {getattr(options, flag)}: must be at least {least}")
    if options.resolution is None and not isinstance(pipeline.decoder.config.resolution, int):
        size = " by ".join(map(str, pipeline.decoder.config.resolution))
        raise UserError(f"{options.model}: pictures of {size} pixels; give --resolution, graphs draw square pictures")
    output = options.output_dir.resolve()
    if not _may_be_replaced(output):
        raise UserError(f"{options.output_dir} holds something other than a bundle; choose another --output_dir")
    compiles = options.compile_rtx == "on" or (options.compile_rtx == "auto" and rtx_is_installed())
    if options.compile_rtx == "auto" and not compiles:
        print("TensorRT-RTX compile gate skipped: not installed (pip install 'mnif-diffusion[rtx]')")

    resolution = pipeline.decoder.config.resolution if options.resolution is None else options.resolution
    pipeline.set_progress_bar_config(disable=True)
    with folder_written_atomically(output) as folder:
        (folder / "onnx").mkdir()
        graphs: dict[str, Any] = {}
        measured: dict[str, Any] = {}
        reference: dict[str, Any] = {}
        for case in graph_cases(pipeline, options.num_baked, options.num_inference_steps, resolution, options.seed):
            path = folder / "onnx" / f"{case.name}.onnx"
            parity = _parity_within_tolerance(case)
            onnx.save_model(case.model, path)
            report = compile_with_rtx(path, case.profile) if compiles else None
            graphs[case.name] = _graph_entry(case)
            measured[case.name] = {"parity": parity, "tensorrt_rtx": None if report is None else asdict(report)}
            reference |= {f"{case.name}.input": case.array, f"{case.name}.output": case.expected}
            print(_line(case, parity, report))
        manifest = _manifest(pipeline, options, resolution) | {"graphs": graphs, "measured": measured}
        manifest["inputs"] = inputs or {}
        _write_weights(pipeline, folder / "weights.safetensors")
        np.savez_compressed(folder / "reference.npz", **reference)
        shutil.copyfile(runtime.__file__, folder / "runtime.py")
        (folder / "README.md").write_text(bundle_readme(manifest))
        manifest["files"] = _files(folder)
        manifest["digest"] = runtime.manifest_digest(manifest)
        write_json(folder / "manifest.json", manifest)
    megabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    print(f"{options.output_dir}: {len(graphs)} graphs, {megabytes:.1f} MB; README.md has the commands for a device")


def _may_be_replaced(output: Path) -> bool:
    """Whether the path is free, an empty folder, or a bundle."""
    if not output.exists():
        return True
    if not output.is_dir():
        return False
    manifest = output / "manifest.json"
    return "decoder_fingerprint" in read_json(manifest) if manifest.is_file() else not any(output.iterdir())


def _parity_within_tolerance(case: GraphCase) -> float:
    parity = case.parity()
    if not parity <= case.tolerance:  # NaN is refused too
        raise UserError(
            f"{case.name}: ONNX Runtime differs from PyTorch by {parity:.1e}, more than {case.tolerance:.0e}; nothing "
            "was written; try another --seed or fewer --num_inference_steps, and check that training did not diverge"
        )
    return parity


def _line(case: GraphCase, parity: float, report: CompileReport | None) -> str:
    gate = (
        "TensorRT-RTX compile gate not run"
        if report is None
        else f"TensorRT-RTX {report.version} compile gate passed in {report.seconds:.2f} s, plan "
        f"{report.plan_bytes / 1e6:.1f} MB (not a Jetson build)"
    )
    return (
        f"{case.name}.onnx: {case.model.ByteSize() / 1e6:.2f} MB, ONNX checker passed, "
        f"max |ONNX Runtime - PyTorch| {parity:.1e} (limit {case.tolerance:.0e}), {gate}"
    )


def _graph_entry(case: GraphCase) -> dict[str, Any]:
    profile = asdict(case.profile)
    del profile["input"]
    return {
        "file": f"onnx/{case.name}.onnx",
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "input": _tensor_entry(case.model.graph.input[0]),
        "output": _tensor_entry(case.model.graph.output[0]),
        "profile": profile,
        "tolerance": case.tolerance,
    }


def _tensor_entry(tensor: onnx.ValueInfoProto) -> dict[str, Any]:
    shape = [axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type).name
    return {"name": tensor.name, "type": kind, "shape": shape}


def _manifest(pipeline: MNIFPipeline, options: ExportArguments, resolution: int) -> dict[str, Any]:
    config = pipeline.decoder.config
    return {
        "schema": runtime.SCHEMA,
        "package": {"name": "mnif-diffusion", "version": __version__},
        "decoder_fingerprint": pipeline.decoder.fingerprint(),
        "grid": {
            "dimensions": config.dimensions,
            "channels": config.channels,
            "resolution": resolution,
            "cells": config.cells,
            "overlap": float(config.overlap),
            "pixel_centre": "(r + 1/2) / n",
            "axes": "coordinate k runs along axis k of the values",
        },
        "values": {"range": [-1.0, 1.0], "pixel": "round(clip(value, -1, 1) * 127.5 + 127.5)"},
        "sampling": {
            "latent_dim": config.latent_dim,
            "num_inference_steps": options.num_inference_steps,
            "scheduler": type(pipeline.scheduler).__name__,
            "seed": options.seed,
        },
        "command": command_line(),
    }


def _write_weights(pipeline: MNIFPipeline, path: Path) -> None:
    """Decoder and denoiser as they are, under the names the graphs use."""
    parts = {"decoder": pipeline.decoder, "denoiser": pipeline.denoiser}
    tensors = {
        f"{part}.{name}": tensor.contiguous()
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    save_file(tensors, path, {"decoder_fingerprint": pipeline.decoder.fingerprint()})


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
        for path in paths
    }
