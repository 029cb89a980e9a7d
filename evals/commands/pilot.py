"""`mnif pilot`: small runs of several sizes at equal compute, and which of them to train."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mnif.commands.compare_fit import STAGE_ONE, run_of
from mnif.comparison.choice import KNEE_RULE, Candidate, candidates_of, knee, quality_name, recommendations
from mnif.comparison.engine import BUDGETS, ComparisonFlags, Engine, Run, Subject, opened, settle_budget
from mnif.training.fit_arguments import FitArguments, with_preset
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import write_json, written_atomically

_SIZES = (8, 16, 32, 64, 128, 256)
_TRAIN_SECONDS = 25.0  # twelve runs are five minutes then

_OF_THE_PILOT = {*BUDGETS, "num_bases", "cells", "output_dir", "resume_from_checkpoint", "dry_run"}


@dataclass(kw_only=True)
class PilotArguments(ComparisonFlags, FitArguments):
    """Try numbers of bases in small runs on your data, and say which to train; takes every flag of `mnif fit`.

    Writes pilot.json, pilot.md, pilot.html and one run folder for each try; the same command again continues or reuses
    what is there.
    """

    num_bases: list[int] | None = None  # type: ignore[assignment] # several, where `mnif fit` takes one
    """Basis networks per layer to try. Unless given: 8 16 32 64 128 256, as far as there are fields to learn from."""
    cells: list[int] | None = None  # type: ignore[assignment] # likewise
    """Cells per axis to try with each; unless given, as `mnif fit` has them."""
    train_seconds: float | None = None
    """Seconds of optimizer steps that each run gets on this machine; 25 unless a number of steps is given."""
    seeds: int = 2
    """Runs of each setting, with --seed and the numbers after it."""
    prior_steps: int = 0
    """Steps of a short `mnif prior` for each run, whose samples are compared with held-out instances; 0: none."""
    good_enough: float | None = None
    """How far below the best is good enough, in dB of PSNR, or IoU of shapes; default: 1 dB, 0.03 of IoU."""


def main(arguments: list[str]) -> None:
    """Runs `mnif pilot`."""
    given = parse_given(PilotArguments, arguments, "mnif pilot")
    flags, runs = flags_and_runs(given)
    pilot(flags, runs, given)


def flags_and_runs(given: dict[str, Any]) -> tuple[PilotArguments, list[Run]]:
    """Makes of the flags that are given those in common, and the runs: every M with every number of cells and seed.

    Raises:
        UserError: a flag cannot be understood or used.
    """
    flags = with_preset(PilotArguments, given)
    flags.num_bases, flags.cells = given.get("num_bases"), given.get("cells")  # a preset has one of each, at most
    settle_budget(flags, given, _TRAIN_SECONDS)
    check_at_least(2, seeds=flags.seeds)
    check_at_least(0, prior_steps=flags.prior_steps, good_enough=flags.good_enough)
    sizes = sorted({*(_SIZES if flags.num_bases is None else flags.num_bases)})
    if len(sizes) < 2:
        given_sizes = " ".join(map(str, flags.num_bases or []))
        raise UserError(f"--num_bases {given_sizes}: a curve needs two different numbers at least")
    common = {name: value for name, value in given.items() if name not in ("num_bases", "cells", "seed")}
    folder, seeds = flags.runs_dir or flags.output_dir, range(flags.seed, flags.seed + flags.seeds)
    grids = [f"cells={cells}," for cells in dict.fromkeys(flags.cells or [])] or [""]
    variants = [f"num_bases={size},{cells}seed={seed}" for size in sizes for cells in grids for seed in seeds]
    return flags, [run_of(common, folder, flags.method, each, flags.num_train_epochs) for each in variants]


def pilot(flags: PilotArguments, runs: list[Run], given: Mapping[str, Any]) -> None:
    """Trains every run, measures it, and writes what came out to ``flags.output_dir``.

    Raises:
        UserError: the data cannot be read or nothing of it is held out, there are more bases than make sense, a folder
            is another command's or holds another run, or training diverges.
    """
    sensible: list[Run] = []

    def check(engine: Engine) -> None:
        reasons = {run.name: _too_many(engine, run) for run in runs}
        sensible.extend(run for run in runs if not reasons[run.name])
        refused = next(filter(None, reasons.values()), "")
        if refused and (flags.num_bases is not None or len({run.arguments.num_bases for run in sensible}) < 2):
            raise UserError(refused)

    with opened(flags, "pilot", runs, STAGE_ONE, check) as engine:
        from evals.report.pilot import pilot_page, pilot_text

        content = _content(engine, sensible, given)
        write_json(flags.output_dir / "pilot.json", content)
        text = pilot_text(content)
        for name, written in (("pilot.md", text), ("pilot.html", pilot_page(content))):
            with written_atomically(flags.output_dir / name) as temporary:
                temporary.write_text(written, encoding="utf-8", errors="backslashreplace")
    print(f"\n{text}\n{flags.output_dir}: pilot.json, pilot.md and pilot.html written")


def _too_many(engine: Engine, run: Run) -> str:
    """Says why a run has more bases than make sense; "" if it has not."""
    from mnif.models.siren import layer_shapes

    arguments, signal = run.arguments, engine.signal(run.arguments)
    shapes = layer_shapes(signal.dimensions, signal.channels, arguments.width, arguments.depth)
    numbers = max((shape.inputs + 1) * shape.outputs for shape in shapes)
    fields = (arguments.cells or signal.default_cells()) ** signal.dimensions
    instances = len(engine.train_data)
    if arguments.num_bases > numbers:
        return (
            f"--num_bases {arguments.num_bases}: a layer has {numbers} numbers, which as many bases span; give fewer"
        )
    if arguments.num_bases > instances * fields:
        there = f"{instances} {signal.noun}s of {fields} field{'s' if fields > 1 else ''} each"
        return f"--num_bases {arguments.num_bases}: more than the {instances * fields} fields to learn from ({there})"
    return ""


def _content(engine: Engine, runs: Sequence[Run], given: Mapping[str, Any]) -> dict[str, Any]:
    """Trains and measures the runs, and gives what ``pilot.json`` holds."""
    from mnif.comparison.robustness import FURTHER

    flags = engine.flags
    results = [_result(engine, run) for run in runs]
    quality, candidates = quality_name(results[0]), candidates_of(results)
    chosen = recommendations(candidates, quality, flags.good_enough)
    return {
        **engine.summary(results, FURTHER),
        "seeds": flags.seeds,
        "prior_steps": flags.prior_steps,
        "quality": quality,
        "knee_rule": KNEE_RULE,
        "settings": [asdict(candidate) | {"spread": candidate.spread} for candidate in candidates],
        "knees": {str(cells): _knee(candidates, cells) for cells in sorted({each.cells for each in candidates})},
        "recommendations": [
            {
                "name": each.name,
                "num_bases": each.candidate.num_bases,
                "cells": each.candidate.cells,
                "reason": each.reason,
                "command": fit_command(given, each.candidate, flags.output_dir / each.name),
            }
            for each in chosen
        ],
    }


def _knee(candidates: Sequence[Candidate], cells: int) -> int | None:
    curve = [candidate for candidate in candidates if candidate.cells == cells]
    place = knee([each.num_bases for each in curve], [each.quality for each in curve])
    return None if place is None else curve[place].num_bases


def _result(engine: Engine, run: Run) -> dict[str, Any]:
    """Gives all figures of a run, those that only a pilot measures too."""

    def measure(subject: Subject) -> dict[str, float]:
        from evals.costs import decode_costs, samples_distance
        from mnif.comparison.robustness import FURTHER, robustness

        decoder, signal, finder, rows = subject.decoder, subject.signal, subject.latent_init, subject.probes
        figures = robustness(decoder, signal, rows, finder, subject.steps, subject.seed, FURTHER)
        figures |= decode_costs(decoder, signal, rows)
        if engine.flags.prior_steps:
            _train_prior(subject, engine.flags.prior_steps)
            figures |= samples_distance(subject.folder / "model", signal, engine.train_data, rows, subject.seed)
        return figures

    result, arguments = engine.result(run), run.arguments
    result.pop("prior", None)  # of a command before this one
    setting = {"num_bases": arguments.num_bases, "cells": arguments.cells, "seed": arguments.seed}
    return result | setting | engine.measured(run, "piloted.json", measure, {"prior_steps": engine.flags.prior_steps})


def _train_prior(subject: Subject, steps: int) -> None:
    from latent_prior.commands.prior import fit_prior, parse_prior_arguments

    flags = {"run": subject.folder, "preset": "edge", "max_train_steps": steps, "seed": subject.seed}
    fit_prior(parse_prior_arguments([word for name, value in flags.items() for word in (f"--{name}", str(value))]))


def fit_command(given: Mapping[str, Any], candidate: Candidate, output_dir: Path) -> str:
    """Writes the `mnif fit` of a setting at full length, with all else as it was given, for a shell."""
    flags = {"data": given["data"], "output_dir": output_dir}
    flags |= {"num_bases": candidate.num_bases, "cells": candidate.cells}
    flags |= {name: given[name] for name in ("signal", "preset") if given.get(name) is not None}
    usual = with_preset(
        FitArguments, flags
    )  # a pilot's config.yaml has every flag; what goes without saying is left out
    known = {field.name for field in fields(FitArguments)} - _OF_THE_PILOT - flags.keys()
    flags |= {
        name: value for name, value in given.items() if name in known and value not in (None, getattr(usual, name))
    }
    words = ["mnif", "fit"]
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        else:
            words += [f"--{name}={value}"] if str(value).startswith("-") else [f"--{name}", str(value)]
    return shlex.join(words).encode("utf-8", "backslashreplace").decode()
