"""`mnif compare-fit`: the ways of learning at equal compute on one data set, and the table to choose by."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mnif.commands.fit import AUGMENTATIONS, FitArguments, fit, make_decoder, make_method, train_loop, with_preset
from mnif.data.dataset import Dataset, Split
from mnif.training.run_record import flags_as_json, for_further_runs, read_metrics_log
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import write_json, written_atomically
from mnif.utils.flag_files import Flags, typed_values, write_config
from mnif.utils.json_files import read_json
from mnif.utils.output_folders import check_output_folder, output_folder_of
from mnif.utils.pixels import limit_image_pixels
from mnif.utils.process import command_line, default_device

if TYPE_CHECKING:
    from mnif.signals.base import Signal

_TRAIN_SECONDS = 480.0
_LONGEST_MEASUREMENT = 10.0  # seconds of throw-away steps
_BETWEEN_LOOKS = 5  # steps between two looks at the clock; the first ones are the warm-up
_NEVER = 1_000_000_000  # steps
_VALIDATIONS = 8  # of a run at least, so that its curve has a shape, unless they would take long:
_VALIDATED = 1024  # instances a validation looks at, at most; each costs about a third of one in a step

_BUDGETS = ("train_seconds", "max_train_steps", "num_train_epochs")

# What is compared on, and what the process can have only once: no variant may differ in it.
_COMMON = {*_BUDGETS, "data", "output_dir", "signal", "preset", "dry_run", "resolution", "channels", "method"}
_COMMON |= {"held_out_fraction", "test_fraction", "held_out_views", "max_views", "near", "far", "background"}
_COMMON |= {"mixed_precision", "resume_from_checkpoint", "report_to", "tracker_project_name"}


@dataclass(kw_only=True)
class CompareArguments(FitArguments):
    """Learn in several ways at equal compute and tabulate what each is worth; takes every flag of `mnif fit`.

    Writes compare.json, compare.md, curves.png and one run folder for each way; the same command again continues or
    reuses what is there. Flags a way cannot use (--random_flip without an encoder) are left out for it.
    """

    train_seconds: float | None = None
    """Seconds of optimizer steps that each run gets on this machine; 480 unless a number of steps is given."""
    methods: list[Literal["encoder", "auto-decoding", "meta"]] = field(
        default_factory=lambda: ["encoder", "auto-decoding", "meta"]
    )
    """The ways of learning, in the order of the table; takes the place of --method."""
    variants: list[str] = field(default_factory=list)
    """Settings to try with each method on top of the flags given, such as cells=4 cells=1,width=64,depth=4."""
    probes: int = 256
    """Held-out instances that robustness is measured on, at most."""


@dataclass(frozen=True)
class Run:
    """One row of the table.

    Attributes:
        name: of the row and of the run folder.
        variant: as the user wrote it, or "".
        arguments: of its `mnif fit`.
    """

    name: str
    variant: str
    arguments: FitArguments


def main(arguments: list[str]) -> None:
    """Runs `mnif compare-fit`."""
    compare(*parse_compare_arguments(arguments))


def compare(flags: CompareArguments, runs: list[Run]) -> None:
    """Trains every run, measures it, and writes the comparison to ``flags.output_dir``.

    Raises:
        UserError: the data cannot be read or nothing of it is held out, a folder is another command's or holds
            another run, or training diverges.
    """
    from mnif.signals.registry import signal_class
    from mnif.training.loop import check_machine

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes cannot be compared; run it without torchrun")
    check_machine(flags)
    check_output_folder(flags.output_dir, "compare-fit")
    for run in runs:
        check_output_folder(run.arguments.output_dir, "fit")
    limit_image_pixels(flags.max_image_pixels)
    data = signal_class(flags.signal).load(flags.data, asdict(flags))
    splits = data.split(flags.held_out_fraction, flags.test_fraction)
    train_data, held_data = (data.rows(splits == split) for split in (Split.TRAIN, Split.HELD_OUT))
    for split, flag in ((train_data, "lower"), (held_data, "raise")):
        if not len(split):
            raise UserError(
                f"--data {flags.data}: {len(train_data)} to learn from and {len(held_data)} held out; "
                f"{flag} --held_out_fraction, both sides are needed"
            )
    with output_folder_of(flags.output_dir, "compare-fit"):
        _compare(flags, runs, data, train_data, held_data)


def _compare(flags: CompareArguments, runs: list[Run], data: Dataset, train_data: Dataset, held_data: Dataset) -> None:
    import torch

    from mnif.comparison.robustness import CONDITIONS, conditions_of
    from mnif.comparison.summary import comparison_table, curves_image
    from mnif.data.batches import array_dataset
    from mnif.latents.pca import baseline_metrics
    from mnif.signals.registry import signal_class

    write_config(flags.output_dir / "config.yaml", {"compare-fit": _for_further_comparisons(flags)})
    results = [_result(flags, run, data, train_data, held_data) for run in runs]
    signal = signal_class(flags.signal).from_data(data, asdict(flags))
    controls = baseline_metrics(signal, array_dataset(train_data.arrays()), array_dataset(held_data.arrays()), results)
    count = {"train": len(train_data), "heldout": len(held_data), "probes": min(len(held_data), flags.probes)}
    comparison = {
        "command": command_line(),
        "data": flags.data,
        "unit": signal.noun,
        "instances": count,
        "train_seconds": flags.train_seconds,
        "max_train_steps": flags.max_train_steps if flags.train_seconds is None else None,
        "num_train_epochs": flags.num_train_epochs,
        "seed": flags.seed,
        "machine": {"device": default_device().type, "threads": torch.get_num_threads()},
        "conditions": {name: CONDITIONS[name] for name in conditions_of(signal)},
        "controls": controls,
        "runs": results,
    }
    write_json(flags.output_dir / "compare.json", comparison)
    table = comparison_table(comparison)
    with written_atomically(flags.output_dir / "compare.md") as temporary:
        temporary.write_text(table)
    curves = {run.name: read_metrics_log(run.arguments.output_dir / "metrics.jsonl") for run in runs}
    with written_atomically(flags.output_dir / "curves.png") as temporary:
        temporary.write_bytes(curves_image(curves, {result["name"]: result for result in results}))
    print(f"\n{table}\n{flags.output_dir}: compare.json, compare.md and curves.png written")


def _for_further_comparisons(flags: CompareArguments) -> Flags:
    """What ``--config`` reads: of the budgets that which counts."""
    counts = "train_seconds" if flags.train_seconds is not None else "max_train_steps"
    counts = "num_train_epochs" if flags.num_train_epochs is not None else counts
    unused = {*_BUDGETS, "method"} - {counts}
    return {name: value for name, value in for_further_runs(flags_as_json(flags)).items() if name not in unused}


def parse_compare_arguments(arguments: list[str]) -> tuple[CompareArguments, list[Run]]:
    """The flags in common, and the runs that methods and variants make of them.

    Raises:
        UserError: a flag or a variant cannot be understood or used.
    """
    given = parse_given(CompareArguments, arguments, "mnif compare-fit")
    if "method" in given:
        raise UserError("--method: give --methods, the ways of learning to compare")
    # Presets choose a method; here all are tried, and the encoder is the one that every flag goes with.
    flags = with_preset(CompareArguments, given | {"method": "encoder"})
    budgets = [name for name in _BUDGETS if name in given]
    if len(budgets) > 1:
        raise UserError(f"--{budgets[0]} and --{budgets[1]}: give one of them; it is what every run gets")
    if flags.dry_run:
        raise UserError("--dry_run: is for `mnif fit`, once for each --method")
    if flags.train_seconds is not None and not 0 < flags.train_seconds < float("inf"):
        raise UserError(f"--train_seconds {flags.train_seconds:g}: must be above 0")
    check_at_least(1, probes=flags.probes)
    if not budgets:
        flags.train_seconds = _TRAIN_SECONDS
    if "num_train_epochs" not in budgets:
        flags.num_train_epochs = None  # a preset's
    variants, methods = dict.fromkeys(flags.variants or [""]), dict.fromkeys(flags.methods)
    return flags, [_run(given, flags, method, variant) for variant in variants for method in methods]


def _run(given: dict[str, Any], flags: CompareArguments, method: str, variant: str) -> Run:
    """The run of one method and variant, on top of the flags given."""
    of_fit = {field.name: given[field.name] for field in fields(FitArguments) if field.name in given}
    own = {"method": method} | ({} if method == "encoder" else dict.fromkeys(AUGMENTATIONS, False))
    try:
        arguments = with_preset(FitArguments, of_fit | own | _settings_of(variant))
    except UserError as error:
        raise UserError(f"--variants {variant}: {error}" if variant else str(error)) from None
    name = f"{method}-{variant}" if variant else method
    arguments.output_dir = flags.output_dir / name
    arguments.num_train_epochs = flags.num_train_epochs
    return Run(name, variant, arguments)


def _settings_of(variant: str) -> dict[str, Any]:
    """``cells=1,output_sine=true`` → ``{"cells": 1, "output_sine": True}``."""
    known, settings = {field.name for field in fields(FitArguments)}, {}
    for setting in variant.split(",") if variant else []:
        name, equals, value = setting.partition("=")
        if name not in known:
            raise UserError(f'there is no flag --{name}; settings are written as "cells=1,width=64"')
        if name in _COMMON:
            raise UserError(f"--{name} must be the same for all; give it outside of --variants")
        if not equals or not value:
            raise UserError(f"{name} needs a value, {name}=…")
        settings[name] = value
    return typed_values(FitArguments, settings)


def _result(
    flags: CompareArguments, run: Run, data: Dataset, train_data: Dataset, held_data: Dataset
) -> dict[str, Any]:
    """Trains a run, or takes it as it is, and gives everything that is known of it."""
    print(f"== {run.name}", flush=True)
    folder, arguments = run.arguments.output_dir, run.arguments
    speed = _planned(flags, run, data, train_data) if flags.train_seconds is not None else None
    _forget_peak_memory()
    fit(arguments)
    last = [row for row in read_metrics_log(folder / "metrics.jsonl") if row["stage"] == "fit"][-1]
    batch = min(arguments.train_batch_size, len(train_data)) * arguments.gradient_accumulation_steps
    return {
        **read_json(folder / "metrics.json"),
        **_measured(flags, run, data, held_data),
        "name": run.name,
        "method": arguments.method,
        "variant": run.variant,
        "folder": str(folder),
        "augmented": [flag for flag in AUGMENTATIONS if getattr(arguments, flag)],
        "refinement_steps": arguments.refinement_steps,
        "train_steps": last["step"],
        "train_seconds": last["seconds"],  # validations included, unlike in seconds_per_step
        "seconds_per_step": speed,
        "images_per_second": batch * last["step"] / last["seconds"],
    }


class Speed(msgspec.Struct):
    """What ``speed.json`` holds for a number of seconds: of one step, and how many steps fit."""

    seconds_per_step: Annotated[float, Meta(gt=0)]
    max_train_steps: Annotated[int, Meta(ge=1)]


class Measured(msgspec.Struct):
    """A run's ``measured.json``: of what, and the figures."""

    subject: dict[str, Any]
    figures: dict[str, float]


def _planned(flags: CompareArguments, run: Run, data: Dataset, train_data: Dataset) -> float:
    """Sets the run's number of steps to what fits into the seconds asked for; gives the seconds of a step.

    Schedules need the number of steps beforehand. It is kept beside the run, because a second measurement would give
    another number and so another run.
    """
    from mnif.signals.registry import signal_class

    seconds, arguments = flags.train_seconds, run.arguments
    assert seconds is not None
    path, key = arguments.output_dir / "speed.json", f"{seconds:g}"
    kept: dict[str, Speed] = (
        read_json(path, dict[str, Speed]) if path.exists() and arguments.resume_from_checkpoint != "no" else {}
    )
    if key not in kept:
        signal = signal_class(flags.signal).from_data(data, asdict(arguments))
        measured = seconds_per_step(arguments, signal, train_data, min(seconds / 20, _LONGEST_MEASUREMENT))
        kept[key] = Speed(measured, max(round(seconds / measured), 1))
        write_json(path, msgspec.to_builtins(kept))
    arguments.max_train_steps = kept[key].max_train_steps
    batch = min(arguments.train_batch_size, len(train_data)) * arguments.gradient_accumulation_steps
    steps_worth = min(_VALIDATED, len(data)) / 3 / batch
    often = max(arguments.max_train_steps // _VALIDATIONS, round(10 * steps_worth), 1)
    arguments.validation_steps = min(arguments.validation_steps, often)
    measured = kept[key].seconds_per_step
    print(f"{1000 * measured:.3g} ms a step: {arguments.max_train_steps} steps in {seconds:g} s", flush=True)
    return measured


def seconds_per_step(arguments: FitArguments, signal: Signal, train_data: Dataset, seconds: float) -> float:
    """Wall seconds of one optimizer step, loading included; validation and checkpoints are not.

    The real training loop runs in a temporary folder until the clock has been looked at often enough.

    Args:
        arguments: of the run that is planned.
        signal: what the data are.
        train_data: the instances to learn from.
        seconds: how long to measure, after the warm-up; at least five steps are measured.

    Raises:
        UserError: training diverges within these steps.
    """
    from mnif.data.batches import array_dataset
    from mnif.training.loop import make_accelerator

    with tempfile.TemporaryDirectory() as folder:
        short = replace(
            arguments,
            output_dir=Path(folder),
            max_train_steps=_NEVER,
            checkpointing_steps=_NEVER,
            validation_steps=_NEVER,
            resume_from_checkpoint="latest",
            report_to=None,
        )
        accelerator = make_accelerator(short, short.output_dir)
        decoder = make_decoder(short, signal)
        method = make_method(short, decoder, signal, len(train_data), accelerator).to(accelerator.device)
        rows = array_dataset(train_data.arrays())
        loop = train_loop(short, accelerator, method, rows, validate=dict)
        silence = io.StringIO()  # the loop would show a bar without an end
        with (
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
            contextlib.closing(loop.steps()) as steps,
        ):
            started, counted, elapsed = _time_after(steps), 0, 0.0
            while elapsed < seconds:
                elapsed = _time_after(steps) - started
                counted += _BETWEEN_LOOKS
    return elapsed / counted


def _time_after(steps: Iterator[int]) -> float:
    """The clock in seconds after a few more steps, once the accelerator has done their work."""
    import torch

    for _ in islice(steps, _BETWEEN_LOOKS):
        pass
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _measured(flags: CompareArguments, run: Run, data: Dataset, held_data: Dataset) -> dict[str, float]:
    """Robustness and seconds for each new instance; taken from ``measured.json`` if they are of the same model."""
    import torch

    from mnif.comparison.robustness import robustness, seconds_per_instance
    from mnif.data.batches import array_dataset, evenly_spaced
    from mnif.latents.inference import load_latent_init
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.registry import signal_class

    folder, arguments = run.arguments.output_dir, run.arguments
    decoder = load_component(MNIFModel, folder / "model", "decoder").to(default_device())
    chosen = evenly_spaced(len(held_data), flags.probes)
    probes = held_data.rows(chosen)
    subject = {
        "decoder": decoder.fingerprint(),
        "probes": probes.fingerprint(),
        "seed": flags.seed,
        "refinement_steps": arguments.refinement_steps,
        "device": default_device().type,
        "threads": torch.get_num_threads(),
    }
    path = folder / "measured.json"
    if path.exists() and (stored := read_json(path, Measured)).subject == subject:
        print(f"{path}: measured before; nothing to do")
        return stored.figures
    signal = signal_class(flags.signal).from_data(data, asdict(arguments))
    latent_init = load_latent_init(folder / "model", signal, arguments.method)
    latent_init = None if latent_init is None else latent_init.to(default_device())
    rows, steps = array_dataset(probes.arrays()), arguments.refinement_steps
    metrics = {"latent_dim": decoder.config.latent_dim}
    metrics |= robustness(decoder, signal, rows, latent_init, steps, flags.seed)
    metrics |= seconds_per_instance(decoder, signal, rows, latent_init, steps)
    write_json(path, {"subject": subject, "figures": metrics})
    return metrics


def _forget_peak_memory() -> None:
    """Starts the process's peak anew, so that a run's is not that of the runs before; elsewhere than Linux it is."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
