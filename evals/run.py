"""`mnif eval`: measures samples and reconstructions, each figure beside its controls."""

import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evals.arguments import EvalArguments
from evals.comparison import compare, to_evaluate
from evals.images import room as images
from evals.metrics.frechet import is_statistics
from evals.metrics.memorisation import copying_verdict
from evals.processes import Processes
from evals.protocols import protocol_of
from evals.rooms import Measurement, room_of
from evals.tables import evaluation_markdown
from mnif import __version__
from mnif.arguments import parse_arguments
from mnif.data import signal_of
from mnif.errors import UserError
from mnif.files import read_json, write_json, written_atomically
from mnif.model_folder import load_component
from mnif.modeling import MNIFModel
from mnif.output_folders import BEGUN, check_output_folder, output_folder_of
from mnif.runs import command_line, peak_memory_megabytes
from mnif.signal_table import signal_of_model

_SUBJECTS = ("model", "samples", "bundle")


def main(arguments: list[str]) -> None:
    """Runs `mnif eval`."""
    asked = parse_arguments(EvalArguments, arguments, "mnif eval")
    if not asked.compared:
        evaluate(asked)
        return
    if any(getattr(asked, flag) is not None for flag in _SUBJECTS):
        raise UserError("give either folders to compare, or one of --model, --samples and --bundle")
    several = to_evaluate(asked) if asked.reference else []
    for one in (asked, *several):
        check_output_folder(one.output_dir, "eval")
    paths = [one.output_dir for one in several] or asked.compared
    is_main = Processes().is_main
    with output_folder_of(asked.output_dir, "eval") if is_main else nullcontext():
        for one in several:
            evaluate(one)
        if is_main:
            compare(paths, asked.output_dir)


def evaluate(arguments: EvalArguments) -> None:
    """Writes ``metrics.json``, its figures as ``metrics.md``, and pictures to ``arguments.output_dir``.

    Raises:
        UserError: model, samples or reference cannot be read or do not fit each other, or the folder is another
            command's.
    """
    started = time.perf_counter()
    check_output_folder(arguments.output_dir, "eval")
    arguments = replace(arguments, num_samples=protocol_of(arguments).num_samples)
    processes = Processes()
    measurement = _measurement(arguments)
    inputs = _flags(arguments) | {"version": __version__} | measurement.inputs
    path = arguments.output_dir / "metrics.json"
    if path.exists() and read_json(path).get("inputs") == inputs:
        if processes.is_main:
            shutil.rmtree(arguments.output_dir / ".parts", ignore_errors=True)  # of one that was killed at its end
            (arguments.output_dir / BEGUN).unlink(missing_ok=True)
            print(f"{path}: measured here before with these inputs; nothing to do")
        return
    if not processes.is_main:
        measurement.figures(processes)
        return
    with output_folder_of(arguments.output_dir, "eval"):
        figures = measurement.figures(processes) | {
            "inputs": inputs,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_rss_mb": peak_memory_megabytes(),
            "command": command_line(),
        }
        with written_atomically(path.with_suffix(".md")) as temporary:
            temporary.write_text(evaluation_markdown(figures, "this model" if arguments.model else "these samples"))
        write_json(path, figures)  # last, for it says that all is there
        shutil.rmtree(arguments.output_dir / ".parts", ignore_errors=True)
    _print(figures)
    print(path)


def _print(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if isinstance(value, float) and not name.endswith("_std"):
            spread = figures.get(f"{name}_std")
            print(f"  {name:32} {value:10.4g}" + (f" ± {spread:.2g}" if spread is not None else ""))
    for warning in figures.get("warnings", []):
        print(f"warning: {warning}")
    if verdict := copying_verdict(figures):
        print(f"  this prior {verdict}")


def _measurement(arguments: EvalArguments) -> Measurement:
    """What the room of the signal at hand makes of the flags."""
    if not arguments.reference:
        raise UserError("give --reference, the data set to compare with")
    given = [flag for flag in _SUBJECTS if getattr(arguments, flag) is not None]
    if len(given) != 1:
        raise UserError("give one of --model RUN/model, --samples FOLDER and --bundle BUNDLE")
    if arguments.bundle is not None:
        return images.of_bundle(arguments)
    if arguments.samples is not None:
        of_pictures = is_statistics(Path(arguments.reference))
        signal = "image" if of_pictures else signal_of(arguments.reference)
        return room_of(signal, f"--reference {arguments.reference}").of_samples(arguments)
    assert arguments.model is not None
    decoder = load_component(MNIFModel, arguments.model, "decoder")
    return room_of(signal_of_model(decoder).name, f"--model {arguments.model}").of_model(arguments)


def _flags(arguments: EvalArguments) -> dict[str, str]:
    return {key: str(value) for key, value in asdict(arguments).items() if key != "output_dir"}
