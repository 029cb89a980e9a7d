"""What a run folder remembers: what a command was asked to do there, whether it has finished, and its curves.

``run.json`` is what commands go by; ``config.yaml`` has the same flags for ``--config``.
"""

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mnif.utils.errors import UserError
from mnif.utils.files import flush_to_disk, write_errors_of, write_json, written_atomically
from mnif.utils.flag_files import Flags, write_config
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
    "tracker_project_name",
    "data_on_device",
    "dataloader_num_workers",
    "compile",
    "batch_size",
    "max_image_pixels",
    "push_to_hub",
    "hub_model_id",
}

# Flags of one call, which a file for further runs does not have.
_OF_ONE_CALL = {"resume_from_checkpoint", "dry_run", "push_to_hub", "hub_model_id"}

_LENGTHS = {"max_train_steps", "num_train_epochs"}


class StageRecord(msgspec.Struct):
    """What ``run.json`` holds of a stage: its flags, and the fingerprints of what it read.

    Older versions wrote each flag as a text; such a run can be continued as before.
    """

    command: str
    arguments: Flags = {}
    inputs: dict[str, str] = {}
    finished: bool = False


STAGE_ONE = ("grow", "fit")
"""The commands that learn bases; a run folder has one of them."""


def stage_one_of(record: Mapping[str, StageRecord]) -> tuple[str, StageRecord] | None:
    """Finds which command learned the bases of a run, and what is recorded of it; None if it is not known."""
    return next(((stage, record[stage]) for stage in STAGE_ONE if stage in record), None)


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
        UserError: the folder holds this stage with other arguments or inputs. More steps are no other arguments where
            the learning rate does not depend on their number: the stage goes on from its last checkpoint.
    """
    path = folder / "run.json"
    requested = flags_as_json(arguments)
    record = read_run_record(folder) if path.exists() else {}
    before = record.get(stage)
    if before is not None and arguments.resume_from_checkpoint != "no":
        texts = {name: str(value) for name, value in asdict(arguments).items()}  # as older versions wrote them
        differing = _differences(before.arguments, requested, texts) | _differences(before.inputs, inputs)
        longer = differing.keys() <= _LENGTHS and _can_be_longer(before.arguments, requested)
        if differing and not longer:
            raise UserError(_refusal(folder, stage, differing, requested))
        if before.finished and not longer:
            return True
    record[stage] = StageRecord(command_line(), requested, inputs)
    write_json(path, msgspec.to_builtins(record))
    write_config(folder / "config.yaml", {name: for_further_runs(each.arguments) for name, each in record.items()})
    return False


def check_finished(folder: Path, stage: str) -> None:
    """Refuses a run whose ``stage`` was begun and is not done; a folder without a record of it may hold its results.

    Raises:
        UserError: it is not done.
    """
    record = read_run_record(folder) if (folder / "run.json").exists() else {}
    if stage in record and not record[stage].finished:
        raise UserError(f"{folder}: its `mnif {stage}` has not finished; continue it with: {record[stage].command}")


def flags_as_json(arguments: Any) -> Flags:
    """The flags of a command's dataclass as JSON has them; of names that are no UTF-8 the bytes are written out."""
    return {name: _as_json(value) for name, value in asdict(arguments).items()}


def _as_json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, str | Path):
        return str(value).encode("utf-8", "backslashreplace").decode()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def for_further_runs(flags: Flags) -> Flags:
    """Those of the flags that a ``config.yaml`` has: what was given or filled in, and is not of one call only."""
    return {name: value for name, value in flags.items() if value is not None and name not in _OF_ONE_CALL}


def finish_stage(folder: Path, stage: str) -> None:
    """Notes in ``folder/run.json`` that ``stage`` is done."""
    record = read_run_record(folder)
    if stage not in record:
        raise UserError(f"{folder / 'run.json'}: lost its {stage} while that ran; give the command again")
    record[stage].finished = True
    write_json(folder / "run.json", msgspec.to_builtins(record))


def _differences(
    before: Mapping[str, Any], now: Mapping[str, Any], texts: Mapping[str, str] = MappingProxyType({})
) -> dict[str, tuple[Any, Any]]:
    """Flags or inputs that are others now, by name; one that was not known before is as if it had not been given."""
    pairs = {name: (before.get(name), now.get(name)) for name in sorted(before.keys() | now.keys())}
    return {
        name: (old, new)
        for name, (old, new) in pairs.items()
        if name not in _CONVENIENCES and old != new and old != texts.get(name)
    }


def _can_be_longer(before: Flags, now: Flags) -> bool:
    """Whether more steps leave those that were taken what they were: the learning rate knows nothing of their number.

    A warm-up is no longer than the run, so one that was cut short is not what it would be now.
    """
    steps, schedule = _count(before, "max_train_steps"), now.get("lr_scheduler")
    warmed_up = schedule == "constant_with_warmup" and steps >= _count(now, "lr_warmup_steps")
    return (schedule == "constant" or warmed_up) and _count(now, "max_train_steps") > steps > 0


def _count(flags: Flags, name: str) -> int:
    text = str(flags.get(name))  # a damaged record may hold anything
    return int(text) if text.isdecimal() and len(text) < 16 else 0


def _refusal(folder: Path, stage: str, differing: dict[str, tuple[Any, Any]], requested: Flags) -> str:
    name, (old, new) = next(iter(differing.items()))
    said = f"{folder} holds a `{stage}` with {name} {_short(old)} where now it is {_short(new)}"
    if differing.keys() <= _LENGTHS:
        said += (
            f"; of a run with --lr_scheduler {requested.get('lr_scheduler')} the steps before would have been others"
        )
        said += ", only one with a constant learning rate can be made longer"
    return f"{said}; choose another run folder, or begin anew with --resume_from_checkpoint no"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
