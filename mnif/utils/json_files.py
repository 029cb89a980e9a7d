"""JSON that is read from disk: nothing in it is trusted before it has the types and ranges that its reader states.

The types are msgspec's, and stand beside the code that reads a file. Whatever is wrong is a :class:`UserError` that
names the file and the place in it. Of a key that occurs twice, the last one counts.
"""

import functools
import inspect
import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints, overload

import msgspec
import numpy as np
from msgspec import Meta, Struct

from mnif.utils.errors import UserError
from mnif.utils.files import write_json

_LARGEST = 16 << 20  # bytes: what is read of so many holds less than a gigabyte, whatever it is
_SHOWN = 300  # characters
_DEEPEST = 32  # lists and objects within one another
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # one without an end, too, is passed only once

T = TypeVar("T")

Size = Annotated[int, Meta(ge=1, le=1 << 20)]
"""How many there are of something that takes memory."""

Depth = Annotated[int, Meta(ge=0, le=256)]
"""How many layers or blocks there are: Python makes them one by one."""


@overload
def read_json(path: Path, *, largest: int = _LARGEST) -> dict[str, Any]: ...


@overload
def read_json(path: Path, kind: type[T], largest: int = _LARGEST) -> T: ...


def read_json(path: Path, kind: Any = dict[str, Any], largest: int = _LARGEST) -> Any:
    """Reads a JSON file.

    Args:
        path: the file.
        kind: the type of its content, for msgspec; default: an object of anything.
        largest: bytes it may have.

    Raises:
        UserError: the file is missing, too large or not JSON, or its content is of another type.
    """
    return parse_json(_content(path, largest), kind, str(path))


def read_object(path: Path, known: type[Struct], largest: int = _LARGEST) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
        path: the file.
        known: the types of some of its entries; others may hold anything.
        largest: bytes it may have.

    Returns:
        All entries, as the file has them.

    Raises:
        UserError: as :func:`read_json`.
    """
    content = _content(path, largest)
    parse_json(content, known, str(path))
    return parse_json(content, dict[str, Any], str(path))


def parse_json(content: bytes, kind: type[T], where: str) -> T:
    """Reads JSON that lies somewhere else than in a file of its own; ``where`` says so in messages.

    Raises:
        UserError: it is not JSON, or of another type.
    """
    try:
        content.decode()
        if _depth(content) > _DEEPEST:
            raise UserError(f"{where}: lists or objects lie more than {_DEEPEST} deep in one another")
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {_reason(error)}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{where}: not a JSON file ({error})") from None


def check_type(content: Any, kind: type[T], where: str) -> T:
    """Gives content that is JSON's already as ``kind``; ``where`` names it in messages.

    Raises:
        UserError: it is of another type.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}: {_reason(error)}") from None


@functools.cache
def arguments_schema(kind: Any) -> type[Struct]:
    """Makes the type of an object that holds a constructor's arguments, each as it is annotated there, and no others.

    Entries that begin with an underscore are diffusers' own.
    """
    hints = get_type_hints(kind.__init__, include_extras=True)
    fields: list[Any] = [
        ("class_name", str | None, msgspec.field(default=None, name="_class_name")),
        ("diffusers_version", str | None, msgspec.field(default=None, name="_diffusers_version")),
        ("name_or_path", str | None, msgspec.field(default=None, name="_name_or_path")),
    ]
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        hint = _known(hints.get(name, Any))
        default = msgspec.NODEFAULT if parameter.default is parameter.empty else parameter.default
        if isinstance(default, (list, dict, set)):
            default = msgspec.field(default_factory=functools.partial(type(default), default))
        fields.append((name, hint, default))
    return msgspec.defstruct(kind.__name__, fields, forbid_unknown_fields=True, kw_only=True)


def _known(hint: Any) -> Any:
    """An annotation that msgspec can check; of others, as a signal of one's own may have, anything is taken."""
    try:
        msgspec.json.Decoder(hint)
    except TypeError:
        return Any
    return hint


def merge_json(path: Path, metrics: dict[str, Any]) -> None:
    """Adds ``metrics`` to the JSON object in ``path``, which is made if it is missing."""
    write_json(path, (read_json(path) if path.exists() else {}) | metrics)


def _content(path: Path, largest: int) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    if (size := path.stat().st_size) > largest:
        raise UserError(f"{path}: {size:,} bytes; a file of this kind has {largest:,} at most")
    return path.read_bytes()


def _depth(content: bytes) -> int:
    """The most lists and objects that lie in one another, if brackets are all that counts."""
    marks = np.frombuffer(_STRING.sub(b"", content), dtype=np.uint8)
    opened = (marks == ord("[")) | (marks == ord("{"))
    closed = (marks == ord("]")) | (marks == ord("}"))
    steps = opened.astype(np.int32) - closed
    return int(steps.cumsum(dtype=np.int32).max(initial=0))


def _reason(error: msgspec.ValidationError) -> str:
    """``layers[2].width: Expected `int`, got `str```: the place first, and no more of a value than fits on a line."""
    reason, _, place = str(error).rpartition(" - at `")
    if not reason:
        return str(error)[:_SHOWN]
    return f"{place.rstrip('`').removeprefix('$').removeprefix('.')}: {reason[:_SHOWN]}"
