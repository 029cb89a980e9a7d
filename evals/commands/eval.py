"""`mnif eval`: measures samples and reconstructions, each metric beside its controls; several side by side."""

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from evals.arguments import EvalArguments, protocol_of
from mnif.utils import __version__
from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError, check_at_least, markdown_code, printable
from mnif.utils.files import check_writable, write_json, written_atomically
from mnif.utils.json_files import read_json
from mnif.utils.model_folders import is_trained_model
from mnif.utils.output_folders import BEGUN, check_output_folder, output_folder_of
from mnif.utils.pixels import limit_image_pixels
from mnif.utils.process import Processes, command_line, peak_memory_megabytes

_MAY_DIFFER = {"seed", "num_inference_steps", "held_out_images"}
_NO_INPUTS = ("output_dir", "device", "max_image_pixels", "push_to_hub", "hub_model_id")


@dataclass(frozen=True)
class Evaluation:
    """One column of the table.

    Attributes:
        name: what sets it apart.
        folder: where its ``metrics.json`` is.
        metrics: its content.
    """

    name: str
    folder: Path
    metrics: dict[str, Any]


def to_evaluate(flags: EvalArguments) -> list[EvalArguments]:
    """Lists the evaluations that ``--reference`` asks for, one of each path, into folders of their own."""
    names = _names(flags.compared)
    return [
        replace(flags, compared=[], output_dir=flags.output_dir / name, **_subject(path))
        for path, name in zip(flags.compared, names, strict=True)
    ]


def compare(paths: Sequence[Path], output: Path) -> None:
    """Writes ``comparison.json``, ``comparison.md`` and ``comparison.png`` of finished evaluations.

    Args:
        paths: output folders of `mnif eval`, or run folders with one at RUN/eval.
        output: the folder.

    Raises:
        UserError: a path holds no evaluation, or two were measured under different protocols.
    """
    from evals.charts import as_png, comparison_chart
    from evals.presentation import markdown_table, protocol_line, read_evaluation, table_rows

    evaluations = [
        Evaluation(name, folder, read_evaluation(folder / "metrics.json"))
        for name, folder in zip(_names(paths), map(_folder_of, paths), strict=True)
    ]
    protocol = _common_protocol(evaluations)
    metrics = [evaluation.metrics for evaluation in evaluations]
    table = markdown_table(["figure", *(evaluation.name for evaluation in evaluations)], table_rows(metrics))
    content = {
        "command": command_line(),
        "protocol": protocol,
        "evaluations": [
            {"name": evaluation.name, "folder": str(evaluation.folder), "figures": evaluation.metrics}
            for evaluation in evaluations
        ],
    }
    write_json(output / "comparison.json", content)
    with written_atomically(output / "comparison.md") as temporary:
        temporary.write_text(f"{table}\n{protocol_line(protocol)}\n\n{markdown_code(command_line())}\n")
    chart = comparison_chart({evaluation.name: evaluation.metrics for evaluation in evaluations})
    if chart is not None:
        with written_atomically(output / "comparison.png") as temporary:
            temporary.write_bytes(as_png(chart))
    print(f"{table}\n{output}: comparison.json, comparison.md{' and comparison.png' if chart else ''} written")


def _subject(path: Path) -> dict[str, Any]:
    """Tells what a path is, as a flag."""
    if (path / "model").is_dir():
        return {"model": path / "model"}
    if (path / "model_index.json").is_file():
        return {"model": path}
    if (path / "manifest.json").is_file():
        return {"bundle": path}
    return {"samples": str(path)}


def _folder_of(path: Path) -> Path:
    for folder in (path, path / "eval"):
        if (folder / "metrics.json").is_file() and "inputs" in read_json(folder / "metrics.json"):
            return folder
    raise UserError(
        f"{path}: holds no evaluation; give output folders of `mnif eval`, or --reference to evaluate it now"
    )


def _names(paths: Sequence[Path]) -> list[str]:
    """Names the paths by what they do not have in common."""
    absolute = [path.absolute() for path in paths]
    if len(set(absolute)) < len(absolute):
        raise UserError("the same folder is given twice; there is nothing to compare")
    common = Path(os.path.commonpath(absolute))
    relative = [path.relative_to(common) if path != common else Path(path.name) for path in absolute]
    return ["-".join(path.parts) for path in relative]


def _common_protocol(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """Returns what all were measured under; numbers of different protocols do not belong in one table."""
    first, *others = evaluations
    protocol = first.metrics.get("protocol", {})
    for other in others:
        theirs = other.metrics.get("protocol", {})
        for name in sorted((protocol.keys() | theirs.keys()) - _MAY_DIFFER):
            if protocol.get(name) != theirs.get(name):
                raise UserError(
                    f"{first.name} was measured with {name.replace('_', ' ')} {protocol.get(name)}, {other.name} with "
                    f"{theirs.get(name)}; their figures cannot be compared: evaluate them alike"
                )
    return {name: value for name, value in protocol.items() if name not in _MAY_DIFFER}


def main(arguments: list[str]) -> None:
    """Runs `mnif eval`."""
    flags = parse_arguments(EvalArguments, arguments, "mnif eval")
    if not flags.compared:
        evaluate(flags)
        return
    from evals.evaluator import SUBJECTS

    if any(getattr(flags, flag) is not None for flag in SUBJECTS):
        raise UserError("give either folders to compare, or one of --model, --samples and --bundle")
    several = to_evaluate(flags) if flags.reference else []
    for one in (flags, *several):
        check_output_folder(one.output_dir, "eval")
    paths = [one.output_dir for one in several] or flags.compared
    is_main = Processes(flags.device).is_main
    with output_folder_of(flags.output_dir, "eval") if is_main else nullcontext():
        for one in several:
            evaluate(one)
        if is_main:
            compare(paths, flags.output_dir)


def evaluate(arguments: EvalArguments) -> None:
    """Writes ``metrics.json``, its metrics as ``metrics.md``, and pictures to ``arguments.output_dir``.

    Raises:
        UserError: model, samples or reference cannot be read or do not fit each other, or the folder is another
            command's.
    """
    from evals.evaluator import evaluator_of
    from evals.presentation import evaluation_markdown, read_evaluation

    started = time.perf_counter()
    check_output_folder(arguments.output_dir, "eval")
    check_at_least(1, max_image_pixels=arguments.max_image_pixels)
    limit_image_pixels(arguments.max_image_pixels)
    if arguments.save_statistics is not None:
        check_writable(arguments.save_statistics.parent)
    arguments = replace(arguments, num_samples=protocol_of(arguments).num_samples)
    processes = Processes(arguments.device)
    evaluator = evaluator_of(arguments)
    repository = _repository(arguments)
    inputs = _flags(arguments) | {"version": __version__} | evaluator.inputs()
    path = arguments.output_dir / "metrics.json"
    if path.exists() and read_json(path).get("inputs") == inputs:
        if processes.is_main:
            shutil.rmtree(arguments.output_dir / ".parts", ignore_errors=True)  # of one that was killed at its end
            (arguments.output_dir / BEGUN).unlink(missing_ok=True)
            print(f"{path}: measured here before with these inputs; nothing to do")
            _tell(arguments, read_evaluation(path), repository)
        return
    if not processes.is_main:
        evaluator.evaluate(processes)
        return
    with output_folder_of(arguments.output_dir, "eval"):
        metrics = evaluator.evaluate(processes) | {
            "inputs": inputs,
            "seconds": round(time.perf_counter() - started, 1),
            "peak_rss_mb": peak_memory_megabytes(),
            "command": command_line(),
        }
        with written_atomically(path.with_suffix(".md")) as temporary:
            temporary.write_text(evaluation_markdown(metrics, "this model" if arguments.model else "these samples"))
        write_json(path, metrics)  # last, for it says that all is there
        shutil.rmtree(arguments.output_dir / ".parts", ignore_errors=True)
    _print(metrics)
    print(path)
    _tell(arguments, metrics, repository)


def _tell(arguments: EvalArguments, metrics: dict[str, Any], repository: str | None) -> None:
    """Writes into the model's card what was measured, and uploads it if that is asked for."""
    if arguments.model is None or is_trained_model(arguments.model):
        return
    from evals.presentation import evaluation_markdown, metrics_of
    from latent_prior.hub import push
    from latent_prior.model_card import Figure, add_evaluation
    from mnif.utils.process import public_command, public_name

    figures = [
        Figure(metric.key, metric.label, metric.value, metric.std)
        for metric in metrics_of(metrics)
        if not metric.subject and not metric.is_detail
    ]
    protocol = {name: public_name(str(value)) for name, value in metrics.get("protocol", {}).items()}
    public = metrics | {"protocol": protocol, "command": public_command(metrics["command"])}
    words = evaluation_markdown(public, "this model")
    if add_evaluation(arguments.model, figures, arguments.reference, words):
        print(f"{arguments.model / 'README.md'}: the model's card has these figures")
    push(arguments.model, repository)


def _print(metrics: dict[str, Any]) -> None:
    from evals.metrics.neighbours import copying_verdict
    from evals.presentation import metrics_of

    for metric in metrics_of(metrics):
        print(f"  {metric.key:32} {metric.value:10.4g}" + (f" ± {metric.std:.2g}" if metric.std is not None else ""))
    for warning in metrics.get("warnings", []):
        print(f"warning: {printable(warning)}")
    if verdict := copying_verdict(metrics):
        print(f"  this prior {verdict}")


def _repository(arguments: EvalArguments) -> str | None:
    if arguments.model is None and arguments.push_to_hub:
        raise UserError("--push_to_hub: for --model alone, whose card it uploads")
    from latent_prior.hub import repository_for

    return repository_for(arguments, arguments.model or arguments.output_dir)


def _flags(arguments: EvalArguments) -> dict[str, str]:
    return {key: str(value) for key, value in asdict(arguments).items() if key not in _NO_INPUTS}
