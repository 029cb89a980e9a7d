"""JSON that is read on a board: nothing in it is trusted before it has the form that its reader states."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_JSON_BYTES = 8 << 20


def read_json(path: Path) -> Any:
    """Reads JSON that may be damaged or hostile.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, no JSON, nested too deep, or holds NaN or a number beyond what is counted.
    """
    if path.stat().st_size > _JSON_BYTES:
        raise ValueError(f"more than {_JSON_BYTES} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_int=_integer, parse_constant=_integer)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _integer(text: str) -> int:
    if len(text) > 18 or text.startswith(("N", "I", "-I")):
        raise ValueError(f"{text[:24]} is no usable number")
    return int(text)


def check_form(value: Any, form: Any, where: str = "the manifest") -> None:
    """Checks content of JSON.

    Args:
        value: the content.
        form: a type; a range, for whole numbers in it; a tuple of forms, one of which must fit, or None; a list of one
            form, for lists of such; an object of forms by key, all of which must be there, or with the key ``str``,
            one form for all. ``float`` takes whole numbers too, and nothing infinite.
        where: what it is, for the message.

    Raises:
        ValueError: it is not of that form.
    """
    if isinstance(form, tuple):
        if value is None and None in form:
            return
        form = next((each for each in form if each is not None and isinstance(value, _kind_of(each))), form[0])
    fits = isinstance(value, _kind_of(form)) and not isinstance(value, bool)
    if fits and isinstance(form, range):
        fits = value in form
    if fits and form is float:
        fits = math.isfinite(value)
    if not fits:
        raise ValueError(f"{where} is {str(value)[:40]!r}")
    if isinstance(form, list):
        for index, each in enumerate(value):
            check_form(each, form[0], f"{where}[{index}]")
    elif isinstance(form, dict):
        for key in value if str in form else form:
            if key not in value:
                raise ValueError(f"{where} has no {key}")
            check_form(value[key], form.get(str, form.get(key)), f"{where}.{key}")


def _kind_of(form: Any) -> Any:
    """The types of Python that a form is about."""
    if form is float:
        return (int, float)
    return form if isinstance(form, type) else int if isinstance(form, range) else type(form)
