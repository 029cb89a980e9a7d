"""`mnif compare-fit`: the ways of learning at equal compute on one data set, and the table to choose by."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from mnif.commands.fit import fit_bare
from mnif.comparison.engine import BUDGETS, ComparisonFlags, Run, StageOne, opened, settle_budget
from mnif.training.assembly import bare_steps
from mnif.training.fit_arguments import AUGMENTATIONS, FitArguments, with_preset
from mnif.training.run_record import read_metrics_log
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError
from mnif.utils.files import write_json, written_atomically
from mnif.utils.flag_files import typed_values

STAGE_ONE = StageOne(fit_bare, bare_steps)
"""What trains the runs of a comparison."""

_TRAIN_SECONDS = 480.0

# What is compared on, and what the process can have only once: no variant may differ in it.
_COMMON = {*BUDGETS, "data", "output_dir", "signal", "preset", "dry_run", "resolution", "channels", "method"}
_COMMON |= {"held_out_fraction", "test_fraction", "held_out_views", "max_views", "near", "far", "background"}
_COMMON |= {"mixed_precision", "allow_tf32", "resume_from_checkpoint", "report_to", "tracker_project_name"}


@dataclass(kw_only=True)
class CompareArguments(ComparisonFlags, FitArguments):
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


def main(arguments: list[str]) -> None:
    """Runs `mnif compare-fit`."""
    compare(*parse_compare_arguments(arguments))


def compare(flags: CompareArguments, runs: list[Run]) -> None:
    """Trains every run, measures it, and writes the comparison to ``flags.output_dir``.

    Raises:
        UserError: the data cannot be read or nothing of it is held out, a folder is another command's or holds
            another run, or training diverges.
    """
    with opened(flags, "compare-fit", runs, STAGE_ONE) as engine:
        from mnif.comparison.summary import comparison_table, curves_image

        results = [engine.result(run) for run in runs]
        comparison = engine.summary(results)
        write_json(flags.output_dir / "compare.json", comparison)
        table = comparison_table(comparison)
        with written_atomically(flags.output_dir / "compare.md") as temporary:
            temporary.write_text(table)
        curves = {run.name: read_metrics_log(run.arguments.output_dir / "metrics.jsonl") for run in runs}
        with written_atomically(flags.output_dir / "curves.png") as temporary:
            temporary.write_bytes(curves_image(curves, {result["name"]: result for result in results}))
    print(f"\n{table}\n{flags.output_dir}: compare.json, compare.md and curves.png written")


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
    settle_budget(flags, given, _TRAIN_SECONDS)
    variants, methods = dict.fromkeys(flags.variants or [""]), dict.fromkeys(flags.methods)
    folder = flags.runs_dir or flags.output_dir
    return flags, [
        run_of(given, folder, method, variant, flags.num_train_epochs) for variant in variants for method in methods
    ]


def run_of(given: dict[str, Any], folder: Path, method: str, variant: str, num_train_epochs: int | None) -> Run:
    """Makes the run of one method and variant.

    Args:
        given: the flags that are given; those of `mnif fit` among them hold for the run.
        folder: where its folder lies.
        method: of learning.
        variant: settings on top of the flags, ``flag=value,flag=value``, or "".
        num_train_epochs: if these are the budget.

    Raises:
        UserError: a setting cannot be understood or used.
    """
    of_fit = {field.name: given[field.name] for field in fields(FitArguments) if field.name in given}
    own = {"method": method} | ({} if method == "encoder" else dict.fromkeys(AUGMENTATIONS, False))
    try:
        arguments = with_preset(FitArguments, of_fit | own | _settings_of(variant))
    except UserError as error:
        raise UserError(f"--variants {variant}: {error}" if variant else str(error)) from None
    name = f"{method}-{variant}" if variant else method
    arguments.output_dir = folder / name
    arguments.num_train_epochs = num_train_epochs
    return Run(name, variant, [flag for flag in AUGMENTATIONS if getattr(arguments, flag)], arguments)


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
