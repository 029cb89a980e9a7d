"""`mnif export`: one folder with everything an edge device needs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.contents.description import graph_entry, manifest_of
from export.contents.device import write_device_files
from export.contents.readme import bundle_readme
from export.contents.triton import write_model_repository
from export.export_arguments import ExportArguments, selection_of
from export.graphs.gate import CompileReport, compile_with_rtx, rtx_is_installed
from export.graphs.precision import PARTS
from export.graphs.variants import Variant, variants
from export.manifest import manifest_digest
from export.replacement import MANIFEST, is_as_written, put_in_place
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif import __version__
from mnif.arguments import parse_arguments
from mnif.errors import UserError
from mnif.files import read_json, remove_leftovers, sha256_of_file, sha256_of_folder, temporary_folder, write_json
from mnif.model_folder import load_component
from mnif.modeling import MNIFModel
from mnif.output_folders import check_output_folder
from mnif.tensor_files import save_tensors


def main(arguments: list[str]) -> None:
    """Runs `mnif export`."""
    options = parse_arguments(ExportArguments, arguments, "mnif export")
    _check_output(options.output_dir)
    model = load_model(options.model)
    if isinstance(model, MNIFModel) and options.latents is None:
        beside = options.model.parent / "latents.safetensors"
        options.latents = beside if beside.is_file() else None
    inputs = {key: str(value) for key, value in asdict(options).items() if key != "output_dir"}
    inputs |= {"version": __version__, "model_sha256": sha256_of_folder(options.model)}
    if options.latents is not None and options.latents.is_file():
        inputs["latents_sha256"] = sha256_of_file(options.latents)
    if _holds(options.output_dir, inputs):
        print(f"{options.output_dir}: exported here before from this model with these flags; nothing to do")
        return
    export_bundle(model, options, inputs)


def load_model(folder: Path) -> MNIFPipeline | MNIFModel:
    """Both stages of a model folder, or the decoder alone where there is no prior yet.

    Raises:
        UserError: a stage is damaged, there is no decoder, or the denoiser belongs to another one.
    """
    if (folder / "denoiser").is_dir():
        return load_pipeline(folder)
    return load_component(MNIFModel, folder, "decoder")


def _holds(output: Path, inputs: dict[str, str]) -> bool:
    """Whether a bundle of the same inputs lies there, each file as it was written; others may lie there too."""
    if not (output / MANIFEST).is_file():
        return False
    manifest = read_json(output / MANIFEST)
    if manifest.get("inputs") != inputs or manifest.get("digest") != manifest_digest(manifest):
        return False
    return all(is_as_written(output / name, entry) for name, entry in manifest["files"].items())


def export_bundle(
    model: MNIFPipeline | MNIFModel, options: ExportArguments, inputs: dict[str, str] | None = None
) -> None:
    """Writes a bundle to ``options.output_dir``, whole or not at all; it takes the place of an older one.

    What the older bundle's manifest does not name stays, the plans built there among it.

    Args:
        model: what to export, on the CPU in float32.
        options: the command's flags; ``options.model`` is not read.
        inputs: what the bundle depends on, noted in the manifest.

    Raises:
        UserError: a flag is out of range, the folder holds something else or a file in the way, the scheduler cannot
            be exported, a graph misses its tolerance, or TensorRT-RTX refuses it.
    """
    selection = selection_of(model, options)
    _check_output(options.output_dir)
    output = options.output_dir.resolve()
    compiles = options.compile_rtx == "on" or (options.compile_rtx == "auto" and rtx_is_installed())
    if options.compile_rtx == "auto" and not compiles:
        print("TensorRT-RTX compile gate skipped: not installed (pip install 'mnif-diffusion[rtx]')")

    if selection.pipeline is None and selection.table is None:
        print("no prior and no latent table: nothing is baked (--latents names a table)")
    if selection.pipeline is not None:
        selection.pipeline.set_progress_bar_config(disable=True)
    with temporary_folder(output) as folder:
        (folder / "onnx").mkdir()
        manifest = manifest_of(selection) | {"inputs": inputs or {}}
        reference: dict[str, Any] = {}
        unmeasured = 0
        for case in selection.cases():
            for variant in variants(case, *options.forms(case.kind)):
                path = folder / "onnx" / f"{variant.name}.onnx"
                onnx.save_model(variant.model, path)
                gated = compiles and (case.instance is None or case.name.startswith("baked_0000"))
                report = compile_with_rtx(path, case.profile) if gated else None
                manifest["precision"][variant.precision] = PARTS[variant.precision]
                manifest["graphs"][variant.name] = graph_entry(variant)
                manifest["measured"][variant.name] = {"tensorrt_rtx": None if report is None else asdict(report)}
                if case.reference is None:
                    unmeasured += 1
                else:
                    print(_line(variant, report))
            if case.reference is not None:
                arrays = case.reference.inputs | case.reference.outputs
                reference |= {f"{case.reference.prefix}.{name}": array for name, array in arrays.items()}
        if unmeasured:
            print(f"{unmeasured} further baked graphs: the same nodes with other weights, all of them finite")
        np.savez_compressed(folder / "reference.npz", **reference)
        _write_weights(selection.decoder, folder / "weights.safetensors")
        write_device_files(folder)
        if options.triton:
            write_model_repository(folder, manifest["graphs"])
        (folder / "README.md").write_text(bundle_readme(manifest))
        manifest["files"] = {
            path.relative_to(folder).as_posix(): {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json(folder / MANIFEST, manifest)
        others = put_in_place(folder, output)
    megabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    count = len(manifest["graphs"])
    print(f"{options.output_dir}: {count} graphs, {megabytes:.1f} MB; README.md has the commands for a device")
    if others:
        first = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        print(f"{options.output_dir}: {len(others)} files that are not the bundle's stay as they are: {first}")


def _check_output(output: Path) -> None:
    """Refuses a path that is neither free, nor an empty folder, nor a bundle; clears what a killed export left."""
    is_bundle = check_output_folder(output, "export")
    remove_leftovers(output.resolve().parent, output.resolve().name)
    remove_leftovers(output, MANIFEST)
    if not is_bundle and output.exists() and any(output.iterdir()):
        raise UserError(f"{output} holds something other than a bundle; choose another --output_dir")


def _line(variant: Variant, report: CompileReport | None) -> str:
    gate = (
        "TensorRT-RTX compile gate not run"
        if report is None
        else f"TensorRT-RTX {report.version} compile gate passed in {report.seconds:.2f} s, plan "
        f"{report.plan_bytes / 1e6:.1f} MB (not a Jetson build)"
    )
    return (
        f"{variant.name}.onnx: {variant.model.ByteSize() / 1e6:.2f} MB, ONNX checker passed, against float64 "
        f"{variant.psnr:.1f} dB, max |difference| {variant.error:.1e}, {gate}"
    )


def _write_weights(decoder: MNIFModel, path: Path) -> None:
    """The decoder, its large matrices in float16 but for the first layer's; the denoiser stands in the samplers."""
    large = {f"bases.{mixed}" for mixed, layer in enumerate(decoder.mixed_layers) if layer > 0}
    large.add("coefficient_map.weight")
    tensors = {
        f"decoder.{name}": (tensor.half() if name in large else tensor).contiguous()
        for name, tensor in decoder.state_dict().items()
    }
    save_tensors(tensors, path, {"decoder_fingerprint": decoder.fingerprint()})
