"""Flags from dataclasses: which of them are given, and values that do not come from the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mnif.utils.args import parse_given
from mnif.utils.errors import UserError
from mnif.utils.flag_files import typed_values


@dataclass(kw_only=True)
class Arguments:
    """A command."""

    data: str
    width: int = 24
    rate: float = 0.5
    flip: bool = False
    mirror: bool = True
    mixing: Literal["delta", "average"] = "delta"
    channels: Literal[1, 3] = 3
    resolution: list[int] | None = None
    steps: tuple[int, ...] = (1, 2)
    tables: list[Path] | None = None


def test_only_flags_on_the_command_line_are_given() -> None:
    assert parse_given(Arguments, ["--data", "x"], "mnif test") == {"data": "x"}
    typed = ["--data=x", "--width", "24", "--flip", "--no-mirror", "--resolution", "8", "9", "--tables", "a"]
    values = {"data": "x", "width": 24, "flip": True, "mirror": False, "resolution": [8, 9], "tables": [Path("a")]}
    assert parse_given(Arguments, typed, "mnif test") == values


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--width", "8"], "--data: needed and not given"),
        (["--data", "x", "--width", "wide"], "--width wide: must be a whole number"),
        (["--data", "x", "--width", "8", "9"], "--width 8 9: one value is needed"),
        (["--data", "x", "--resolution", "8", "nine"], "--resolution 8 nine: must be a whole number"),
        (["--data", "x", "--rate=fast"], "--rate fast: must be a number"),
        (["--data", "x", "--mixing", "stirred"], "--mixing stirred: must be one of delta, average"),
        (["--data", "x", "--widht", "8"], "--widht: no such flag; did you mean --width?"),
        (["--data", "x", "--zzz"], "--zzz: no such flag"),
        (["--data", "x", "--no-width"], "--no_width: no such flag; did you mean --width?"),
        (["--data", "x", "--flip", "yes"], "--flip yes: it takes no value; --no_flip turns it off"),
        (["--data"], "--data: a value is needed"),
        (["x", "--width", "8"], "'x' belongs to no flag"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_that_names_the_flag(typed: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_given(Arguments, typed, "mnif test")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("width", 8, 8),
        ("width", "8", 8),
        ("rate", 30, 30.0),
        ("rate", "1e-3", 0.001),
        ("flip", True, True),
        ("flip", "false", False),
        ("mixing", "average", "average"),
        ("channels", "1", 1),
        ("resolution", 16, [16]),
        ("resolution", [16, 32], [16, 32]),
        ("resolution", None, None),
        ("steps", [4], (4,)),
        ("tables", "a", [Path("a")]),
    ],
)
def test_values_become_what_the_field_holds(name: str, value: object, typed: Any) -> None:
    (found,) = typed_values(Arguments, {name: value}).values()
    assert found == typed
    assert type(found) is type(typed)
