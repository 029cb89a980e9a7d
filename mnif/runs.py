"""Run folders: what a command was asked to do there, and whether it has finished."""

import resource
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from mnif.errors import UserError
from mnif.files import read_json, write_json
from mnif.training import TrainingArguments

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
}


def begin_stage(folder: Path, stage: str, arguments: TrainingArguments, inputs: dict[str, str]) -> bool:
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
    asked = {key: str(value) for key, value in asdict(arguments).items() if key not in _CONVENIENCES}
    record = read_json(path) if path.exists() else {}
    before = record.get(stage)
    if before is not None and arguments.resume_from_checkpoint != "no":
        for name, old, new in _differences(before["arguments"] | before["inputs"], asked | inputs):
            raise UserError(
                f"{folder} holds a `{stage}` with {name} {old} where now it is {new}; "
                "choose another run folder, or begin anew with --resume_from_checkpoint no"
            )
        if before["finished"]:
            return True
    record[stage] = {"arguments": asked, "inputs": inputs, "command": command_line(), "finished": False}
    write_json(path, record)
    return False


def finish_stage(folder: Path, stage: str) -> None:
    """Notes in ``folder/run.json`` that ``stage`` is done."""
    record = read_json(folder / "run.json")
    record[stage]["finished"] = True
    write_json(folder / "run.json", record)


def command_line() -> str:
    """The command this process runs, as a user would type it."""
    return shlex.join(["mnif", *sys.argv[1:]])


def peak_memory_megabytes() -> float:
    """The largest resident set of this process so far, in MB (10⁶ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _differences(before: dict[str, str], now: dict[str, str]) -> Iterable[tuple[str, str | None, str | None]]:
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            yield name, _short(before.get(name)), _short(now.get(name))


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= 24 else text[:12] + "…"
