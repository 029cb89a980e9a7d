"""`mnif sample`: draws new pictures from a model folder."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.schedulers import scheduler_by_name
from mnif.arguments import parse_arguments
from mnif.errors import UserError
from mnif.files import read_json, sha256_of_folder, write_json
from mnif.pictures import picture_grid, save_picture
from mnif.progress import progress_bar
from mnif.runs import command_line, peak_memory_megabytes


@dataclass(kw_only=True)
class SampleArguments:
    """Draw new pictures; sample i depends on seed and i alone, and a stopped command continues where it was."""

    model: Path
    """The model folder, RUN/model."""
    output_dir: Path
    """Gets 000000.png …, metrics.json and preview/grid.png."""
    num_samples: int = 64
    """How many pictures."""
    seed: int = 0
    """Of the noise."""
    num_inference_steps: int = 20
    """Denoising steps."""
    resolution: int | None = None
    """Pixels per axis; default: the training resolution."""
    scheduler: str | None = None
    """A diffusers scheduler by class name, such as DDIMScheduler; default: the model's own."""
    batch_size: int = 64
    """Pictures drawn at a time."""


def main(arguments: list[str]) -> None:
    """Runs `mnif sample`."""
    sample(parse_arguments(SampleArguments, arguments, "mnif sample"))


def sample(arguments: SampleArguments) -> None:
    """Writes pictures to ``arguments.output_dir``.

    Raises:
        UserError: the model folder lacks a stage, or a flag is out of range.
    """
    for flag in ("num_samples", "num_inference_steps", "resolution", "batch_size"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    pipeline = load_pipeline(arguments.model)
    if arguments.scheduler:
        pipeline.scheduler = scheduler_by_name(arguments.scheduler, pipeline.scheduler)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)

    output = arguments.output_dir
    asked = {
        "model_sha256": sha256_of_folder(arguments.model),
        "seed": arguments.seed,
        "num_inference_steps": arguments.num_inference_steps,
        "resolution": arguments.resolution or pipeline.decoder.config.resolution,
        "scheduler": type(pipeline.scheduler).__name__,
    }
    missing = [i for i in range(arguments.num_samples) if not (output / f"{i:06d}.png").exists()]
    _check_same_samples(output, asked, len(missing) < arguments.num_samples)
    write_json(output / "samples.json", asked)
    started = time.perf_counter()
    with progress_bar(total=arguments.num_samples, initial=arguments.num_samples - len(missing), unit="image") as bar:
        for begin in range(0, len(missing), arguments.batch_size):
            indices = missing[begin : begin + arguments.batch_size]
            for index, image in zip(indices, _draw(pipeline, arguments, indices), strict=True):
                save_picture(output / f"{index:06d}.png", image)
            bar.update(len(indices))
    seconds = time.perf_counter() - started
    if missing:
        rate = len(missing) / seconds
        write_json(
            output / "metrics.json",
            {
                "images_per_second": rate,
                "seconds": round(seconds, 2),
                "peak_rss_mb": peak_memory_megabytes(),
                "command": command_line(),
            },
        )
        print(f"{output}: {len(missing)} pictures drawn, {rate:.0f} images/s")
    else:
        print(f"{output}: all {arguments.num_samples} pictures are there already")
    _save_preview(output, arguments.num_samples)


def _check_same_samples(output: Path, asked: dict[str, Any], some_are_there: bool) -> None:
    """Refuses to fill up a folder whose pictures came from another model, seed or setting."""
    record = output / "samples.json"
    if not some_are_there:
        return
    before = read_json(record) if record.exists() else {}
    for name, value in asked.items():
        if before.get(name) != value:
            raise UserError(
                f"{output} holds pictures drawn with {name} {before.get(name, 'unknown')}, not {value}; "
                "choose another --output_dir or empty it"
            )


def _draw(pipeline: MNIFPipeline, arguments: SampleArguments, indices: list[int]) -> list[Image.Image]:
    noise = initial_noise(arguments.seed, indices, pipeline.decoder.config.latent_dim)
    (images,) = pipeline(
        latents=torch.from_numpy(noise),
        num_inference_steps=arguments.num_inference_steps,
        resolution=arguments.resolution,
        return_dict=False,
    )
    return images


def _save_preview(output: Path, count: int) -> None:
    shown = [np.asarray(Image.open(output / f"{index:06d}.png")) for index in range(min(count, 64))]
    scale = max(1, 64 // shown[0].shape[0])
    save_picture(output / "preview" / "grid.png", picture_grid(shown, columns=min(len(shown), 8), scale=scale))
