"""`mnif grow`: adds bases to a model for new data, and leaves what it knows as it is."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mnif.data.dataset import Dataset, Split
from mnif.training.arguments import TrainingArguments
from mnif.training.assembly import check_loss, learn, make_method
from mnif.training.fit_arguments import (
    AUGMENTATIONS,
    FitArguments,
    MethodFlags,
    OptimizerFlags,
    defaults_of_signal,
)
from mnif.training.run_record import begin_stage, finish_stage
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import check_writable, sha256_of_file, sha256_of_folder
from mnif.utils.flag_files import laid_over
from mnif.utils.json_files import merge_json
from mnif.utils.output_folders import holds_folder
from mnif.utils.pixels import MAX_IMAGE_PIXELS, limit_image_pixels

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator

    from mnif.latents.inference import LatentInit
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.base import Signal
    from mnif.training.replay import Replay

_MEASURED = 512  # new instances that the old model is measured on, at most


@dataclass(kw_only=True)
class DataFlags:
    """What is learned from."""

    held_out_fraction: float = 0.1
    """As in `mnif fit`."""
    test_fraction: float = 0.05
    """As in `mnif fit`."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels that a picture file may have; larger ones stop the run."""


@dataclass(kw_only=True)
class GrowthFlags:
    """What is added, and whether what there was may move."""

    add_bases: int = 32
    """Further basis networks per layer."""
    add_latents: int = 32
    """Further numbers in a latent, shared out among tokens where it has any (direct coefficients have their own)."""
    replay: bool = False
    """Let the old bases move slowly, and learn the old latents' fields again beside the new data."""
    replay_weight: float = 1.0
    """Of the old fields' squared error in the loss (--replay); 0 lets them be forgotten."""
    earlier_learning_rate: float = 0.1
    """Multiplies the learning rates of old bases and their map (--replay)."""


@dataclass(kw_only=True)
class GrowArguments(DataFlags, GrowthFlags, MethodFlags, OptimizerFlags, TrainingArguments):
    """Add bases to a model for new data; old latents decode to the same bytes. The same command again continues."""

    model: Path
    """The old model folder, RUN/model."""
    data: str
    """New data of the kind that the model was trained on."""
    output_dir: Path
    """The run folder of the grown model."""
    method: Literal["auto", "encoder", "auto-decoding", "meta"] = "auto"
    """How latents are found; auto: as the old model does it, whose encoder or inner loop learns on."""

    max_train_steps: int = 2500
    """Optimizer steps; given here, they win over the epochs of a preset."""
    learning_rate: float = 4e-3
    """Peak learning rate of all but bases and latents."""


def parse_grow_arguments(arguments: list[str]) -> GrowArguments:
    """Reads the flags over those that `mnif fit` has for models of this signal.

    Raises:
        UserError: a flag cannot be understood, nothing can be written to the output, or the model cannot be read.
    """
    given = parse_given(GrowArguments, arguments, "mnif grow")
    check_writable(given["output_dir"])  # before the model is read

    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel

    signal = load_component(MNIFModel, given["model"], "decoder").config.signal
    return GrowArguments(**laid_over(defaults_of_signal(GrowArguments, signal), given))


def main(arguments: list[str]) -> None:
    """Runs `mnif grow`."""
    grow(parse_grow_arguments(arguments))


def _check(arguments: GrowArguments) -> None:
    values = asdict(arguments)
    if arguments.add_bases < 1:
        raise UserError(f"--add_bases {arguments.add_bases}: nothing to grow; at least 1 is needed")
    at_least_one = ("add_latents", "max_train_steps", "num_train_epochs", "train_batch_size", "inner_steps")
    check_at_least(1, **{flag: values[flag] for flag in (*at_least_one, "encoder_width", "max_image_pixels")})
    not_negative = ("refinement_steps", "latent_noise", "gradient_weight", "replay_weight", "earlier_learning_rate")
    check_at_least(0, **{flag: values[flag] for flag in not_negative})
    if not 0 <= arguments.held_out_fraction < 1:
        raise UserError(f"--held_out_fraction {arguments.held_out_fraction}: must be at least 0 and below 1")


@holds_folder("output_dir", "grow")
def grow(arguments: GrowArguments) -> None:
    """Trains the next generation of ``arguments.model`` into ``arguments.output_dir``.

    Raises:
        UserError: the model or the data cannot be read or do not fit each other, there is nothing to grow or to
            replay, the folder is another command's or holds another run, or training diverges.
    """
    from accelerate.utils import set_seed

    from mnif.latents.inference import load_latent_init
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.registry import signal_of_model
    from mnif.training.inheritance import keep_inheritance
    from mnif.training.loader import fill_in_steps
    from mnif.training.loop import check_machine, make_accelerator

    started = time.perf_counter()
    _check(arguments)
    check_machine(arguments)
    limit_image_pixels(arguments.max_image_pixels)
    old = load_component(MNIFModel, arguments.model, "decoder")
    signal = signal_of_model(old)
    latent_init = load_latent_init(arguments.model, old, signal)
    fit = _as_fit(arguments, old, signal, latent_init)
    check_loss(fit, signal)
    data = _data_like(arguments.data, signal)
    splits = data.split(arguments.held_out_fraction, arguments.test_fraction)
    instances = int((splits == Split.TRAIN).sum())
    if not instances:
        raise UserError(f"--data {arguments.data}: no {signal.noun} is left to train on; lower --held_out_fraction")
    fill_in_steps(arguments, instances)
    fit.max_train_steps, run = arguments.max_train_steps, arguments.output_dir
    inputs = _inputs(arguments, old, data)
    _grown(arguments, old)  # in time: nothing has been written yet
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "grow", arguments, inputs):
        print(f"{run}: `mnif grow` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    metrics = _train(arguments, fit, accelerator, old, latent_init, data, splits)
    if accelerator.is_main_process:
        keep_inheritance(arguments.model, run, inputs["parent_fingerprint"])
        merge_json(run / "metrics.json", metrics | {"seconds": round(time.perf_counter() - started, 1)})
        finish_stage(run, "grow")


def _as_fit(arguments: GrowArguments, old: MNIFModel, signal: Signal, latent_init: LatentInit) -> FitArguments:
    """The flags as `mnif fit` takes them, with the way of learning that "auto" stands for.

    Raises:
        UserError: the way of learning does not go with the model.
    """
    method = arguments.method
    if method == "auto":
        method = _method_of(latent_init)
    if method == "encoder" and old.config.tokens is not None and signal.token_encoder_class is None:
        reason = f"a {signal.noun} of this kind has no encoder for tokens"
        raise UserError(f"--method encoder: {reason}; take --method auto-decoding or meta")
    shared = {field.name for field in fields(FitArguments)} & {field.name for field in fields(GrowArguments)}
    values = {name: getattr(arguments, name) for name in shared}
    for flag in AUGMENTATIONS:
        if values[flag] and method != "encoder":
            raise UserError(f"--{flag} needs --method encoder: otherwise an instance has one latent, not several")
    return FitArguments(**values | {"method": method, "signal": signal.name})


def _data_like(source: str, signal: Signal) -> Dataset:
    """Reads data in the form that the model was trained on.

    Raises:
        UserError: they are of another signal, or cannot be read so.
    """
    from mnif.signals.registry import detect_signal

    found = detect_signal(source)
    if found != signal.name and source != "furniture-views":  # whose views can be read as pictures too
        raise UserError(f"--data {source}: {found}; the model was trained on {signal.name}, and grows by that alone")
    return signal.load_like(source)


def _inputs(arguments: GrowArguments, old: MNIFModel, data: Dataset) -> dict[str, str]:
    """Fingerprints of all that the grown model depends on.

    Raises:
        UserError: there is nothing to replay.
    """
    inputs = {"parent_fingerprint": old.fingerprint(), "data_fingerprint": data.fingerprint()}
    for name in ("encoder", "inner_loop"):
        if (arguments.model / name).is_dir():
            inputs[name] = sha256_of_folder(arguments.model / name)
    if arguments.replay:
        for number, table in enumerate(_old_tables(arguments.model)):
            inputs[f"replayed_{number}"] = sha256_of_file(table)
    return inputs


def _old_tables(model: Path) -> list[Path]:
    """The latent tables of the old model and of all that it was grown from."""
    from mnif.training.inheritance import TABLE, inherited_tables

    table = model.parent / TABLE
    if not table.is_file():
        raise UserError(f"--replay: {table} is not there, and old latents are what is learned again")
    return [table, *inherited_tables(model.parent)]


def _train(
    arguments: GrowArguments,
    fit: FitArguments,
    accelerator: Accelerator,
    old: MNIFModel,
    latent_init: LatentInit,
    data: Dataset,
    splits: np.ndarray,
) -> dict[str, float]:
    """Learns from the new data and saves what was learned; the main process gets figures of it."""
    from mnif.models.lineage import freeze_earlier, lengthened
    from mnif.signals.registry import signal_of_model
    from mnif.training.inheritance import lineage_of_child

    before = _figures_before(old, latent_init, data, splits, arguments.refinement_steps)
    decoder = _grown(arguments, old)
    decoder.register_to_config(
        lineage=lineage_of_child(old, arguments.model, data, before, frozen=not arguments.replay)
    )
    if not arguments.replay:
        freeze_earlier(decoder)
    goes_on = latent_init is not None and _method_of(latent_init) == fit.method
    continued = lengthened(latent_init, decoder) if goes_on else None
    instances = int((splits == Split.TRAIN).sum())
    method = make_method(fit, decoder, signal_of_model(decoder), instances, accelerator, continued)
    method.to(accelerator.device)
    replay = _replay(arguments, method, old) if arguments.replay else None
    metrics = learn(fit, accelerator, method, data, splits, "grow", replay)
    if replay is not None and accelerator.is_main_process:
        metrics["psnr_of_old_fields"] = _psnr_of_old_fields(replay.cpu())
    return metrics


def _grown(arguments: GrowArguments, old: MNIFModel) -> MNIFModel:
    """The next generation, with bases freshly drawn.

    Raises:
        UserError: the model cannot be grown so.
    """
    from mnif.models.lineage import grown

    try:
        return grown(old, arguments.add_bases, arguments.add_latents)
    except ValueError as error:
        raise UserError(f"{arguments.model}, --add_latents {arguments.add_latents}: {error}") from None


def _method_of(latent_init: LatentInit) -> Literal["encoder", "auto-decoding", "meta"]:
    """The way of learning that a model's encoder, inner loop or neither comes from."""
    from mnif.latents.inner_loop import InnerLoop

    return "auto-decoding" if latent_init is None else "meta" if isinstance(latent_init, InnerLoop) else "encoder"


def _replay(arguments: GrowArguments, method: Any, old: MNIFModel) -> Replay:
    import torch

    from mnif.latents.table import LatentTable
    from mnif.training.replay import Replay

    tables = [LatentTable.load_for(old, path).train for path in _old_tables(arguments.model)]
    latents = torch.cat(tables).to(method.decoder.device)
    return Replay(method, old, latents, arguments.replay_weight, arguments.earlier_learning_rate)


def _psnr_of_old_fields(replay: Replay) -> float:
    """How well the grown model draws old latents as they were drawn before, in dB, at random points of 512 of them."""
    import torch

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        error = replay.forgotten(torch.arange(_MEASURED))
    return float(10 * torch.log10(4 / error.clamp_min(1e-10)))


def _figures_before(
    old: MNIFModel, latent_init: LatentInit, data: Dataset, splits: np.ndarray, steps: int
) -> dict[str, float]:
    """Measures the old model on the new data's held-out part, as `mnif fit` does; nothing where that is empty."""
    import numpy as np
    import torch

    from mnif.data.batches import array_dataset, evenly_spaced
    from mnif.latents.inference import evaluate_latents, infer_latents
    from mnif.signals.registry import signal_of_model

    chosen = np.flatnonzero(splits == Split.HELD_OUT)
    if not len(chosen):
        return {}
    rows = array_dataset(data.rows(chosen[evenly_spaced(len(chosen), _MEASURED)]).arrays())
    signal = signal_of_model(old)
    latents = torch.cat([*infer_latents(old, signal, rows, latent_init, steps)])
    figures = evaluate_latents(old, signal, rows, latents)
    return {f"{name}_heldout": round(values.double().mean().item(), 3) for name, values in figures.items()}
