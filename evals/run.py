"""`mnif eval`: measures samples and reconstructions, each figure beside its controls."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evals.controls import gaussian_latents, latent_table_of, prior_latents
from evals.figures import (
    copying_verdict,
    decoded_pictures,
    memorisation_figures,
    reconstruction_figures,
    sample_figures,
)
from latent_prior.pipeline import load_pipeline
from mnif import __version__
from mnif.arguments import parse_arguments
from mnif.data import ImageData, Split, load_images, picture_size
from mnif.errors import UserError
from mnif.files import read_json, sha256_of_folder, write_json
from mnif.latents import LatentTable
from mnif.model_folder import load_finder
from mnif.runs import command_line, peak_memory_megabytes
from mnif.signal_table import signal_of_model


@dataclass(kw_only=True)
class EvalArguments:
    """Measure samples against a reference set, and reconstructions, each beside its controls."""

    reference: str
    """The data set to compare with: a built-in name, a folder or an .npz file."""
    output_dir: Path
    """Gets metrics.json and pictures."""
    model: Path | None = None
    """A model folder, RUN/model; or give --samples."""
    samples: str | None = None
    """A folder or .npz file of samples; or give --model."""
    num_samples: int = 1000
    """How many samples are drawn, or taken from the folder."""
    num_inference_steps: int = 20
    """Denoising steps."""
    seed: int = 0
    """Of the noise."""
    held_out_fraction: float = 0.1
    """Share of the reference's designs kept out of training, where no latent table beside the model tells."""
    test_fraction: float = 0.05
    """Share of the designs kept for a test, likewise."""
    refinement_steps: int = 60
    """Adam steps on held-out latents; as given to `mnif fit`."""


def main(arguments: list[str]) -> None:
    """Runs `mnif eval`."""
    evaluate(parse_arguments(EvalArguments, arguments, "mnif eval"))


def evaluate(arguments: EvalArguments) -> None:
    """Writes ``metrics.json`` and pictures to ``arguments.output_dir``.

    Raises:
        UserError: model, samples or reference cannot be read or do not fit each other.
    """
    started = time.perf_counter()
    if arguments.num_samples < 2:
        raise UserError(f"--num_samples {arguments.num_samples}: at least 2 are needed")
    if (arguments.model is None) == (arguments.samples is None):
        raise UserError("give either --model RUN/model or --samples FOLDER")
    path = arguments.output_dir / "metrics.json"
    inputs, measure = _model(arguments) if arguments.model is not None else _samples(arguments)
    if path.exists() and read_json(path).get("inputs") == inputs:
        print(f"{path}: measured here before with these inputs; nothing to do")
        return
    figures = measure() | {
        "inputs": inputs,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_memory_megabytes(),
        "command": command_line(),
    }
    write_json(path, figures)
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"  {name:28} {value:10.3f}")
    if verdict := copying_verdict(figures):
        print(f"  this prior {verdict}")
    print(path)


def _model(arguments: EvalArguments) -> tuple[dict[str, str], Callable[[], dict[str, Any]]]:
    """What the figures of a model folder depend on, and how to measure them."""
    assert arguments.model is not None
    model = arguments.model
    pipeline = load_pipeline(model)
    decoder = pipeline.decoder
    signal = signal_of_model(decoder)
    if signal.name != "image" or signal.channels != 3:
        raise UserError(
            f"{model}: a model of {signal.name} with {signal.channels} channel(s); `mnif eval` measures RGB pictures. "
            "How well its latents fit is in RUN/metrics.json and in the output of `mnif encode`"
        )
    reference = load_images(arguments.reference, _size(decoder.config.resolution))

    def measure() -> dict[str, Any]:
        finder = load_finder(model, signal)
        table = latent_table_of(model, pipeline)
        sides = reference.split(arguments.held_out_fraction, arguments.test_fraction)
        known = table if table is not None and _is_of(table, reference) else None
        if known is not None:
            sides = _sides(known, reference)
        steps, output = arguments.refinement_steps, arguments.output_dir
        figures: dict[str, Any] = {}
        figures |= reconstruction_figures(decoder, finder, reference, sides, known, steps, output)
        latents = prior_latents(pipeline, arguments.num_samples, arguments.seed, arguments.num_inference_steps)
        drawn = {"fd_lite0": decoded_pictures(decoder, latents)}
        if table is not None:
            gaussian = gaussian_latents(table, arguments.num_samples, arguments.seed)
            drawn["fd_lite0_gaussian"] = decoded_pictures(decoder, gaussian)
            if table.held_out.any():
                figures |= memorisation_figures(latents.numpy(), table)
        return figures | sample_figures(drawn, reference, sides, output)

    return _inputs(arguments, reference, sha256_of_folder(model)), measure


def _samples(arguments: EvalArguments) -> tuple[dict[str, str], Callable[[], dict[str, Any]]]:
    """What the figures of a folder of samples depend on, and how to measure them."""
    assert arguments.samples is not None
    samples = load_images(arguments.samples, picture_size(arguments.samples))
    reference = load_images(arguments.reference, samples.images.shape[1])

    def measure() -> dict[str, Any]:
        drawn = {"fd_lite0": samples.images[: arguments.num_samples]}
        sides = reference.split(arguments.held_out_fraction, arguments.test_fraction)
        return sample_figures(drawn, reference, sides, arguments.output_dir)

    return _inputs(arguments, reference, samples.fingerprint()), measure


def _size(resolution: int | list[int]) -> int | tuple[int, int]:
    return resolution if isinstance(resolution, int) else (resolution[0], resolution[1])


def _is_of(table: LatentTable, reference: ImageData) -> bool:
    """Whether the table's instances are the reference's, in order, some perhaps kept out of it for a test."""
    known = set(table.ids)
    return table.ids == [id for id in reference.ids if id in known]


def _sides(table: LatentTable, reference: ImageData) -> np.ndarray:
    """The sides as `mnif fit` cut them; what is not in its table was never looked at."""
    sides = np.full(len(reference), Split.TEST, dtype=np.int8)
    known = set(table.ids)
    sides[[id in known for id in reference.ids]] = np.where(table.held_out.numpy(), Split.HELD_OUT, Split.TRAIN)
    return sides


def _inputs(arguments: EvalArguments, reference: ImageData, measured: str) -> dict[str, str]:
    settings = {key: str(value) for key, value in asdict(arguments).items() if key != "output_dir"}
    return settings | {"version": __version__, "measured": measured, "reference_fingerprint": reference.fingerprint()}
