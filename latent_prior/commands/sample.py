"""`mnif sample`: draws new samples from a model folder, on one process or several."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latent_prior.settings import GUIDANCE_SCALE, INFERENCE_STEPS
from mnif.signals.output_flags import OutputFlags
from mnif.utils.args import parse_arguments
from mnif.utils.devices import DeviceFlags
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import flush_everything, remove_leftovers, sha256_of_folder, write_json
from mnif.utils.json_files import read_json
from mnif.utils.model_folders import model_folder_in
from mnif.utils.output_folders import holds_folder
from mnif.utils.process import Processes, command_line, peak_memory_megabytes, progress_bar

if TYPE_CHECKING:
    from latent_prior.pipeline import MNIFPipeline
    from latent_prior.sample_writers import Samples

_COMPONENTS = ("decoder", "denoiser", "scheduler", "student", "student_scheduler")


@dataclass(kw_only=True)
class SamplingFlags:
    """How noise becomes latents."""

    num_inference_steps: int = INFERENCE_STEPS
    """Denoising steps; the student draws, if there is one, in the numbers of steps it was distilled for."""
    scheduler: str | None = None
    """A diffusers scheduler by class name, such as DDIMScheduler, for the prior; default: the model's own."""
    truncation: float = 1.0
    """Below 1: draws latents towards their mean, for typical samples of less variety; 0 is the mean itself."""
    guide: Path | None = None
    """Run or model folder of a weaker prior of the same latents: the prior's samples are led away from what that would
    draw; each step costs both."""
    guidance_scale: float | None = None
    """How far, at least 1, which is not at all; with --guide 1.5 unless given."""
    guidance_start: float = 0.0
    """The share of the way from noise to latents that is gone without guidance, below 1."""


@dataclass(kw_only=True)
class FilesFlags:
    """How samples are stored."""

    format: Literal["folder", "tar", "npz"] = "folder"
    """Files in a folder, shards for WebDataset, or one array."""
    shard_size: int = 1024
    """Samples in a shard, a multiple of 64 (tar, npz while it is written)."""
    batch_size: int = 64
    """Pictures decoded at a time; fewer need less memory, and change no byte."""


@dataclass(kw_only=True)
class PreviewFlags:
    """What is shown of them."""

    grid: int = 64
    """Samples in preview/grid.png; 0: no preview."""
    interpolate: int | None = None
    """Adds preview/interpolation.png and .gif: the way from each of the first samples to the next in so many steps."""


@dataclass(kw_only=True)
class SampleArguments(SamplingFlags, FilesFlags, PreviewFlags, OutputFlags, DeviceFlags):
    """Draw new samples; number i depends on seed and i alone, and a stopped command continues where it was."""

    model: Path
    """The model folder, RUN/model, a model on the hub, user/name, or avatars, which comes along."""
    output_dir: Path
    """Gets the samples, samples.json, metrics.json and preview/."""
    num_samples: int = 64
    """How many samples."""
    seed: int = 0
    """Of the noise."""


def main(arguments: list[str]) -> None:
    """Runs `mnif sample`."""
    sample(parse_arguments(SampleArguments, arguments, "mnif sample"))


@holds_folder("output_dir", "sample")
def sample(arguments: SampleArguments) -> None:
    """Writes samples to ``arguments.output_dir``.

    Raises:
        UserError: the model folder lacks a stage, a flag is out of range, or the output folder is another command's
            or holds other samples.
    """
    from accelerate.utils import gather_object

    from latent_prior.guidance import guided_pipeline
    from latent_prior.hub import model_folder
    from latent_prior.pipeline import load_pipeline
    from latent_prior.sample_writers import save_interpolation, save_preview
    from latent_prior.schedulers import scheduler_by_name

    _check(arguments)
    processes = Processes(arguments.device)
    model = model_folder(arguments.model)
    pipeline = load_pipeline(model)
    if arguments.scheduler:
        pipeline.scheduler = scheduler_by_name(arguments.scheduler, pipeline.scheduler)
    if arguments.guide:
        scale = arguments.guidance_scale or GUIDANCE_SCALE
        pipeline = guided_pipeline(pipeline, arguments.guide, scale, arguments.guidance_start)
    samples = _samples(arguments, pipeline)
    if arguments.interpolate:
        _check_interpolation(samples)
    requested = _requested(arguments, model, samples)
    _check_same_samples(samples, requested)

    missing = {chunk: samples.missing(chunk) for chunk in samples.chunks()}  # as all find it, for none writes yet
    processes.wait()
    if processes.is_main:
        for folder in samples.folders():
            remove_leftovers(folder)
        write_json(samples.output / "samples.json", requested)
    processes.wait()
    pipeline.to(processes.device)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    unseen = _write(samples, missing, processes)
    flush_everything()
    unseen = sum(gather_object([unseen]))
    if not processes.is_main:
        return
    samples.finish()
    _report(samples, sum(missing.values()), unseen, time.perf_counter() - started)
    if arguments.grid:
        save_preview(samples, arguments.grid)
    if arguments.interpolate:
        save_interpolation(samples, arguments.interpolate)


def _check(arguments: SampleArguments) -> None:
    from latent_prior.sampling import CHUNK

    for flag in ("num_samples", "num_inference_steps", "batch_size", "shard_size", "interpolate"):
        check_at_least(1, **{flag: getattr(arguments, flag)})
    check_at_least(0, grid=arguments.grid, seed=arguments.seed)
    if arguments.interpolate and arguments.num_samples < 2:
        raise UserError("--interpolate: --num_samples 2 at least are needed")
    if arguments.shard_size % CHUNK:
        raise UserError(f"--shard_size {arguments.shard_size}: must be a multiple of {CHUNK}")
    if not 0 <= arguments.truncation <= 1:
        raise UserError(f"--truncation {arguments.truncation:g}: must lie between 0 and 1")
    scale = arguments.guidance_scale
    if scale is not None and arguments.guide is None:
        raise UserError(f"--guidance_scale {scale:g}: away from what? --guide names a prior of the same latents")
    if scale is not None and not 1 <= scale < math.inf:
        raise UserError(f"--guidance_scale {scale:g}: a finite number from 1 on is needed")
    if not 0 <= arguments.guidance_start < 1:
        raise UserError(f"--guidance_start {arguments.guidance_start:g}: must be at least 0 and below 1")
    if arguments.guidance_start and arguments.guide is None:
        raise UserError(
            f"--guidance_start {arguments.guidance_start:g}: of which guidance? --guide names a weaker prior"
        )
    if arguments.format == "npz":
        for flag in ("mesh", "turntable", "frames"):
            if getattr(arguments, flag) is not None:
                raise UserError(f"--{flag}: an .npz file holds one array and no files; take --format folder or tar")


def _check_interpolation(samples: Samples) -> None:
    from latent_prior.schedulers import adds_noise

    options = samples.options
    _, scheduler = samples.pipeline.select_denoiser(options["num_inference_steps"], options["use_student"])
    if adds_noise(scheduler):
        raise UserError(
            f"--interpolate: {type(scheduler).__name__} adds noise in every step; name another --scheduler, "
            "such as DDIMScheduler"
        )


def _samples(arguments: SampleArguments, pipeline: MNIFPipeline) -> Samples:
    """Puts together what is drawn and where it goes."""
    from latent_prior.sample_writers import FORMATS
    from latent_prior.sampling import CHUNK
    from mnif.signals.outputs import writer_from_flags
    from mnif.signals.registry import signal_of_model

    signal = signal_of_model(pipeline.decoder)
    return FORMATS[arguments.format](
        output=arguments.output_dir,
        count=arguments.num_samples,
        pipeline=pipeline,
        seed=arguments.seed,
        options={
            "num_inference_steps": arguments.num_inference_steps,
            "truncation": arguments.truncation,
            "use_student": False if arguments.scheduler else None,
        },
        signal=signal,
        writer=writer_from_flags(arguments, signal),
        at_once=arguments.batch_size,
        chunk_size=CHUNK if arguments.format == "folder" else arguments.shard_size,
    )


def _requested(arguments: SampleArguments, model: Path, samples: Samples) -> dict[str, Any]:
    """Lists what the bytes of samples depend on; samples.json holds it."""
    pipeline = samples.pipeline
    denoiser, scheduler = pipeline.select_denoiser(arguments.num_inference_steps, samples.options["use_student"])
    requested = {
        "model_sha256": [sha256_of_folder(model / name) for name in _COMPONENTS if (model / name).is_dir()],
        "seed": arguments.seed,
        "num_inference_steps": arguments.num_inference_steps,
        "scheduler": type(scheduler).__name__,
        "denoiser": "student" if denoiser is pipeline.student else "teacher",
        "truncation": arguments.truncation,
        "format": arguments.format,
    } | asdict(samples.writer)
    if arguments.guide:
        requested |= {
            "denoiser": "guided",
            "guide_sha256": sha256_of_folder(model_folder_in(arguments.guide) / "denoiser"),
            "guidance_scale": arguments.guidance_scale or GUIDANCE_SCALE,
        } | ({"guidance_start": arguments.guidance_start} if arguments.guidance_start else {})
    if arguments.format != "folder":
        requested |= {"num_samples": arguments.num_samples, "shard_size": arguments.shard_size}
    return requested


def _write(samples: Samples, missing: dict[range, int], processes: Processes) -> int:
    """Writes this process's share of the chunks, and counts the samples of which there was nothing to show.

    Args:
        samples: what is written.
        missing: for each chunk, how many of its samples are not there.
        processes: share the work.
    """
    import torch

    todo = [chunk for chunk, count in missing.items() if count]
    chunks = processes.share(todo)
    unseen, total = 0, sum(missing[chunk] for chunk in chunks)
    whose = f" (process 1 of {processes.count})" if processes.count > 1 else ""
    with (
        progress_bar(
            total=total, desc=f"sampling{whose}", unit=samples.signal.noun, disable=not processes.is_main
        ) as bar,
        torch.no_grad(),
    ):
        for chunk in chunks:
            for why in samples.write(chunk):
                unseen += why is not None
                bar.update()
    return unseen


def _report(samples: Samples, drawn: int, unseen: int, seconds: float) -> None:
    unit, output = samples.signal.noun, samples.output
    metrics = {"seconds": round(seconds, 2), "peak_rss_mb": peak_memory_megabytes(), "command": command_line()}
    if not drawn:
        if not (output / "metrics.json").exists():  # of one that was killed at its end
            write_json(output / "metrics.json", metrics)
        print(f"{output}: all {samples.count} {unit}s are there already")
        return
    rate = drawn / seconds
    write_json(output / "metrics.json", metrics | {"images_per_second": rate})
    without = f"; {unseen} of them have no surface" if unseen else ""
    print(f"{output}: {drawn} {unit}s drawn, {rate:.0f} a second{without}")


def _check_same_samples(samples: Samples, requested: dict[str, Any]) -> None:
    """Refuses to fill up a folder whose samples came from another model, seed or setting."""
    record = samples.output / "samples.json"
    before = read_json(record) if record.exists() else {}
    if not samples.any_there() and before.get("format", requested["format"]) == requested["format"]:
        return
    for name, value in requested.items():
        if before.get(name) != value:
            raise UserError(
                f"{samples.output} holds samples drawn with {name} {before.get(name, 'unknown')!s:.24}, "
                f"not {value!s:.24}; choose another --output_dir or empty it"
            )
