"""What the device's commands have in common: flags, and one line for what is wrong."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Callable, NoReturn, Sequence

from .backends import BACKENDS
from .bundle import BundleError
from .files import check_writable

MOST_THREADS = 1024  # backends fail in ways of their own above what a machine can start


def number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Makes the ``type`` of a flag that takes a whole number from ``least`` to ``most``."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"{value}: must be at most {most}")
        return value

    parse.__name__ = "whole number"  # argparse names it where the text is none
    return parse


class Parser(argparse.ArgumentParser):
    """Flags of one command; a mistake in them is one line and exit code 2.

    Args:
        command: such as ``"build"``.
        description: what it does.
    """

    def __init__(self, command: str, description: str):
        above = Path(__file__).resolve().parents[3]
        self._bundle = above if (above / "manifest.json").is_file() else None  # a copy in a bundle's device/ knows it
        called = f"mnif {command}" if self._bundle is None else f"device/{command}.py"
        super().__init__(prog=called, description=description)

    def add_bundle(self) -> None:
        """Adds the flag for the bundle; a copy inside one has it by itself."""
        alone = self._bundle is None
        self.add_argument("--bundle", type=Path, default=self._bundle, required=alone, help="the bundle's folder")

    def add_runtime(self) -> None:
        """Adds the flags of what runs a graph."""
        self.add_argument("--precision", choices=("fp32", "mixed"), help="default: what is there, fp32 first")
        self.add_argument("--backend", choices=("auto", *BACKENDS), default="auto")
        self.add_argument(
            "--threads", type=number(0, MOST_THREADS), default=0, help="of a backend on the CPU; 0 lets it choose"
        )

    def error(self, message: str) -> NoReturn:
        """Raises what :func:`run_command` shows."""
        raise BundleError(message)


def run_command(parser: Parser, arguments: list[str] | None, work: Callable[[Any], int]) -> int:
    """Parses and works; returns the exit code: 2 after one line about what is wrong, 130 after Ctrl-C.

    A SIGTERM ends it with 143, by way of whatever clears up. What the runtime logs (which backend it took and why)
    goes to stderr.
    """
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)
    try:
        options = parser.parse_args(arguments)
        logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
        return work(options)
    except BundleError as error:
        complaint = str(error)
    except KeyboardInterrupt as error:
        if type(error) is not KeyboardInterrupt:  # of `mnif`, which tells it apart
            raise
        print(f"{parser.prog}: stopped", file=sys.stderr)
        return 130
    except OSError as error:
        complaint = f"{error.filename or 'file system'}: {error.strerror or error}"
    print(f"{parser.prog}: {printable(complaint)}", file=sys.stderr)
    return 2


def _end(number: int, frame: Any) -> NoReturn:
    print("terminated", file=sys.stderr)
    sys.exit(143)


def printable(text: str) -> str:
    """Makes one line of a text that may hold a name from a manifest: what is no visible character is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


_OF_OTHER_COMMANDS = (
    *("run", "compare", "pilot", "manifest", "delta", "samples", "decode", "comparison", "metrics", "monitor"),
    "scores",
)  # their JSON files


def check_output_folder(folder: Path, own: str | None = None) -> None:
    """Makes sure, before any work is done, that a command may fill a folder; ``own`` is its JSON file, without suffix.

    Raises:
        BundleError: it is of another command, or nothing can be written there.
    """
    for name in _OF_OTHER_COMMANDS:
        if name != own and (folder / f"{name}.json").exists():
            raise BundleError(f"{folder} is of another command ({name}.json); choose another --output_dir")
    check_writable(folder)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lays rows out as lines whose cells stand under each other."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
