"""What a run folder remembers: what a command was asked to do there, whether it has finished, and its curves."""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mnif.utils.errors import UserError
from mnif.utils.files import flush_to_disk, write_errors_of, write_json, written_atomically
from mnif.utils.json_files import parse_json, read_json
from mnif.utils.process import command_line


class MetricsLog:
    """Appends rows to a run's ``metrics.jsonl``; a resumed stage first drops its rows beyond the step it starts at.

    Rows are dropped by writing a new file in the place of the old one, so that a kill leaves one or the other.

    Args:
        path: the file; made at the first row.
        stage: the command's name, in every row.
        step: the step the stage starts at.
    """

    def __init__(self, path: Path, stage: str, step: int):
        self.path, self.stage = path, stage
        if path.exists():
            kept = [row for row in read_metrics_log(path) if row["stage"] != stage or row["step"] <= step]
            with written_atomically(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        """Appends one row: stage, step, seconds of training so far, and the figures."""
        row = {"stage": self.stage, "step": step, "seconds": round(seconds, 3), **metrics}
        with write_errors_of(self.path), self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Waits until the rows would outlive a power cut: before the checkpoint that a resumed stage starts at."""
        if self.path.exists():
            flush_to_disk(self.path)
            flush_to_disk(self.path.parent)


class MetricsRow(msgspec.Struct):
    """What every row of a ``metrics.jsonl`` has; whatever else is there is a figure."""

    stage: str
    step: Annotated[int, Meta(ge=0)]
    seconds: Annotated[float, Meta(ge=0)]


def read_metrics_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut off by a kill is left out.

    Raises:
        UserError: the file is missing, or another line is damaged.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    *lines, last = path.read_bytes().split(b"\n")
    rows = [_metrics_row(line, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if last.strip():
        with contextlib.suppress(UserError):
            rows.append(_metrics_row(last, str(path)))
    return rows


def _metrics_row(line: bytes, where: str) -> dict[str, Any]:
    parse_json(line, MetricsRow, where)
    row = parse_json(line, dict[str, int | float | str | None], where)
    for name, value in row.items():
        if isinstance(value, str) and name != "stage":
            raise UserError(f"{where}: {name} is a text; a number is needed")
    return row


# Flags that change where a run's result goes or how fast it comes, not what it is.
_CONVENIENCES = {
    "output_dir",
    "run",
    "resume_from_checkpoint",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "report_to",
    "dataloader_num_workers",
    "compile",
    "batch_size",
    "max_image_pixels",
    "push_to_hub",
    "hub_model_id",
}


class StageRecord(msgspec.Struct):
    """What ``run.json`` holds of a stage: its flags and the fingerprints of what it read, each as a text."""

    command: str
    arguments: dict[str, str] = {}
    inputs: dict[str, str] = {}
    finished: bool = False


def read_run_record(run: Path) -> dict[str, StageRecord]:
    """Reads ``run.json``: what the run folder holds of each stage, by the command's name.

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_json(run / "run.json", dict[str, StageRecord])


def begin_stage(folder: Path, stage: str, arguments: Any, inputs: dict[str, str]) -> bool:
    """Notes in ``folder/run.json`` that ``stage`` runs with ``arguments``.

    Args:
        folder: the run folder, made if it is missing.
        stage: the command's name.
        arguments: its dataclass; ``resume_from_checkpoint="no"`` forgets what the stage has done here before.
        inputs: fingerprints of what it reads.

    Returns:
        True if the same stage with the same arguments and inputs has finished here before.

    Raises:
        UserError: the folder holds this stage with other arguments or inputs.
    """
    path = folder / "run.json"
    requested = {key: str(value) for key, value in asdict(arguments).items() if key not in _CONVENIENCES}
    record = read_run_record(folder) if path.exists() else {}
    before = record.get(stage)
    if before is not None and arguments.resume_from_checkpoint != "no":
        for name, old, new in _differences(before.arguments | before.inputs, requested | inputs):
            raise UserError(
                f"{folder} holds a `{stage}` with {name} {old} where now it is {new}; "
                "choose another run folder, or begin anew with --resume_from_checkpoint no"
            )
        if before.finished:
            return True
    record[stage] = StageRecord(command_line(), requested, inputs)
    write_json(path, msgspec.to_builtins(record))
    return False


def finish_stage(folder: Path, stage: str) -> None:
    """Notes in ``folder/run.json`` that ``stage`` is done."""
    record = read_run_record(folder)
    if stage not in record:
        raise UserError(f"{folder / 'run.json'}: lost its {stage} while that ran; give the command again")
    record[stage].finished = True
    write_json(folder / "run.json", msgspec.to_builtins(record))


def _differences(before: dict[str, str], now: dict[str, str]) -> Iterable[tuple[str, str | None, str | None]]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield name, _short(before.get(name)), _short(now.get(name))


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= 24 else text[:12] + "…"
