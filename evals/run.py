"""`mnif eval`: measures samples and reconstructions, each figure beside its controls."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.controls import gaussian_latents, latent_table_of, prior_latents
from evals.figures import copying_verdict, memorisation_figures, reconstruction_figures, sample_figures
from latent_prior.pipeline import load_pipeline
from mnif import __version__
from mnif.arguments import parse_arguments
from mnif.data import ImageData, load_images, picture_size
from mnif.encoder import PatchEncoder
from mnif.errors import UserError
from mnif.files import read_json, sha256_of_folder, write_json
from mnif.fitting import in_batches
from mnif.model_folder import load_component
from mnif.pictures import to_pixels
from mnif.runs import command_line, peak_memory_megabytes


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
    reference = load_images(arguments.reference, decoder.config.resolution)

    def measure() -> dict[str, Any]:
        encoder = load_component(PatchEncoder, model, "encoder") if (model / "encoder").is_dir() else None
        table = latent_table_of(model, pipeline)
        known = table if table is not None and table.ids == reference.ids else None
        held_out = reference.held_out(arguments.held_out_fraction) if known is None else known.held_out.numpy()
        steps, output = arguments.refinement_steps, arguments.output_dir
        figures: dict[str, Any] = {}
        figures |= reconstruction_figures(decoder, encoder, reference, held_out, known, steps, output)
        latents = prior_latents(pipeline, arguments.num_samples, arguments.seed, arguments.num_inference_steps)
        drawn = {"fd_lite0": to_pixels(in_batches(decoder, latents))}
        if table is not None:
            gaussian = gaussian_latents(table, arguments.num_samples, arguments.seed)
            drawn["fd_lite0_gaussian"] = to_pixels(in_batches(decoder, gaussian))
            if table.held_out.any():
                figures |= memorisation_figures(latents.numpy(), table)
        return figures | sample_figures(drawn, reference, held_out, output)

    return _inputs(arguments, reference, sha256_of_folder(model)), measure


def _samples(arguments: EvalArguments) -> tuple[dict[str, str], Callable[[], dict[str, Any]]]:
    """What the figures of a folder of samples depend on, and how to measure them."""
    assert arguments.samples is not None
    samples = load_images(arguments.samples, picture_size(arguments.samples))
    reference = load_images(arguments.reference, samples.images.shape[1])

    def measure() -> dict[str, Any]:
        drawn = {"fd_lite0": samples.images[: arguments.num_samples]}
        held_out = reference.held_out(arguments.held_out_fraction)
        return sample_figures(drawn, reference, held_out, arguments.output_dir)

    return _inputs(arguments, reference, samples.fingerprint()), measure


def _inputs(arguments: EvalArguments, reference: ImageData, measured: str) -> dict[str, str]:
    settings = {key: str(value) for key, value in asdict(arguments).items() if key != "output_dir"}
    return settings | {"version": __version__, "measured": measured, "reference_fingerprint": reference.fingerprint()}
