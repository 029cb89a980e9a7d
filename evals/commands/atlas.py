"""`mnif atlas`: one self-contained HTML page that shows what each basis does, and which of them make an instance."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from latent_prior.settings import INFERENCE_STEPS
from mnif.utils.args import parse_arguments
from mnif.utils.devices import DeviceFlags, chosen_device
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import check_writable, write_json, written_atomically
from mnif.utils.model_folders import is_trained_model
from mnif.utils.process import command_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from evals.atlas.measured import Atlas
    from latent_prior.pipeline import MNIFPipeline
    from mnif.latents.table import LatentTable
    from mnif.models.mnif_model import MNIFModel

_SMALLEST = 2  # bases, of which one is compared with others


@dataclass(kw_only=True)
class InputsFlags:
    """What is explained."""

    run: Path | None = None
    """A folder with latents of this model, as `mnif fit` and `mnif encode` write them; default: the one around it."""
    data: str | None = None
    """The data set that those latents are of; default: the one they say they came from."""


@dataclass(kw_only=True)
class ShownFlags:
    """How much is shown."""

    num_instances: int = 12
    """Instances that are explained, held-out ones if there are any."""
    num_samples: int = 6
    """Samples that are explained, if the model has a prior."""
    num_bases: int = 400
    """Bases that are shown at most, from the most important one on."""
    baseline: Literal["average", "zero"] = "average"
    """What a basis that is taken away leaves: the coefficient of the average instance, or zero."""
    seed: int = 0
    """Of the samples."""
    num_inference_steps: int = INFERENCE_STEPS
    """Denoising steps of the samples."""


@dataclass(kw_only=True)
class AtlasArguments(InputsFlags, ShownFlags, DeviceFlags):
    """Write one self-contained HTML page that shows what each basis of a model does, and explains instances."""

    model: Path
    """The model folder, RUN/model."""
    output_dir: Path | None = None
    """Gets atlas.html and its figures, atlas.json; default: the folder around the model."""


def main(arguments: list[str]) -> None:
    """Runs `mnif atlas`."""
    atlas(parse_arguments(AtlasArguments, arguments, "mnif atlas"))


def atlas(arguments: AtlasArguments) -> None:
    """Writes the page and the figures.

    Raises:
        UserError: the model or its latents are missing, or belong to different decoders, the data are not theirs, or a
            flag is out of range.
    """
    _check(arguments)
    if arguments.output_dir is not None:
        check_writable(arguments.output_dir)

    from evals.atlas.contents import contents, drawn_plates, figures
    from evals.atlas.measured import measured_atlas
    from evals.report.provenance import provenance
    from evals.report.templates import rendered
    from latent_prior.hub import model_folder
    from mnif.signals.registry import signal_of_model

    device = chosen_device(arguments.device)
    model = model_folder(arguments.model)
    output = _output_of(arguments, model)
    decoder, pipeline = _loaded(model, device)
    table = _table(arguments, model, decoder)
    signal = signal_of_model(decoder)
    data = signal.load_like(arguments.data or table.data)
    samples = _samples(arguments, pipeline, table)
    measured = measured_atlas(decoder, signal, table, data, samples, arguments.num_instances, arguments.baseline)
    plates, subjects = drawn_plates(measured, arguments.num_bases)
    found = {"command": command_line(), "baseline": arguments.baseline, **figures(measured)}
    page = rendered(
        "atlas.html.jinja",
        "evals.atlas",
        title=_title(arguments, model),
        signal=signal,
        config=decoder.config,
        facts=_facts(measured, arguments, table),
        figures=found,
        charts=_charts(measured),
        provenance=provenance(),
        **contents(measured, plates, subjects),
    )
    with written_atomically(output / "atlas.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    write_json(output / "atlas.json", found)
    _tell(found, output, len(page))


def _check(arguments: AtlasArguments) -> None:
    check_at_least(0, seed=arguments.seed, num_samples=arguments.num_samples)
    shown = {name: getattr(arguments, name) for name in ("num_instances", "num_bases", "num_inference_steps")}
    check_at_least(1, **shown)


def _stands_in_a_run(arguments: AtlasArguments, model: Path) -> bool:
    """Whether the folder around a model is the user's: that of a model of the hub or of the package is not."""
    return arguments.model.exists() and not is_trained_model(model)


def _output_of(arguments: AtlasArguments, model: Path) -> Path:
    """The folder of the page, if it can be written."""
    if arguments.output_dir is None and model.is_dir() and not _stands_in_a_run(arguments, model):
        raise UserError(f"--model {arguments.model}: it stands in no run; give --output_dir too")
    output = arguments.output_dir or model.parent
    check_writable(output)
    return output


def _title(arguments: AtlasArguments, model: Path) -> str:
    return model.resolve().parent.name if _stands_in_a_run(arguments, model) else model.name


def _loaded(model: Path, device: torch.device) -> tuple[MNIFModel, MNIFPipeline | None]:
    """The decoder, and the pipeline if there is a prior, on a device."""
    from latent_prior.pipeline import load_pipeline
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel

    pipeline = load_pipeline(model) if (model / "denoiser").is_dir() else None
    decoder = load_component(MNIFModel, model, "decoder") if pipeline is None else pipeline.decoder
    if decoder.config.num_bases < _SMALLEST:
        raise UserError(f"{model}: it has one basis, which nothing can be compared with")
    for network in (decoder, pipeline):
        if network is not None:
            network.to(device)
    return decoder.eval().requires_grad_(False), pipeline


def _table(arguments: AtlasArguments, model: Path, decoder: MNIFModel) -> LatentTable:
    from mnif.latents.table import LatentTable

    path = (arguments.run or model.parent) / "latents.safetensors"
    if arguments.run is None and not path.is_file():
        raise UserError(
            f"{path}: no latents beside the model; give --run, a folder with those of its data, which "
            f"`mnif encode --model {model} --data DATA --output_dir FOLDER` finds"
        )
    return LatentTable.load_for(decoder, path)


def _samples(arguments: AtlasArguments, pipeline: MNIFPipeline | None, table: LatentTable) -> Tensor:
    """The latents of samples, [n, D]; none without a prior."""
    from latent_prior.sampling import sample_latents

    if pipeline is None or not arguments.num_samples:
        return table.latents[:0]
    pipeline.set_progress_bar_config(disable=True)
    return sample_latents(pipeline, arguments.seed, range(arguments.num_samples), arguments.num_inference_steps)


def _facts(measured: Atlas, arguments: AtlasArguments, table: LatentTable) -> dict[str, Any]:
    """What the page says of the model and of how it was looked at."""
    decoder = measured.mixture.decoder
    cells, layers, bases = measured.mixture.baseline.shape
    return {
        "data": arguments.data or table.data,
        "known": len(table.ids),
        "measured_on": len(measured.ids),
        "cells": cells,
        "layers": layers,
        "field_layers": len(decoder.shapes),
        "mixed": len(decoder.bases),
        "bases": layers * bases,
        "per_layer": bases,
        "coefficients": cells * layers * bases,
        "named": measured.named,
        "named_bases": measured.named_bases,
        "baseline": arguments.baseline,
        "sparse": bool(measured.usage.active.min() < 1),
        "seed": arguments.seed,
    }


def _charts(measured: Atlas) -> dict[str, Any]:
    from evals.atlas.contents import removal_curves
    from evals.atlas.measured import basis_names
    from evals.charts import importance_chart, removal_chart
    from evals.report.templates import as_svgs

    layers = defaultdict(list)
    for layer, share in zip(basis_names(measured.mixture.decoder)[1], measured.importance.tolist(), strict=True):
        layers[layer].append(100 * share)
    removal = removal_chart(*removal_curves(measured.of_parts), "coefficients taken away, %")
    charts = as_svgs({"importance": importance_chart(layers), "removal": removal})
    return {**charts, "layers": {name: sum(shares) for name, shares in layers.items()}}


def _tell(found: dict[str, Any], output: Path, size: int) -> None:
    named = {"coefficients": "coefficients", "bases_in_all_cells": "bases in all cells"}
    for key, words in named.items():
        test = found[key]
        ratios = " and ".join(
            "∞" if test[ratio] is None else f"{test[ratio]:.1f}" for ratio in ("ratio_random", "ratio_same_sum")
        )
        print(
            f"the strongest {test['removed']} of {test['of']:,} {words}: the error rises {ratios} times as much as "
            "without as many others, and as large others"
        )
    print(f"{output / 'atlas.html'}: {size / 1e6:.1f} MB")
