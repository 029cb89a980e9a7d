"""Flags from dataclasses: a command's dataclass is its command line."""

import contextlib
import io
import re
from typing import TypeVar

import tyro

from mnif.errors import UserError

T = TypeVar("T")


def parse_arguments(command: type[T], arguments: list[str], program: str, default: T | None = None) -> T:
    """Reads a command's flags.

    Args:
        command: a dataclass; its fields are the flags, its docstring and theirs the help.
        arguments: what follows the command on the command line.
        program: such as ``mnif fit``.
        default: an instance to take defaults from, instead of the class's own.

    Raises:
        UserError: an unknown flag, a missing one, or a value of the wrong kind.
    """
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            config = (tyro.conf.OmitArgPrefixes,)
            found = tyro.cli(
                command, args=arguments, prog=program, default=default, config=config, use_underscores=True
            )
            assert found is not None
            return found
    except SystemExit as stop:
        if not stop.code:
            raise
    text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]", " ", message.getvalue())
    raise UserError(" ".join(text.split()) or "unusable arguments")
