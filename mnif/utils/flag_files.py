"""Flags that do not come from the command line: what kind their values are, presets, and what --config reads."""

import contextlib
import json
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically
from mnif.utils.json_files import read_json, read_object

_LARGEST_CONFIG = 1 << 20  # bytes


_Value = bool | int | float | str | None

Flags = dict[str, _Value | list[_Value]]
"""Flags by name with their values, as JSON has them."""


def read_config(path: Path, command: type, program: str) -> dict[str, Any]:
    """The flags that a file sets, as the command's dataclass holds them.

    Args:
        path: YAML or JSON: flags and their values, or such an object for each of several commands, as in a run's
            ``config.yaml``.
        command: the dataclass.
        program: such as ``mnif fit``.

    Raises:
        UserError: the file is missing or damaged, has nothing for this command, sets an unknown flag, or a value of
            the wrong kind.
    """
    name, kinds = program.split()[-1], get_type_hints(command)
    try:
        content = read_json(path, dict[str, Any]) if path.suffix == ".json" else _read_yaml(path)
        sections = [key for key, value in content.items() if isinstance(value, dict)]
        if sections and name not in sections:
            raise UserError(f"{path}: it holds flags of {', '.join(sections)}, none of `{program}`")
        flags = parse_values(content[name] if sections else content, str(path))
        if unknown := [key for key in flags if key not in kinds]:
            similar = get_close_matches(unknown[0], kinds, n=1)
            meant = f"did you mean {similar[0]}?" if similar else f"{program} --help lists them"
            raise UserError(f"{path}: no such flag: {', '.join(unknown)}; {meant}")
    except UserError as error:
        raise UserError(f"--config {error}") from None
    try:
        return typed_values(command, flags)
    except UserError as error:
        raise UserError(f"--config {path}: {error}") from None


def parse_values(content: Any, where: str) -> dict[str, Any]:
    """Flags and their values as a file has them, if that is what they are.

    Raises:
        UserError: they are something else.
    """
    try:
        return msgspec.convert(content, Flags)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {error}; flags and their values are needed, such as `width: 24`") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file, whose scalars stay the texts they are: the flag tells what they mean, and "no" is not false."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise UserError(f"{path}: larger than {_LARGEST_CONFIG >> 20} MB; this is no file of flags")
    try:
        content = yaml.load(path.read_bytes(), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: too many lists within one another") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: flags and their values are needed, such as `width: 24`")
    return content


def write_config(path: Path, commands: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes flags by command as ``--config`` reads them."""
    with written_atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(commands), sort_keys=False, allow_unicode=True), encoding="utf-8")


def laid_over(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Flags that are given, over those of a preset or a file; a number of steps is given in place of their epochs."""
    without = {"num_train_epochs"} if "max_train_steps" in given else set()
    return {name: value for name, value in settings.items() if name not in without} | dict(given)


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
            typed[name] = typed_value(kinds[name], value)
        except ValueError as error:
            raise UserError(f"--{name} {value}: {error}") from None
    return typed


def typed_value(kind: Any, value: Any) -> Any:
    """Raises a ValueError that says what is needed."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):  # of a type and None
        return None if value in (None, "None", "null", "~", "") else typed_value(inner[0], value)
    if origin in (list, tuple):
        return origin(typed_value(inner[0], item) for item in (value if isinstance(value, list) else [value]))
    if isinstance(value, list):
        raise ValueError("one value is needed")
    text = value if isinstance(value, str) else json.dumps(value)
    text = text.lower() if kind is bool else text
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


class Preset(msgspec.Struct):
    """A preset: flags by name with their values, as JSON has them, and whatever else it tells."""

    arguments: Flags


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
