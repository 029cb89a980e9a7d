"""Flags from dataclasses: a command's dataclass is its command line; a preset is other defaults for it."""

import contextlib
import dataclasses
import io
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import tyro

from mnif.utils.errors import UserError
from mnif.utils.files import read_json

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


def given_flag(arguments: list[str], name: str) -> str | None:
    """The value a flag is given, before anything is parsed; the last one counts."""
    value = None
    for index, argument in enumerate(arguments):
        flag, equals, joined = argument.partition("=")
        if flag.replace("-", "_") == f"__{name}":  # tyro takes either
            value = joined if equals else next(iter(arguments[index + 1 :]), None)
    return value


def preset_names(folder: Path) -> list[str]:
    """The presets that come with a command."""
    return sorted(path.stem for path in folder.glob("*.json"))


def read_preset(name: str, folder: Path) -> dict[str, Any]:
    """The preset of a name in ``folder``, or at a path: an object that holds at least ``arguments``, an object.

    Raises:
        UserError: there is no such preset, or it is something else.
    """
    path = folder / f"{name}.json"
    path = path if path.is_file() else Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise UserError(f"--preset {name}: neither a JSON file nor one of {', '.join(preset_names(folder))}")
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("arguments"), dict):
        raise UserError(f'--preset {name}: an object with "arguments", an object, is needed')
    return content


def preset_defaults(
    command: type[T],
    preset: dict[str, Any],
    named: str | None,
    program: str,
    required: Iterable[str],
    fixed: Collection[str],
) -> T:
    """The flags as a preset has them; what it says is checked as if it were typed.

    Args:
        command: the dataclass.
        preset: flags and their values.
        named: what the preset is called, for messages.
        program: such as ``mnif fit``.
        required: flags without a default.
        fixed: flags that are no business of a preset.

    Raises:
        UserError: it sets an unknown flag, one of ``fixed``, or a value of the wrong kind.
    """
    known = {field.name for field in dataclasses.fields(command)} - set(fixed)  # type: ignore[arg-type]
    unknown = sorted(set(preset) - known)
    if unknown:
        raise UserError(
            f"--preset {named}: a preset cannot set {unknown[0]!r}; its arguments are flags of `{program}`"
        )
    typed = [part for name in required for part in (f"--{name}", "")]
    for name, value in preset.items():
        if isinstance(value, bool):
            typed.append(f"--{name}" if value else f"--no-{name}")
        else:
            typed += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    try:
        return parse_arguments(command, typed, program)
    except UserError as error:
        raise UserError(f"--preset {named}: {error}") from None
