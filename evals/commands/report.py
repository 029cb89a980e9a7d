"""`mnif report`: one self-contained HTML page that shows a run."""

from __future__ import annotations

import base64
import io
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from PIL import Image

from export.device.bundle import BundleError, BundleFolder
from latent_prior.settings import INFERENCE_STEPS
from mnif.training.run_record import read_metrics_log, read_run_record
from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError
from mnif.utils.files import check_writable, written_atomically
from mnif.utils.json_files import read_json, read_object
from mnif.utils.pixels import image_grid
from mnif.utils.process import command_line

if TYPE_CHECKING:
    from jinja2 import Template
    from torch import Tensor

    from latent_prior.pipeline import MNIFPipeline

RESOLUTIONS = (32, 64, 256)

PACKAGES = ("mnif-diffusion", "torch", "diffusers", "accelerate", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")


@dataclass(kw_only=True)
class InputsFlags:
    """What is shown beside the run itself."""

    eval_dir: Path | None = None
    """The output of `mnif eval`; default: RUN/eval."""
    comparison_dir: Path | None = None
    """The output of `mnif eval A B …`; default: RUN/comparison."""
    bundle: Path | None = None
    """The output of `mnif export`; default: RUN/bundle."""
    samples: Path | None = None
    """The output of `mnif sample`; default: RUN/pictures."""


@dataclass(kw_only=True)
class PicturesFlags:
    """What is drawn for the page."""

    seed: int = 0
    """Of the pictures drawn for the page."""
    num_inference_steps: int = INFERENCE_STEPS
    """Denoising steps of the pictures drawn for the page."""


@dataclass(kw_only=True)
class ReportArguments(InputsFlags, PicturesFlags):
    """Write one self-contained HTML page that shows a run: pictures, curves, figures with their controls, commands."""

    run: Path
    """The run folder."""
    output: Path | None = None
    """The page; default: RUN/report.html."""


def main(arguments: list[str]) -> None:
    """Runs `mnif report`."""
    report(parse_arguments(ReportArguments, arguments, "mnif report"))


def report(arguments: ReportArguments) -> None:
    """Writes the page.

    Raises:
        UserError: the run folder lacks a stage, or the bundle is unfinished or was changed.
    """
    import torch

    from evals.metrics.neighbours import copying_verdict
    from evals.presentation import protocol_line, read_evaluation, table_rows
    from evals.timing import measured_latencies
    from latent_prior.pipeline import load_pipeline

    run, output = arguments.run, _output_of(arguments)
    pipeline = load_pipeline(run / "model")
    bundle = arguments.bundle or run / "bundle"
    manifest = _manifest_of(bundle) if (bundle / "manifest.json").exists() else None
    evaluation = arguments.eval_dir or run / "eval"
    metrics = read_evaluation(evaluation / "metrics.json") if (evaluation / "metrics.json").exists() else {}
    compared = arguments.comparison_dir or run / "comparison"
    compare = compared / "comparison.json"
    comparison = read_object(compare, Comparison) if compare.exists() else {}
    samples = arguments.samples or run / "pictures"
    steps = arguments.num_inference_steps
    page = _template().render(
        title=run.resolve().name,
        fit=read_object(run / "metrics.json", RunFigures),
        metrics=metrics,
        rows=table_rows([metrics]),
        protocol=protocol_line(metrics.get("protocol", {})),
        verdict=copying_verdict(metrics),
        comparison=comparison,
        compared_rows=table_rows([one["figures"] for one in comparison.get("evaluations", [])]),
        pictures=_drawn_images(pipeline, arguments.seed, steps)
        | _stored_images(evaluation, ("reconstructions_train", "reconstructions_heldout", "nearest"))
        | _stored_images(compared, ("comparison",)),
        plots=_plots(run / "metrics.jsonl"),
        latencies=measured_latencies(pipeline, bundle if manifest else None, _steps_of(manifest, steps)),
        sizes=_sizes(run / "model", bundle),
        manifest=manifest,
        versions=_versions(),
        threads=torch.get_num_threads(),
        commands=_commands(run, samples, bundle, evaluation),
        seed=arguments.seed,
        resolutions=RESOLUTIONS,
    )
    with written_atomically(output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(output)


def _output_of(arguments: ReportArguments) -> Path:
    """The page, if there is a run and the page can be written."""
    run, output = arguments.run, arguments.output or arguments.run / "report.html"
    if not (run / "run.json").is_file():
        raise UserError(f"--run {run}: no run folder; `mnif fit --output_dir {run}` makes it")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")
    check_writable(output.parent)
    return output


def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("evals", "."), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.jinja")


class PriorFigures(msgspec.Struct):
    """What `mnif prior` adds to a run's ``metrics.json``."""

    denoiser_parameters: int
    seconds: float
    peak_rss_mb: float | None = None


class RunFigures(msgspec.Struct):
    """What the page shows of a run's ``metrics.json``."""

    decoder_parameters: int
    fields_per_instance: int
    field_parameters: int
    seconds: float
    prior: PriorFigures
    peak_rss_mb: float | None = None


class ComparedEvaluation(msgspec.Struct):
    """A column of a ``comparison.json``."""

    name: str
    figures: dict[str, bool | int | float | str | list | dict | None]


class Comparison(msgspec.Struct):
    """A ``comparison.json``."""

    evaluations: list[ComparedEvaluation] = []


def _manifest_of(bundle: Path) -> dict[str, Any]:
    try:
        return BundleFolder(bundle).manifest
    except BundleError as error:
        raise UserError(str(error)) from None


def _steps_of(manifest: dict[str, Any] | None, steps: int) -> int:
    """Those of the sampler that :class:`export.device.runtime.Sampler` takes: the most the bundle has."""
    return max(manifest["sampling"]["num_inference_steps"]) if manifest else steps


def _drawn_images(pipeline: MNIFPipeline, seed: int, steps: int) -> dict[str, str]:
    """Samples, the same sample at several resolutions, and a walk between samples, as data URIs."""
    import torch

    from latent_prior.sampling import denoised, initial_noise, sample_latents, slerp
    from mnif.signals.outputs import postprocess

    pipeline.set_progress_bar_config(disable=True)

    def sheet(latents: Tensor, columns: int, resolution: int | None = None) -> str:
        images = postprocess(pipeline.decoder, latents, "pil", resolution)
        return _data_uri(image_grid([np.asarray(image) for image in images], columns=columns))

    noise = initial_noise(seed, range(5), pipeline.decoder.config.latent_dim)
    walk = np.concatenate([slerp(start, end, np.linspace(0, 1, 8)) for start, end in pairwise(noise)])
    with torch.no_grad():
        latents = sample_latents(pipeline, seed, range(96), steps)
        return {
            "samples": sheet(latents, columns=16),
            **{f"at_{resolution}": sheet(latents[:4], 4, resolution) for resolution in RESOLUTIONS},
            "interpolation": sheet(denoised(pipeline, torch.from_numpy(walk), steps), columns=8),
        }


def _stored_images(folder: Path, names: tuple[str, ...]) -> dict[str, str]:
    found = {name: folder / f"{name}.png" for name in names if (folder / f"{name}.png").exists()}
    return {name: _png_uri(path.read_bytes()) for name, path in found.items()}


def _plots(path: Path) -> dict[str, str]:
    from evals.presentation import curve_plot

    rows = read_metrics_log(path) if path.exists() else []
    plots = {
        "fit_loss": curve_plot(rows, "fit", ["loss"], "mean squared error", logarithmic=True),
        "fit_psnr": curve_plot(rows, "fit", ["psnr_train", "psnr_heldout"], "PSNR of the encoder, dB"),
        "prior_loss": curve_plot(
            rows, "prior", ["validation_loss_train", "validation_loss"], "denoising loss", logarithmic=True
        ),
    }
    return {name: _png_uri(plot) for name, plot in plots.items() if plot is not None}


def _sizes(model: Path, bundle: Path) -> list[tuple[str, float]]:
    """Files of weights and graphs with their sizes in kB (10³ bytes)."""
    files = [*model.rglob("*.safetensors"), *bundle.rglob("*.onnx")]
    return [(str(path.relative_to(model.parent)), path.stat().st_size / 1e3) for path in sorted(files)]


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "machine": f"{platform.machine()}, {platform.system()}"}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


class Commanded(msgspec.Struct):
    """A file that says by which command it was made."""

    command: str = ""


def _commands(run: Path, samples: Path, bundle: Path, evaluation: Path) -> list[str]:
    record = read_run_record(run)
    commands = [record[stage].command for stage in ("fit", "prior") if stage in record]
    for path in (samples / "metrics.json", bundle / "manifest.json", evaluation / "metrics.json"):
        if path.exists():
            commands.append(read_json(path, Commanded).command)
    return [*filter(None, commands), command_line()]


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return _png_uri(buffer.getvalue())


def _png_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()
