"""`mnif report`: one self-contained HTML page that shows a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from export.device.bundle import BundleError, BundleFolder
from latent_prior.settings import INFERENCE_STEPS
from mnif.training.run_record import read_metrics_log
from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import check_writable, written_atomically
from mnif.utils.json_files import check_type, read_object

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from latent_prior.pipeline import MNIFPipeline

_COMPARED = 2  # samples that are shown at several resolutions


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
    """The output of `mnif sample`, whose command is named; default: RUN/pictures."""


@dataclass(kw_only=True)
class SamplesFlags:
    """What is drawn for the page."""

    seed: int = 0
    """Of the samples drawn for the page."""
    num_inference_steps: int = INFERENCE_STEPS
    """Denoising steps of the samples drawn for the page."""


@dataclass(kw_only=True)
class ReportArguments(InputsFlags, SamplesFlags):
    """Write one self-contained HTML page that shows a run: samples, what is good and bad, charts, commands."""

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
        UserError: the run folder lacks a stage, the bundle is unfinished or was changed, or a flag is out of range.
    """
    import torch

    from evals.report.provenance import commands_of, provenance
    from evals.report.templates import rendered
    from latent_prior.pipeline import load_pipeline

    run, output = arguments.run, _output_of(arguments)
    check_at_least(0, seed=arguments.seed)
    check_at_least(1, num_inference_steps=arguments.num_inference_steps)
    pipeline = load_pipeline(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    bundle = arguments.bundle or run / "bundle"
    manifest = _manifest_of(bundle) if (bundle / "manifest.json").exists() else None
    evaluation = arguments.eval_dir or run / "eval"
    samples = arguments.samples or run / "pictures"
    page = rendered(
        "report.html.jinja",
        title=run.resolve().name,
        seed=arguments.seed,
        steps=arguments.num_inference_steps,
        **_shown(pipeline, arguments),
        **_measured(pipeline, arguments, manifest),
        commands=commands_of(run, samples / "metrics.json", bundle / "manifest.json", evaluation / "metrics.json"),
        sizes=_sizes(run / "model", bundle),
        atlas=os.path.relpath(run / "atlas.html", output.parent) if (run / "atlas.html").is_file() else None,
        provenance=provenance(),
        threads=torch.get_num_threads(),
    )
    with written_atomically(output) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(f"{output}: {len(page) / 1e6:.1f} MB")


def _output_of(arguments: ReportArguments) -> Path:
    """The page, if there is a run and the page can be written."""
    run, output = arguments.run, arguments.output or arguments.run / "report.html"
    if not (run / "run.json").is_file():
        raise UserError(f"--run {run}: no run folder; `mnif fit --output_dir {run}` makes it")
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; name a file")
    check_writable(output.parent)
    return output


class PriorFigures(msgspec.Struct):
    """What `mnif prior` adds to a run's ``metrics.json``."""

    denoiser_parameters: int
    seconds: float
    peak_rss_mb: float | None = None


class DistillFigures(msgspec.Struct):
    """What `mnif distill` adds to a run's ``metrics.json``."""

    student_parameters: int
    energy_distance: dict[str, float]
    seconds: float
    peak_rss_mb: float | None = None


class RunFigures(msgspec.Struct):
    """What the page shows of a run's ``metrics.json``."""

    decoder_parameters: int
    fields_per_instance: int
    field_parameters: int
    seconds: float
    prior: PriorFigures
    distill: DistillFigures | None = None
    peak_rss_mb: float | None = None
    psnr_train: float | None = None
    psnr_heldout: float | None = None
    psnr_pca_heldout: float | None = None
    iou_heldout: float | None = None
    iou_pca_heldout: float | None = None


class ComparedEvaluation(msgspec.Struct):
    """A column of a ``comparison.json``."""

    name: str
    figures: dict[str, Any]


class Comparison(msgspec.Struct):
    """A ``comparison.json``."""

    evaluations: list[ComparedEvaluation] = []


def _shown(pipeline: MNIFPipeline, arguments: ReportArguments) -> dict[str, Any]:
    """Draws the page's pictures, and takes in those that other commands left."""
    import torch

    from evals.loaded_run import latent_table_of
    from evals.report.embedded import file_uri, gallery, lossless_uri
    from evals.report.exhibits import drawn_exhibits, easel_of

    run, seed, steps = arguments.run, arguments.seed, arguments.num_inference_steps
    easel = easel_of(pipeline.decoder)
    table = latent_table_of(run / "model", pipeline.decoder)
    exhibits = drawn_exhibits(pipeline, easel, table, seed, steps)
    compared = sorted(exhibits, key=lambda exhibit: exhibit.is_empty)[:_COMPARED]
    with torch.no_grad():
        resolutions = easel.resolutions(torch.cat([exhibit.latent for exhibit in compared]))
    evaluation = arguments.eval_dir or run / "eval"
    stored = ("reconstructions_train", "reconstructions_heldout", "nearest")
    files = {name: evaluation / f"{name}.png" for name in stored}
    return {
        "signal": easel.signal,
        "data": table.data if table is not None else "",
        "instances": len(table.ids) if table is not None else 0,
        "gallery": gallery(exhibits),
        "compared_samples": [exhibit.number for exhibit in compared],
        "resolutions": {
            name: {"uris": [*map(lossless_uri, some)], "width": some.shape[2], "height": some.shape[1]}
            for name, some in resolutions.items()
        },
        "pictures": {name: file_uri(path) for name, path in files.items() if path.exists()},
    }


def _measured(pipeline: MNIFPipeline, arguments: ReportArguments, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Reads what commands measured, measures latencies, and says what it means."""
    from evals.charts import comparison_chart, steps_chart
    from evals.presentation import EvaluationFile, check_metrics, protocol_line, read_evaluation, table_rows
    from evals.report.findings import findings_of
    from evals.report.templates import as_svgs
    from evals.timing import measured_latencies
    from mnif.signals.registry import signal_of_model

    run, bundle = arguments.run, arguments.bundle or arguments.run / "bundle"
    evaluation = (arguments.eval_dir or run / "eval") / "metrics.json"
    compared = (arguments.comparison_dir or run / "comparison") / "comparison.json"
    figures = read_object(run / "metrics.json", RunFigures)
    metrics = read_evaluation(evaluation) if evaluation.exists() else {}
    comparison = read_object(compared, Comparison) if compared.exists() else {}
    columns = {one["name"]: one["figures"] for one in comparison.get("evaluations", [])}
    for name, column in columns.items():
        check_type(column, EvaluationFile, f"{compared}: {name}")
        check_metrics(column, f"{compared}: {name}")
    distances = (figures.get("distill") or {}).get("energy_distance", {})
    steps = _steps_of(manifest, arguments.num_inference_steps)
    latencies = measured_latencies(pipeline, bundle if manifest else None, steps)
    log = run / "metrics.jsonl"
    noun = signal_of_model(pipeline.decoder).noun
    return {
        "fit": figures,
        "metrics": metrics,
        "rows": table_rows([metrics]),
        "protocol": protocol_line(metrics.get("protocol", {})),
        "compared": list(columns),
        "compared_rows": table_rows(list(columns.values())),
        "findings": findings_of(_present({**figures, **metrics}), distances, latencies, noun),
        "latencies": latencies,
        "charts": as_svgs(
            {
                **_curves(read_metrics_log(log) if log.exists() else []),
                "steps": steps_chart(distances),
                "costs": comparison_chart(columns),
            }
        ),
    }


def _present(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if value is not None}


def _curves(rows: list[dict[str, Any]]) -> dict[str, Figure | None]:
    from evals.charts import curve_chart
    from mnif.training.run_record import STAGE_ONE

    learned = {row["stage"] for row in rows}
    stage = next((name for name in STAGE_ONE if name in learned), "fit")
    return {
        "fit_loss": curve_chart(rows, stage, ["loss"], "mean squared error", logarithmic=True),
        "fit_psnr": curve_chart(rows, stage, ["psnr_train", "psnr_heldout"], "PSNR of the encoder, dB"),
        "prior_loss": curve_chart(
            rows, "prior", ["validation_loss_train", "validation_loss"], "denoising loss", logarithmic=True
        ),
        "student_loss": curve_chart(
            rows, "distill", ["validation_loss_train", "validation_loss"], "error on pairs", logarithmic=True
        ),
    }


def _manifest_of(bundle: Path) -> dict[str, Any]:
    try:
        return BundleFolder(bundle).manifest
    except BundleError as error:
        raise UserError(str(error)) from None


def _steps_of(manifest: dict[str, Any] | None, steps: int) -> int:
    """Those of the sampler that :class:`export.device.runtime.Sampler` takes: the most the bundle has."""
    return max(manifest["sampling"]["num_inference_steps"]) if manifest else steps


def _sizes(model: Path, bundle: Path) -> list[tuple[str, float]]:
    """Files of weights and graphs with their sizes in kB (10³ bytes)."""
    files = [*model.rglob("*.safetensors"), *bundle.rglob("*.onnx")]
    return [(str(path.relative_to(model.parent)), path.stat().st_size / 1e3) for path in sorted(files)]
