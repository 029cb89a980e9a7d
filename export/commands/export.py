"""`mnif export`: one folder with everything an edge device needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from export.browser import check_onnxruntime_web, write_page
from export.device.bundle import MANIFEST, manifest_digest
from export.device.delta import DATA, DELTA
from export.graphs import Precision, Storage
from latent_prior.settings import INFERENCE_STEPS
from mnif import __version__
from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError
from mnif.utils.files import (
    remove_leftovers,
    sha256_of_file,
    temporary_folder,
    write_json,
)
from mnif.utils.json_files import read_object
from mnif.utils.output_folders import LOCK, check_output_folder, held_folder

if TYPE_CHECKING:
    from export.bundle import Selection
    from export.graphs.encoder import GridEncoder
    from export.graphs.rtx_check import CompileReport
    from export.graphs.specs import GraphVariant
    from latent_prior.pipeline import MNIFPipeline
    from mnif.latents.profile import Profile
    from mnif.models.mnif_model import MNIFModel


@dataclass(kw_only=True)
class GraphsFlags:
    """What is exported, and how exactly."""

    num_inference_steps: list[int] = field(default_factory=lambda: [INFERENCE_STEPS])
    """Denoising steps, one sampler for each number; what is baked is sampled with the last."""
    resolution: list[int] | None = None
    """Pixels per axis of decoder and sampler: one number, or one for each axis; default: the training resolution."""
    precision: list[Precision] = field(default_factory=lambda: ["fp32", "mixed"])
    """Of all graphs but the samplers; mixed multiplies hidden layers in float16."""
    sampler_precision: list[Precision] = field(default_factory=lambda: ["mixed"])
    """Of the samplers, each of which holds the whole denoiser."""
    sampler_storage: Storage = "int8"
    """How samplers store their large matrices; they compute as --sampler_precision says."""
    pad_channels: bool = False
    """Values get four channels, the further ones zero: one kernel less in TensorRT."""


@dataclass(kw_only=True)
class BakedFlags:
    """Instances with graphs of their own."""

    num_baked: int = 4
    """How many instances are baked into graphs of their own."""
    latents: Path | None = None
    """A latent table whose rows are baked; default: samples of the prior."""
    ids: list[str] | None = None
    """Which rows of the latent table are baked; default: the first --num_baked."""


@dataclass(kw_only=True)
class ExtrasFlags:
    """What else a bundle gets."""

    encoder: bool = False
    """Add the model's encoder: an observation to its latent, coefficients, and how far they are from it, for
    device/encode.py, with the model's reference profile where it has one. It holds the whole coefficient map, so it
    may be larger than the rest of the bundle."""
    encoder_storage: Storage | None = None
    """How the encoder stores its large matrices; default: as they are multiplied. int8 makes it a third as large."""
    browser: bool = False
    """Add browser/, a page to be hosted, and its graphs: noise → coefficients, and values of those anywhere."""
    onnxruntime_web: Path | None = None
    """The npm package's folder, to be copied beside the page; default: the page asks a CDN, and checks hashes."""
    triton: bool = False
    """Add a model repository for Triton Inference Server: triton/, with every decoder and sampler."""
    weights: bool = False
    """Add weights.safetensors, the decoder's weights by name, for programs of your own: no graph and no command of the
    device reads it."""
    compile_rtx: Literal["auto", "on", "off"] = "auto"
    """Compile every graph with TensorRT-RTX, which needs no GPU: a compile gate, not a Jetson build. auto: where it is
    installed. Of the baked graphs the first alone is compiled."""


@dataclass(kw_only=True)
class ExportArguments(GraphsFlags, BakedFlags, ExtrasFlags):
    """Write ONNX graphs, weights and the device's own tools; every graph is measured against float64 first."""

    model: Path
    """The model folder, RUN/model, or avatars, which comes along. Without a prior there is no sampler, and rows of
    RUN/latents.safetensors are baked."""
    output_dir: Path
    """The bundle folder; the files of an older bundle there are replaced, all others stay."""
    since: Path | None = None
    """An older bundle: --output_dir gets a delta and no bundle, what changed since, for device/update.py of boards."""
    seed: int = 0
    """Of the baked samples and of the reference inputs."""

    def precisions_for(self, kind: str) -> tuple[Sequence[Precision], Storage | None]:
        """Precisions and storage of a kind of graphs, None for what is multiplied."""
        from export.graphs.specs import KINDS

        chosen = KINDS[kind].precision
        if chosen == "sampler":
            return self.sampler_precision, self.sampler_storage
        storage = self.encoder_storage if chosen == "encoder" else None
        return (["fp32"] if chosen == "fp32" else self.precision), storage


def selection_of(model: MNIFPipeline | MNIFModel, options: ExportArguments) -> Selection:
    """What the flags ask for.

    Raises:
        UserError: a flag is out of range.
    """
    from export.bundle import Selection
    from latent_prior.pipeline import MNIFPipeline
    from mnif.models.mnif_model import MNIFModel

    decoder = model if isinstance(model, MNIFModel) else model.decoder
    counts = [("num_baked", 0, options.num_baked), ("seed", 0, options.seed)]
    counts += [("num_inference_steps", 1, number) for number in options.num_inference_steps]
    counts += [("resolution", 1, number) for number in options.resolution or []]
    for flag, least, value in counts:
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    for flag in ("num_inference_steps", "precision", "sampler_precision", "resolution", "ids"):
        if getattr(options, flag) == []:
            raise UserError(f"--{flag}: give at least one")
    if options.ids is not None and options.latents is None:
        raise UserError("--ids: say --latents too, the table they stand in")
    resolution = options.resolution or decoder.config.resolution
    if not isinstance(resolution, int):
        if len(resolution) not in (1, decoder.config.dimensions):
            given = " ".join(map(str, resolution))
            raise UserError(f"--resolution {given}: one number, or {decoder.config.dimensions}")
        resolution = resolution[0] if len(resolution) == 1 else tuple(resolution)
    if options.browser and not (isinstance(model, MNIFPipeline) and decoder.config.signal == "image"):
        raise UserError("--browser: the page draws new pictures; this model has no prior, or is not of pictures")
    if options.onnxruntime_web is not None and not options.browser:
        raise UserError("--onnxruntime_web: is for the page of --browser; say that too")
    if options.encoder_storage is not None and not options.encoder:
        raise UserError(f"--encoder_storage {options.encoder_storage}: is for the graph of --encoder; say that too")
    check_onnxruntime_web(options.onnxruntime_web)
    return Selection(
        decoder=decoder,
        pipeline=model if isinstance(model, MNIFPipeline) else None,
        resolution=resolution,
        steps=list(dict.fromkeys(options.num_inference_steps)),
        num_baked=options.num_baked,
        seed=options.seed,
        table=options.latents,
        ids=options.ids,
        pad_channels=options.pad_channels,
        browser=options.browser,
    )


def main(arguments: list[str]) -> None:
    """Runs `mnif export`."""
    options = parse_arguments(ExportArguments, arguments, "mnif export")
    check_output_folder(options.output_dir, "export")
    with held_folder(options.output_dir):
        _export(options)


def _export(options: ExportArguments) -> None:
    """Exports, unless that was done before."""
    from export.bundle import load_encoder, load_profile_of_encoder
    from export.delta import open_base
    from mnif.latents.table import data_of_table
    from mnif.models.mnif_model import MNIFModel
    from mnif.utils.model_folders import PROFILE, model_folder_in, sha256_of_model

    _check_output(options)
    if options.since is not None:
        open_base(options.since)
    model = load_model(options.model)
    decoder = model if isinstance(model, MNIFModel) else model.decoder
    encoder = load_encoder(options.model, decoder) if options.encoder else None
    profile = load_profile_of_encoder(options.model, decoder) if options.encoder else None
    if isinstance(model, MNIFModel) and options.latents is None:
        beside = options.model.parent / "latents.safetensors"
        options.latents = beside if beside.is_file() else None
    inputs = {key: str(value) for key, value in asdict(options).items() if key not in ("output_dir", "since")}
    inputs |= {"version": __version__, "model_sha256": sha256_of_model(options.model)}
    if options.latents is not None and options.latents.is_file():
        inputs["latents_sha256"] = sha256_of_file(options.latents)
    if profile is not None:
        inputs["profile_sha256"] = "".join(
            sha256_of_file(path) for path in sorted((model_folder_in(options.model) / PROFILE).iterdir())
        )
    if options.since is None and _holds(options.output_dir, inputs):
        print(f"{options.output_dir}: exported here before from this model with these flags; nothing to do")
        return
    trained_on = data_of_table(options.model.parent / "latents.safetensors", decoder.fingerprint())
    export_bundle(model, options, inputs, trained_on, encoder, profile)


def load_model(folder: Path) -> MNIFPipeline | MNIFModel:
    """Both stages of a model folder, or the decoder alone where there is no prior yet.

    Raises:
        UserError: a stage is damaged, there is no decoder, or the denoiser belongs to another one.
    """
    from latent_prior.pipeline import load_pipeline
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel

    if (folder / "denoiser").is_dir():
        return load_pipeline(folder)
    return load_component(MNIFModel, folder, "decoder")


def _holds(output: Path, inputs: dict[str, str]) -> bool:
    """Whether a bundle of the same inputs lies there, each file as it was written; others may lie there too."""
    from export.bundle import WrittenManifest, is_as_written

    if not (output / MANIFEST).is_file():
        return False
    manifest = read_object(output / MANIFEST, WrittenManifest)
    if manifest.get("inputs") != inputs or manifest.get("digest") != manifest_digest(manifest):
        return False
    return all(is_as_written(output / name, entry) for name, entry in manifest.get("files", {}).items())


def export_bundle(
    model: MNIFPipeline | MNIFModel,
    options: ExportArguments,
    inputs: dict[str, str] | None = None,
    trained_on: str | None = None,
    encoder: GridEncoder | None = None,
    profile: Profile | None = None,
) -> None:
    """Writes a bundle to ``options.output_dir``, whole or not at all; it takes the place of an older one.

    What the older bundle's manifest does not name stays, the plans built there among it.

    Args:
        model: what to export, on the CPU in float32.
        options: the command's flags; ``options.model`` is not read.
        inputs: what the bundle depends on, noted in the manifest.
        trained_on: the data's name, where it is known.
        encoder: the model's, if it is to come too; ``options.encoder`` is not read.
        profile: the model's reference profile, which comes with the encoder.

    Raises:
        UserError: a flag is out of range, the folder holds something else or a file in the way, the scheduler cannot
            be exported, a graph misses its tolerance, or TensorRT-RTX refuses it.
    """
    from export.graphs.rtx_check import rtx_is_installed
    from export.manifest import manifest_of
    from mnif.utils.process import public_name

    selection = replace(selection_of(model, options), encoder=encoder, profile=profile)
    compiles = options.compile_rtx == "on" or (options.compile_rtx == "auto" and rtx_is_installed())
    if options.compile_rtx == "on" and not rtx_is_installed():
        mend = "pip install 'mnif-diffusion[rtx]', or --compile_rtx off"
        raise UserError(f"the compile gate needs TensorRT-RTX, which is not installed; {mend}")
    if options.compile_rtx == "auto" and not compiles:
        print("TensorRT-RTX compile gate skipped: not installed (pip install 'mnif-diffusion[rtx]')")

    if selection.pipeline is None and selection.table is None:
        print("no prior and no latent table: nothing is baked (--latents names a table)")
    if selection.pipeline is not None:
        selection.pipeline.set_progress_bar_config(disable=True)
    with held_folder(options.output_dir):
        _check_output(options)
        manifest = manifest_of(selection, trained_on and public_name(trained_on)) | {"inputs": inputs or {}}
        others = _write_bundle(selection, options, manifest, compiles)
    if options.since is not None:
        return
    megabytes = sum(entry["bytes"] for entry in manifest["files"].values()) / 1e6
    count = len(manifest["graphs"])
    print(f"{options.output_dir}: {count} graphs, {megabytes:.1f} MB; README.md has the commands for a device")
    if others:
        first = ", ".join(others[:3]) + (" …" if len(others) > 3 else "")
        count_of_others = "1 file" if len(others) == 1 else f"{len(others)} files"
        print(f"{options.output_dir}: {count_of_others} of others in it stay as before: {first}")


def _write_bundle(
    selection: Selection, options: ExportArguments, manifest: dict[str, Any], compiles: bool
) -> list[str]:
    """Writes a bundle beside its place, completes its manifest, moves it (or a delta) there; gives others' files."""
    from export.bundle import put_in_place, write_device_files, write_profile, write_weights
    from export.delta import open_base, write_delta
    from export.readme import bundle_readme
    from export.triton import write_model_repository

    output = options.output_dir.resolve()
    with temporary_folder(output) as folder:
        (folder / "onnx").mkdir()
        reference = _write_graphs(selection, options, folder, manifest, compiles)
        np.savez_compressed(folder / "reference.npz", **reference)
        if selection.profile is not None:
            write_profile(folder, selection.profile)
        if options.weights:
            write_weights(folder, selection.decoder)
        write_device_files(folder)
        if options.browser:
            write_page(folder, options.onnxruntime_web)
        if options.triton:
            write_model_repository(folder, manifest["graphs"])
        (folder / "README.md").write_text(bundle_readme(manifest, options.weights))
        manifest["files"] = {
            path.relative_to(folder).as_posix(): {"sha256": sha256_of_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest["digest"] = manifest_digest(manifest)
        write_json(folder / MANIFEST, manifest)
        if options.since is None:
            return put_in_place(folder, output)
        print(write_delta(open_base(options.since), folder, options.output_dir))
        return []


def _write_graphs(
    selection: Selection, options: ExportArguments, folder: Path, manifest: dict[str, Any], compiles: bool
) -> dict[str, Any]:
    """Writes ``onnx/`` and a line for each graph, adds the graphs to the manifest, and returns the references."""
    import onnx

    from export.graph_notes import write_notes
    from export.graphs.precision import PARTS
    from export.graphs.rtx_check import compile_with_rtx
    from export.graphs.specs import make_variants
    from export.manifest import graph_entry

    reference: dict[str, Any] = {}
    unmeasured = 0
    for spec in selection.specs():
        for variant in make_variants(spec, *options.precisions_for(spec.kind)):
            path = folder / "onnx" / f"{variant.name}.onnx"
            manifest["precision"][variant.precision] = PARTS[variant.precision]
            manifest["graphs"][variant.name] = graph_entry(variant)
            write_notes(variant.model, variant.name, manifest)
            onnx.save_model(variant.model, path)
            gated = compiles and (spec.instance is None or spec.name.startswith("baked_0000"))
            report = compile_with_rtx(path, spec.profile) if gated else None
            gate = {"tensorrt_rtx": None if report is None else asdict(report)}
            manifest["measured"][variant.name] = gate | {"max_abs": variant.error}
            if spec.reference is None:
                unmeasured += 1
            else:
                print(_line(variant, report))
        if spec.reference is not None:
            arrays = spec.reference.inputs | spec.reference.outputs
            reference |= {f"{spec.reference.prefix}.{name}": array for name, array in arrays.items()}
    if unmeasured:
        print(f"{unmeasured} further baked graphs: the same nodes with other weights, all of them finite")
    return reference


def _check_output(options: ExportArguments) -> None:
    """Refuses a path that is neither free, nor an empty folder, nor a bundle (or a delta, where that is asked for).

    What a killed export left is cleared.
    """
    output, wanted = options.output_dir, "bundle" if options.since is None else "delta"
    is_ours = check_output_folder(output, "export")
    remove_leftovers(output.resolve().parent, output.resolve().name)
    remove_leftovers(output, MANIFEST)
    there = {path.name for path in output.iterdir()} - {LOCK} if output.exists() else set()
    if there - {DELTA, DATA} if wanted == "delta" else there and not (is_ours and MANIFEST in there):
        raise UserError(f"{output} holds something other than a {wanted}; choose another --output_dir")


def _line(variant: GraphVariant, report: CompileReport | None) -> str:
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
