"""A run's curves: rows of figures over steps in ``metrics.jsonl``."""

import json
from pathlib import Path
from typing import Any

from mnif.files import flush_to_disk, written_atomically


class Curves:
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
            kept = [row for row in read_curves(path) if row["stage"] != stage or row["step"] <= step]
            with written_atomically(path) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        """Appends one row: stage, step, seconds of training so far, and the figures."""
        row = {"stage": self.stage, "step": step, "seconds": round(seconds, 3), **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Waits until the rows would outlive a power cut: before the checkpoint that a resumed stage starts at."""
        if self.path.exists():
            flush_to_disk(self.path)
            flush_to_disk(self.path.parent)


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
