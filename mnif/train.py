"""`mnif fit`: learns the bases and one latent per instance (stage one)."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ModelMixin
from torch import Tensor

from mnif.checkpoints import newest_checkpoint
from mnif.data import Instances, Split
from mnif.errors import UserError
from mnif.estimate import estimate_lines
from mnif.files import merge_json
from mnif.fit_arguments import AUGMENTATIONS, FitArguments, parse_fit_arguments
from mnif.fitting import AmortisedFitting, AutoDecoding, Fitting, MetaLearning
from mnif.inner_loop import InnerLoop
from mnif.latent_rows import LatentRows
from mnif.latents import LatentTable
from mnif.model_folder import load_component, save_component
from mnif.modeling import MNIFModel
from mnif.muon import Muon
from mnif.output_folders import check_output_folder
from mnif.pca import pca_figures
from mnif.pictures import picture_grid, save_picture
from mnif.refinement import figures_of, latents_of
from mnif.rows import Rows, rows_of
from mnif.runs import begin_stage, finish_stage, peak_memory_megabytes
from mnif.signal_table import signal_class
from mnif.signals import GridSignal, Observation, Signal
from mnif.training import batch_size_of, make_accelerator, train

DECODER_SETTINGS = (
    "num_bases",
    "width",
    "depth",
    "cells",
    "overlap",
    "omega",
    "mixing",
    "coefficient_form",
    "output_sine",
)
"""The flags that the decoder is made with."""

_PROBES = 512  # instances of each side that a validation looks at


def main(arguments: list[str]) -> None:
    """Runs `mnif fit`."""
    fit(parse_fit_arguments(arguments))


def fit(arguments: FitArguments) -> None:
    """Trains stage one into ``arguments.output_dir``.

    Raises:
        UserError: the data cannot be read, the folder is another command's or holds another run, or training diverges.
    """
    started = time.perf_counter()
    if not arguments.dry_run:
        check_output_folder(arguments.output_dir, "fit")
    kind = signal_class(arguments.signal)
    data = kind.load(arguments.data, asdict(arguments))
    signal = kind.of(data, asdict(arguments))
    sides = data.split(arguments.held_out_fraction, arguments.test_fraction)
    if not (sides == Split.TRAIN).any():
        raise UserError(f"--data {arguments.data}: no {signal.unit} is left to train on; lower --held_out_fraction")
    train_data = data.rows(sides == Split.TRAIN)
    if arguments.num_train_epochs is not None:
        per_epoch = max(len(train_data) // min(arguments.train_batch_size, len(train_data)), 1)
        arguments.max_train_steps = arguments.num_train_epochs * per_epoch
    _augmentations(arguments, signal)
    if arguments.dry_run:
        decoder = make_decoder(arguments, signal)
        print("\n".join(estimate_lines(arguments, decoder, signal, len(train_data))))
        return
    run = arguments.output_dir
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "fit", arguments, {"data_fingerprint": data.fingerprint()}):
        print(f"{run}: `mnif fit` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    decoder = make_decoder(arguments, signal)
    fitting = make_fitting(arguments, decoder, signal, len(train_data), accelerator).to(accelerator.device)
    rows = rows_of(train_data.arrays())
    held_rows = rows_of(data.rows(sides == Split.HELD_OUT).arrays())
    accelerator.print(
        f"{arguments.data}: {len(rows)} {signal.unit}s to train, {len(held_rows)} held out, "
        f"{(sides == Split.TEST).sum()} kept for a test; decoder {decoder.num_parameters():,} parameters"
    )
    probes = {"psnr_train": _probe(rows, fitting, accelerator)}
    if not isinstance(fitting, AutoDecoding) and len(held_rows):
        probes["psnr_heldout"] = _probe(held_rows, fitting, accelerator)

    def validate() -> dict[str, float]:
        return {name: _mean_psnr(fitting, probe, accelerator) for name, probe in probes.items()}

    latent_rows = fitting.rows if isinstance(fitting, AutoDecoding) else None
    optimizers = make_optimizers(arguments, fitting)
    train(accelerator, arguments, fitting, optimizers, rows, run, "fit", validate, latent_rows=latent_rows)
    if accelerator.is_main_process:
        _finish(arguments, data, sides, rows, held_rows, fitting.to("cpu").eval(), time.perf_counter() - started)


def make_decoder(arguments: FitArguments, signal: Signal) -> MNIFModel:
    """The bases, freshly drawn."""
    return MNIFModel(
        channels=signal.channels,
        dimensions=signal.dimensions,
        resolution=signal.grid_resolution,
        latent_dim=None if arguments.coefficient_form == "direct" else arguments.latent_dim,
        signal=signal.name,
        signal_settings=signal.settings(),
        **{name: getattr(arguments, name) for name in DECODER_SETTINGS},
    )


def make_fitting(
    arguments: FitArguments, decoder: MNIFModel, signal: Signal, instances: int, accelerator: Accelerator | None = None
) -> Fitting:
    """The way of learning that ``arguments.method`` names, for ``instances`` rows."""
    latent_dim = decoder.config.latent_dim
    if arguments.method == "encoder":
        encoder = signal.encoder(latent_dim, arguments.encoder_width)
        return AmortisedFitting(decoder, signal, encoder, arguments.latent_noise, _augmentations(arguments, signal))
    if arguments.method == "meta":
        inner_loop = InnerLoop(latent_dim, arguments.inner_steps, arguments.inner_learning_rate)
        return MetaLearning(decoder, signal, inner_loop, arguments.inner_order == "second")
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    latent_rows = LatentRows(
        instances,
        latent_dim,
        batch_size_of(arguments, instances, processes),
        arguments.latent_learning_rate,
        arguments.seed,
        process,
        processes,
        accelerator.device if accelerator else "cpu",
    )
    return AutoDecoding(decoder, signal, latent_rows, arguments.latent_regularisation)


def _augmentations(arguments: FitArguments, signal: Signal) -> list[Callable[[Observation], Observation]]:
    """What the flags ask for.

    Raises:
        UserError: the signal cannot be changed so.
    """
    known, asked = signal.augmentations(), [flag for flag in AUGMENTATIONS if getattr(arguments, flag)]
    for flag in asked:
        if flag not in known:
            raise UserError(f"--{flag}: {signal.unit}s of this kind cannot be changed so; leave it out")
    return [known[flag] for flag in asked]


def make_optimizers(arguments: FitArguments, fitting: Fitting) -> list[torch.optim.Optimizer]:
    """Adam with a rate for the bases and one for everything else; Muon in its place for narrow matrices."""
    decoder = fitting.decoder
    fields = [*decoder.shared, *decoder.means, *decoder.bases]
    groups = [{"params": fields, "lr": arguments.basis_learning_rate}]
    others = fitting.others()
    if decoder.coefficient_map is not None:
        others += decoder.coefficient_map.parameters()
    by_muon = [parameter for parameter in others if arguments.matrix_optimizer == "muon" and _is_narrow(parameter)]
    chosen = {id(parameter) for parameter in by_muon}
    by_adam = [parameter for parameter in others if id(parameter) not in chosen]
    if by_adam:
        groups.append({"params": by_adam, "lr": arguments.learning_rate})
    adam = torch.optim.AdamW(groups, betas=(0.9, arguments.adam_beta2), weight_decay=0.0, fused=True)
    return [adam, Muon(by_muon, arguments.learning_rate)] if by_muon else [adam]


def _is_narrow(parameter: Tensor) -> bool:
    """Whether it is a matrix that Muon moves in no time; the cost is the cube of the shorter side."""
    return parameter.ndim == 2 and min(parameter.shape) <= 256


def _probe(rows: Rows, fitting: Fitting, accelerator: Accelerator) -> Rows:
    """This process's share of the instances a validation looks at, evenly spread over all of them."""
    index = torch.linspace(0, len(rows) - 1, min(len(rows), _PROBES)).long()
    if isinstance(fitting, AutoDecoding):
        return rows.subset(index[fitting.rows.owns(index)].numpy())
    return rows.subset(index[accelerator.process_index :: accelerator.num_processes].numpy())


@torch.no_grad()
def _mean_psnr(fitting: Fitting, rows: Rows, accelerator: Accelerator) -> float:
    """Mean PSNR in dB of instances with the latents that are found for them now, over all processes."""
    total_and_count = torch.zeros(2, device=accelerator.device)
    for batch in rows.batches(64, accelerator.device) if len(rows) else ():
        latents = fitting.latents(fitting.signal.observe(batch), batch["row"])
        values = fitting.signal.figures(fitting.decoder, latents, batch)["psnr"]
        total_and_count += torch.stack([values.sum(), values.new_tensor(len(values))])
    total, count = accelerator.reduce(total_and_count, "sum").tolist()
    return total / count


def _finish(
    arguments: FitArguments,
    data: Instances,
    sides: np.ndarray,
    train_rows: Rows,
    held_rows: Rows,
    fitting: Fitting,
    seconds: float,
) -> None:
    """Writes model, latent table, figures and a picture of reconstructions."""
    run, decoder, signal = arguments.output_dir, fitting.decoder, fitting.signal
    started = time.perf_counter()
    held, train_side = sides == Split.HELD_OUT, sides == Split.TRAIN
    finder = save_model(arguments, fitting)
    # Through the file and back, so that the fingerprint is that of what later commands will load.
    decoder = load_component(MNIFModel, run / "model", "decoder")

    figures: dict[str, float] = {}
    if isinstance(fitting, AutoDecoding):
        of_train = fitting.rows.read_all(newest_checkpoint(run / "checkpoints" / "fit"))
    else:
        of_train = torch.cat([*latents_of(decoder, signal, train_rows, finder, 0)])
    of_held = refined = of_train[:0]
    if held.any():
        steps = arguments.refinement_steps
        of_held = refined = torch.cat([*latents_of(decoder, signal, held_rows, finder, steps, progress=True)])
        if finder is not None:
            of_held = torch.cat([*latents_of(decoder, signal, held_rows, finder, 0)])
            figures |= _means(figures_of(decoder, signal, held_rows, of_held), f"heldout_{arguments.method}")
        figures |= _means(figures_of(decoder, signal, held_rows, refined), "heldout")
    figures |= _means(figures_of(decoder, signal, train_rows, of_train), "train")
    if isinstance(signal, GridSignal):
        figures |= pca_figures(signal, train_rows, held_rows, decoder.config.latent_dim)

    kept = train_side | held
    held_out = torch.from_numpy(held[kept])
    latents = torch.empty(len(held_out), decoder.config.latent_dim)
    latents[~held_out], latents[held_out] = of_train, of_held
    ids = [id for id, keep in zip(data.ids, kept.tolist(), strict=True) if keep]
    table = LatentTable(latents, ids, held_out, decoder.fingerprint(), data.name)
    table.save(run / "latents.safetensors")
    shown = (held_rows, of_held, refined) if held.any() else (train_rows, of_train, of_train)
    _save_reconstructions(run, decoder, signal, *shown)
    field = decoder.bake(decoder.coefficients(latents[:1]))
    merge_json(
        run / "metrics.json",
        figures
        | {
            "seconds": round(seconds + time.perf_counter() - started, 1),
            "peak_rss_mb": peak_memory_megabytes(),
            "decoder_parameters": decoder.num_parameters(),
            "field_parameters": field.parameters_per_field(),
            "fields_per_instance": decoder.config.cells**decoder.config.dimensions,
            "multiply_adds_per_value": field.multiply_adds_per_point(),
        },
    )
    finish_stage(run, "fit")
    shown_figures = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    print(f"{run / 'model'}: {shown_figures}")


def save_model(arguments: FitArguments, fitting: Fitting) -> Any:
    """Writes decoder and whatever finds latents to the model folder; gives the latter, or None."""
    model = arguments.output_dir / "model"
    save_component(model, "decoder", fitting.decoder)
    finder = getattr(fitting, "encoder", None) or getattr(fitting, "inner_loop", None)
    if isinstance(finder, ModelMixin):
        save_component(model, "inner_loop" if isinstance(finder, InnerLoop) else "encoder", finder)
    return finder


def _means(figures: dict[str, Tensor], part: str) -> dict[str, float]:
    """Means over instances, named figure_part; what does not exist for any instance is left out."""
    means = {f"{name}_{part}": values.double().mean().item() for name, values in figures.items()}
    return {name: value for name, value in means.items() if math.isfinite(value)}


@torch.no_grad()
def _save_reconstructions(
    run: Any, decoder: MNIFModel, signal: Signal, rows: Rows, latents: Tensor, refined: Tensor
) -> None:
    """Rows of originals, of what the first latents show, and of what refined ones show."""
    pick = np.linspace(0, len(rows) - 1, min(16, len(rows))).astype(int)
    (batch,) = rows.subset(pick).batches(len(pick))
    pictures = [
        signal.original_pictures(batch),
        signal.reconstructed_pictures(decoder, latents[pick], batch),
        signal.reconstructed_pictures(decoder, refined[pick], batch),
    ]
    scale = max(1, 64 // pictures[0].shape[1])
    sheet = picture_grid(np.concatenate(pictures), columns=len(pick), scale=scale)
    save_picture(run / "samples" / "reconstructions.png", sheet)
