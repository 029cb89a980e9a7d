"""A bundle: which graphs and instances it holds, the part of it that runs on a device, and how it is put in place.

Its ``device/`` holds one small file per command (``python3 device/build.py``) and under ``device/export/`` the package
they need, byte for byte :mod:`export.device`.
"""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from export.device.bundle import ENGINES, MANIFEST, UNFINISHED
from export.device.gate import PROFILE
from export.graphs.denoisers import ExportedDenoiser, for_decoder
from export.graphs.encoder import GridEncoder, encoder_spec
from export.graphs.fields import Resolution, baked_specs, decoder_spec, widen_channels
from export.graphs.radiance import baked_radiance_specs, radiance_specs
from export.graphs.sampler import browser_specs, prior_spec, sampler_spec
from export.graphs.specs import GraphSpec
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise, sample_latents
from mnif.latents.inference import load_latent_init
from mnif.latents.profile import Profile, load_profile
from mnif.latents.table import LatentTable
from mnif.models.encoders import PatchEncoder, TokenEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.files import flush_to_disk, save_tensors, sha256_of_file, write_json
from mnif.utils.json_files import read_object
from mnif.utils.model_folders import PROFILE as MODEL_PROFILE
from mnif.utils.model_folders import model_folder_in
from mnif.utils.output_folders import LOCK


@dataclass(frozen=True)
class ExportedInstances:
    """Latents, and what the manifest says of each that is baked.

    Attributes:
        latents: [n or more, D]; those after the first n are for references alone.
        labels: n times {"seed", "sample"}, or {"id"}.
    """

    latents: Tensor
    labels: list[dict[str, Any]]


def sample_instances(
    pipeline: MNIFPipeline, count: int, num_inference_steps: int, seed: int, least: int
) -> ExportedInstances:
    """Draws samples 0 to ``count`` - 1 of ``seed`` as `mnif sample` does, and latents of ``least`` samples."""
    latents = sample_latents(pipeline, seed, range(max(count, least)), num_inference_steps)
    return ExportedInstances(latents, [{"seed": seed, "sample": index} for index in range(count)])


def instances_of_table(
    decoder: MNIFModel, path: Path, count: int, ids: Sequence[str] | None, least: int
) -> ExportedInstances:
    """Takes rows of a latent table, those of ``ids`` or the first ``count``, and latents of ``least`` rows if it can.

    Raises:
        UserError: no such table or id, or the table belongs to another decoder.
    """
    table = LatentTable.load_for(decoder, path)
    rows = list(range(min(count, len(table.ids)))) if ids is None else table.rows_of(ids, path)
    further = [row for row in range(len(table.ids)) if row not in set(rows)][: max(least - len(rows), 0)]
    return ExportedInstances(table.latents[rows + further], [{"id": table.ids[row]} for row in rows])


def reference_latents(decoder: MNIFModel, count: int, seed: int) -> Tensor:
    """Draws latents [count, D] for the reference of a decoder with neither prior nor latent table."""
    return torch.from_numpy(initial_noise(seed, range(count), decoder.config.latent_dim))


_REFERENCES = 3  # latents that make the decoder's reference


@dataclass(frozen=True)
class Selection:
    """What is exported of a model.

    Attributes:
        decoder: stage one.
        pipeline: both stages; None for a model without a prior.
        resolution: pixels per axis of decoder and sampler.
        steps: for each sampler its number of denoising steps; what is baked is sampled with the last.
        num_baked: how many instances are baked.
        seed: of the samples and of the references.
        table: a latent table whose rows are baked; None bakes samples of the prior.
        ids: which of its rows.
        pad_channels: values get four channels.
        browser: the graphs of the page come too; they need a pipeline.
        encoder: the model's, if it is to come too.
        profile: the model's reference profile, for what the encoder finds.
    """

    decoder: MNIFModel
    pipeline: MNIFPipeline | None
    resolution: Resolution
    steps: Sequence[int]
    num_baked: int
    seed: int
    table: Path | None = None
    ids: Sequence[str] | None = None
    pad_channels: bool = False
    browser: bool = False
    encoder: GridEncoder | None = None
    profile: Profile | None = None

    def specs(self) -> Iterator[GraphSpec]:
        """Yields decoder, encoder, samplers, what radiance fields have besides, and the baked instances.

        Raises:
            UserError: the latent table does not fit, the scheduler cannot be exported, or float32 is not enough.
        """
        decoder = widen_channels(self.decoder) if self.pad_channels else self.decoder
        signal, instances = signal_of_model(decoder), self._instances()
        shown = instances.latents[:_REFERENCES]
        yield decoder_spec(decoder, shown, self.resolution)
        if self.encoder is not None:
            patches = None if self.profile is None else self.profile.record.patches
            yield encoder_spec(self.encoder, self.decoder, shown, self.seed, patches)
        if self.pipeline is not None:
            resolution = None if isinstance(signal, RadianceField) else self.resolution
            for count in self.steps:
                yield sampler_spec(self._pipeline_for(decoder, count), count, resolution, self.seed)
            if self.browser:
                *others, last = self.steps
                for count in others:
                    yield prior_spec(self._pipeline_for(decoder, count), count, self.seed, f"prior_{count}")
                yield from browser_specs(self._pipeline_for(decoder, last), last, self.resolution, self.seed)
        if isinstance(signal, RadianceField):
            yield from radiance_specs(decoder, signal, shown, self.seed)
        latents, labels = instances.latents[: len(instances.labels)], instances.labels
        yield from baked_specs(decoder, latents, labels, self.resolution)
        if isinstance(signal, RadianceField):
            yield from baked_radiance_specs(decoder, signal, latents, labels, self.seed)

    def _pipeline_for(self, decoder: MNIFModel, steps: int) -> MNIFPipeline:
        """Picks what draws in ``steps``: the student where it was distilled for them, as the pipeline itself does."""
        assert self.pipeline is not None
        denoiser, scheduler = self.pipeline.denoiser, self.pipeline.scheduler
        student = self.pipeline.student
        if student is not None and steps in student.config.distilled_steps:
            denoiser, scheduler = student, self.pipeline.student_scheduler
        if not isinstance(denoiser, ExportedDenoiser):
            raise UserError(
                f"{type(denoiser).__name__} cannot be exported; `mnif distill` makes a student that can, for "
                "--num_inference_steps 1, 2 or 4"
            )
        pipeline = MNIFPipeline(decoder, for_decoder(denoiser, decoder), scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _instances(self) -> ExportedInstances:
        """Collects what is baked, with as many further latents as references need."""
        if self.table is not None:
            return instances_of_table(self.decoder, self.table, self.num_baked, self.ids, _REFERENCES)
        if self.pipeline is not None:
            return sample_instances(self.pipeline, self.num_baked, self.steps[-1], self.seed, _REFERENCES)
        return ExportedInstances(reference_latents(self.decoder, _REFERENCES, self.seed), [])


def load_encoder(folder: Path, decoder: MNIFModel) -> GridEncoder:
    """The encoder of a model folder.

    Raises:
        UserError: the model has none, it is damaged, or it is none of grids.
    """
    if not (model_folder_in(folder) / "encoder").is_dir():
        raise UserError(f"--encoder: {folder} has none; only models of `mnif fit --method encoder` have")
    encoder = load_latent_init(folder, decoder, signal_of_model(decoder), "encoder")
    if not isinstance(encoder, (PatchEncoder, TokenEncoder)):
        raise UserError(
            "--encoder: that of posed views takes any number of them, and its score is a rendering of them all, no "
            "graph of fixed size; leave the flag out"
        )
    return encoder


def load_profile_of_encoder(folder: Path, decoder: MNIFModel) -> Profile | None:
    """The reference profile of a model folder, if it has one and that is of what the encoder finds by itself.

    Raises:
        UserError: it is damaged, or another decoder's.
    """
    if not (model_folder_in(folder) / MODEL_PROFILE).is_dir():
        print("no reference profile in the model folder: the bundle will not judge what it encodes")
        return None
    profile = load_profile(folder, decoder)
    if profile.record.refinement_steps:
        print(f"the profile is of latents refined in {profile.record.refinement_steps} steps: not in the bundle")
        return None
    return profile


_UNUSED = ("reference_latents", "reference_scores", "gaps")  # of a profile's arrays: for batches and refined latents


def write_profile(bundle: Path, profile: Profile) -> None:
    """Writes the arrays by which :class:`export.device.gate.Gate` judges into a bundle's folder."""
    arrays: dict[str, Any] = {name: array for name, array in sorted(profile.arrays.items()) if name not in _UNUSED}
    np.savez_compressed(bundle / PROFILE, **arrays)


def write_weights(bundle: Path, decoder: MNIFModel) -> None:
    """Writes ``weights.safetensors``: the decoder, its large matrices in float16 but for the first layer's.

    The denoiser stands in the samplers.
    """
    state = decoder.state_dict()
    bases = tuple(f"bases.{mixed}" for mixed, layer in enumerate(decoder.mixed_layers) if layer > 0)
    large = {name for name in state if name.endswith(bases)}
    large |= {name for name, tensor in state.items() if "coefficient_map." in name and tensor.ndim == 2}
    tensors = {
        f"decoder.{name}": (tensor.half() if name in large else tensor).contiguous() for name, tensor in state.items()
    }
    save_tensors(tensors, bundle / "weights.safetensors", {"decoder_fingerprint": decoder.fingerprint()})


COMMANDS = ("build", "sample", "encode", "verify", "bench", "update")


def write_device_files(bundle: Path) -> None:
    """Writes ``device/`` into a bundle's folder: the package :mod:`export.device`, and a script for each command."""
    here, device = Path(__file__).parent, bundle / "device"
    (device / "export" / "device").mkdir(parents=True)
    for source in (here / "__init__.py", *sorted((here / "device").glob("*.py"))):
        shutil.copyfile(source, device / "export" / source.relative_to(here))
    for name in COMMANDS:
        shutil.copyfile(here / "device_entry.py", device / f"{name}.py")


class WrittenFile(msgspec.Struct):
    """What a manifest says of a file."""

    sha256: str
    bytes: int


class WrittenManifest(msgspec.Struct):
    """What is looked at in the manifest of a bundle that is to be replaced, finished or not."""

    files: dict[str, WrittenFile] = {}
    inputs: dict[str, str] = {}


def put_in_place(new: Path, output: Path) -> list[str]:
    """Moves a whole bundle into ``output``.

    While files are moved, the manifest there is an unfinished one, which nothing reads as a bundle and which names the
    files of both, so that whatever a killed command leaves is known to the next. The new manifest comes last.

    Args:
        new: the bundle, on the same file system; emptied.
        output: gets it; may be missing, empty, or a bundle, finished or not.

    Returns:
        The files there that are not the bundle's, plans left out.

    Raises:
        UserError: a file that no manifest names is in the way; nothing has been touched.
    """
    manifest = read_object(new / MANIFEST, WrittenManifest)
    files, before = manifest["files"], _files_of_bundle(output)
    changed = [name for name in files if not is_as_written(output / name, files[name])]
    for name in changed:
        _check_way(output, name, name in before)
    write_json(
        output / MANIFEST,
        {"schema": UNFINISHED, "decoder_fingerprint": manifest["decoder_fingerprint"], "files": before | files},
    )
    for name in changed:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (new / name).chmod(0o644)  # safetensors keeps what it makes from other users
        flush_to_disk(new / name)
        shutil.move(new / name, output / name)
    for name in before.keys() - files.keys():
        _remove(output, name)
    for folder in {output, *(path for name in changed for path in (output / name).parents if output in path.parents)}:
        flush_to_disk(folder)
    shutil.move(new / MANIFEST, output / MANIFEST)
    flush_to_disk(output)
    there = (path.relative_to(output) for path in sorted(output.rglob("*")) if not path.is_dir())
    others = [path.as_posix() for path in there if path.parts[0] != ENGINES]
    return [name for name in others if name not in files and name not in (MANIFEST, LOCK)]


def is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    """Tells whether a file is there and what a manifest's entry says of it."""
    return path.is_file() and path.stat().st_size == entry["bytes"] and sha256_of_file(path) == entry["sha256"]


def _files_of_bundle(output: Path) -> dict[str, Any]:
    """Reads what the manifest there names, as far as it lies below the folder; nothing where there is none."""
    if not (output / MANIFEST).is_file():
        return {}
    files = read_object(output / MANIFEST, WrittenManifest).get("files", {})
    return {name: entry for name, entry in files.items() if _is_inside(name)}


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.parts[0] != ENGINES


def _check_way(output: Path, name: str, own: bool) -> None:
    """Refuses to write over what no manifest names, or where no file can be."""
    path = output / name
    around = [output / each for each in Path(name).parents]
    in_the_way = next((each for each in around if each.exists() and not each.is_dir()), None)
    if in_the_way is None and (path.is_dir() or (not own and (path.exists() or path.is_symlink()))):
        in_the_way = path
    if in_the_way is not None:
        raise UserError(f"{in_the_way} is not of the bundle and in its way; move it, or choose another --output_dir")


def _remove(output: Path, name: str) -> None:
    """Removes a file, and the folders that are empty then."""
    if (output / name).is_dir():
        return
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (output / name).unlink()
    for folder in Path(name).parents[:-1]:
        with contextlib.suppress(OSError):
            (output / folder).rmdir()
