"""Several evaluations side by side: `mnif eval A B C --output_dir OUT`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evals.arguments import EvalArguments
from evals.plots import comparison_plot
from evals.tables import markdown_table, protocol_line, table_rows
from mnif.errors import UserError
from mnif.files import read_json, write_json, written_atomically
from mnif.runs import command_line

_MAY_DIFFER = {"seed", "num_inference_steps", "held_out_images"}


@dataclass(frozen=True)
class Evaluation:
    """One column of the table.

    Attributes:
        name: what sets it apart.
        folder: where its ``metrics.json`` is.
        figures: its content.
    """

    name: str
    folder: Path
    figures: dict[str, Any]


def to_evaluate(asked: EvalArguments) -> list[EvalArguments]:
    """The evaluations that ``--reference`` asks for, one of each path, into folders of their own."""
    names = _names(asked.compared)
    return [
        replace(asked, compared=[], output_dir=asked.output_dir / name, **_subject(path))
        for path, name in zip(asked.compared, names, strict=True)
    ]


def compare(paths: Sequence[Path], output: Path) -> None:
    """Writes ``comparison.json``, ``comparison.md`` and ``comparison.png`` of finished evaluations.

    Args:
        paths: output folders of `mnif eval`, or run folders with one at RUN/eval.
        output: the folder.

    Raises:
        UserError: a path holds no evaluation, or two were measured under different protocols.
    """
    evaluations = [
        Evaluation(name, folder, read_json(folder / "metrics.json"))
        for name, folder in zip(_names(paths), map(_folder_of, paths), strict=True)
    ]
    protocol = _common_protocol(evaluations)
    figures = [evaluation.figures for evaluation in evaluations]
    table = markdown_table(["figure", *(evaluation.name for evaluation in evaluations)], table_rows(figures))
    content = {
        "command": command_line(),
        "protocol": protocol,
        "evaluations": [
            {"name": evaluation.name, "folder": str(evaluation.folder), "figures": evaluation.figures}
            for evaluation in evaluations
        ],
    }
    write_json(output / "comparison.json", content)
    with written_atomically(output / "comparison.md") as temporary:
        temporary.write_text(f"{table}\n{protocol_line(protocol)}\n\n`{command_line()}`\n")
    plot = comparison_plot({evaluation.name: evaluation.figures for evaluation in evaluations})
    if plot is not None:
        with written_atomically(output / "comparison.png") as temporary:
            temporary.write_bytes(plot)
    print(f"{table}\n{output}: comparison.json, comparison.md{' and comparison.png' if plot else ''} written")


def _subject(path: Path) -> dict[str, Any]:
    """What a path is, as a flag."""
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
    """The paths without what all have in common."""
    absolute = [path.absolute() for path in paths]
    if len(set(absolute)) < len(absolute):
        raise UserError("the same folder is given twice; there is nothing to compare")
    common = Path(os.path.commonpath(absolute))
    relative = [path.relative_to(common) if path != common else Path(path.name) for path in absolute]
    return ["-".join(path.parts) for path in relative]


def _common_protocol(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """What all were measured under; numbers of different protocols do not belong in one table."""
    first, *others = evaluations
    protocol = first.figures.get("protocol", {})
    for other in others:
        theirs = other.figures.get("protocol", {})
        for name in sorted((protocol.keys() | theirs.keys()) - _MAY_DIFFER):
            if protocol.get(name) != theirs.get(name):
                raise UserError(
                    f"{first.name} was measured with {name.replace('_', ' ')} {protocol.get(name)}, {other.name} with "
                    f"{theirs.get(name)}; their figures cannot be compared: evaluate them alike"
                )
    return {name: value for name, value in protocol.items() if name not in _MAY_DIFFER}
