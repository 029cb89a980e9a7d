"""Flags from dataclasses: a command's dataclass is its command line; a preset is other defaults for it."""

import contextlib
import io
import json
from collections.abc import Collection
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import tyro

from mnif.utils.errors import UserError
from mnif.utils.json_files import read_object

T = TypeVar("T")


def parse_arguments(command: type[T], arguments: list[str], program: str) -> T:
    """Reads a command's flags.

    Args:
        command: a dataclass; its fields are the flags, its docstring and theirs the help.
        arguments: what follows the command on the command line.
        program: such as ``mnif fit``.

    Raises:
        UserError: an unknown flag, a missing one, or a value of the wrong kind.
    """
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro's complaint, a box of several lines
            config = (tyro.conf.OmitArgPrefixes,)
            return tyro.cli(command, args=arguments, prog=program, config=config, use_underscores=True)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(_complaint(command, arguments) or f"unusable arguments; see {program} --help")


def _complaint(command: type, arguments: list[str]) -> str | None:
    """Says in one line what is wrong with arguments that were refused."""
    kinds = get_type_hints(command)
    words, flags = _words_of_flags(arguments)
    if words:
        return f"{words[0]!r} belongs to no flag"
    for name, values in flags.items():
        kind = bool if name.startswith("no_") and kinds.get(name[3:]) is bool else kinds.get(name)
        if kind is None:
            similar = get_close_matches(name, kinds, n=1)
            return f"--{name}: no such flag" + (f"; did you mean --{similar[0]}?" if similar else "")
        if kind is bool and values:
            return f"--{name} {values[0]}: it takes no value; --no_{name} turns it off"
        if kind is not bool and not values:
            return f"--{name}: a value is needed"
        if kind is not bool:
            try:
                _typed(kind, values if len(values) > 1 else values[0])
            except ValueError as error:
                return f"--{name} {' '.join(values)}: {error}"
    needed = (field.name for field in fields(command) if field.default is field.default_factory is MISSING)
    missing = [f"--{name}" for name in needed if name not in flags]
    return f"{', '.join(missing)}: needed and not given" if missing else None


def _words_of_flags(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Splits arguments into the words before the first flag, and each flag's words by its name with underscores."""
    words: list[str] = []
    before, flags = words, dict[str, list[str]]()
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            words = flags.setdefault(name.replace("-", "_"), [])
            words.extend([value] if equals else [])
        else:
            words.append(argument)
    return before, flags


def parse_given(command: type, arguments: list[str], program: str) -> dict[str, Any]:
    """Reads a command's flags as :func:`parse_arguments` does, but gives only those that are on the command line.

    Raises:
        UserError: an unknown flag, a missing one, or a value of the wrong kind.
    """
    parse_arguments(command, arguments, program)  # for its help and its messages, which show the defaults
    given = TypedDict("given", get_type_hints(command), total=False)  # type: ignore[misc]
    return {**parse_arguments(given, arguments, program)}


def typed_values(command: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of flags as the fields of the command's dataclass hold them.

    Args:
        command: the dataclass.
        values: for each flag a value of JSON, or its text; one value stands for a list of one.

    Raises:
        UserError: a value is of another type than its flag.
    """
    kinds, typed = get_type_hints(command), {}
    for name, value in values.items():
        try:
            typed[name] = _typed(kinds[name], value)
        except ValueError as error:
            raise UserError(f"--{name} {value}: {error}") from None
    return typed


def _typed(kind: Any, value: Any) -> Any:
    """Raises a ValueError that says what is needed."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # of a type and None
        return None if value in (None, "None") else _typed(inner[0], value)
    if origin in (list, tuple):
        return origin(_typed(inner[0], item) for item in (value if isinstance(value, list) else [value]))
    if isinstance(value, list):
        raise ValueError("one value is needed")
    text = value if isinstance(value, str) else json.dumps(value)
    choices = {"true": True, "false": False} if kind is bool else {str(choice): choice for choice in inner}
    if text in choices:
        return choices[text]
    if kind is bool:
        raise ValueError("must be true or false")
    if origin is Literal:
        raise ValueError(f"must be one of {', '.join(choices)}")
    if kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
        raise ValueError("must be a whole number" if kind is int else "must be a number")
    if not isinstance(value, str):
        raise ValueError("must be a text")
    return kind(value)


def preset_names(folder: Path) -> list[str]:
    """The presets that come with a command."""
    return sorted(path.stem for path in folder.glob("*.json"))


_FlagValue = bool | int | float | str | None


class Preset(msgspec.Struct):
    """A preset: flags by name with their values, as JSON has them, and whatever else it tells."""

    arguments: dict[str, bool | int | float | str | list[_FlagValue] | None]


def read_preset(name: str, folder: Path) -> dict[str, Any]:
    """The preset of a name in ``folder``, or at a path: an object that holds at least ``arguments``, an object.

    Raises:
        UserError: there is no such preset, or it is something else.
    """
    path = folder / f"{name}.json"
    path = path if path.is_file() else Path(name)
    if path.suffix != ".json" or not path.is_file():
        raise UserError(f"--preset {name}: neither a JSON file nor one of {', '.join(preset_names(folder))}")
    try:
        return read_object(path, Preset)
    except UserError as error:
        raise UserError(f"--preset {error}") from None


def preset_values(
    command: type, preset: dict[str, Any], named: str | None, program: str, fixed: Collection[str]
) -> dict[str, Any]:
    """The flags that a preset sets, as the command's dataclass holds them.

    Args:
        command: the dataclass.
        preset: flags and their values, as JSON has them.
        named: what the preset is called, for messages.
        program: such as ``mnif fit``.
        fixed: flags that are no business of a preset.

    Raises:
        UserError: it sets an unknown flag, one of ``fixed``, or a value of the wrong type.
    """
    for name in preset:
        if name in fixed or name not in get_type_hints(command):
            raise UserError(f"--preset {named}: a preset cannot set {name!r}; its arguments are flags of `{program}`")
    try:
        return typed_values(command, preset)
    except UserError as error:
        raise UserError(f"--preset {named}: {error}") from None
