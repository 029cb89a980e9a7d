"""`mnif eval`: measures samples and reconstructions, each figure beside its controls."""

import time
from dataclasses import asdict

from evals.arguments import EvalArguments
from evals.figures import copying_verdict
from evals.processes import Processes
from evals.rooms import Measurement, room_of
from latent_prior.pipeline import load_pipeline
from mnif import __version__
from mnif.arguments import parse_arguments
from mnif.data import signal_of
from mnif.errors import UserError
from mnif.files import read_json, write_json
from mnif.runs import command_line, peak_memory_megabytes
from mnif.signal_table import signal_of_model


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
    processes = Processes()
    measurement = _measurement(arguments)
    inputs = _flags(arguments) | {"version": __version__} | measurement.inputs
    path = arguments.output_dir / "metrics.json"
    if path.exists() and read_json(path).get("inputs") == inputs:
        if processes.is_main:
            print(f"{path}: measured here before with these inputs; nothing to do")
        return
    figures = measurement.figures(processes)
    if not processes.is_main:
        return
    figures |= {
        "inputs": inputs,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_memory_megabytes(),
        "command": command_line(),
    }
    write_json(path, figures)
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"  {name:28} {value:10.3f}")
    for warning in figures.get("warnings", []):
        print(f"warning: {warning}")
    if verdict := copying_verdict(figures):
        print(f"  this prior {verdict}")
    print(path)


def _measurement(arguments: EvalArguments) -> Measurement:
    """What the room of the signal at hand makes of the flags."""
    if (arguments.model is None) == (arguments.samples is None):
        raise UserError("give either --model RUN/model or --samples FOLDER")
    if arguments.model is None:
        room = room_of(signal_of(arguments.reference), f"--reference {arguments.reference}")
        return room.of_samples(arguments)
    pipeline = load_pipeline(arguments.model)
    room = room_of(signal_of_model(pipeline.decoder).name, f"--model {arguments.model}")
    return room.of_model(arguments, pipeline)


def _flags(arguments: EvalArguments) -> dict[str, str]:
    return {key: str(value) for key, value in asdict(arguments).items() if key != "output_dir"}
