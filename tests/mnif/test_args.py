"""Flags from dataclasses: which of them are given, and values that do not come from the command line."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mnif.utils.args import parse_given, typed_values
from mnif.utils.errors import UserError


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
        (["--width", "8"], "--data"),
        (["--data", "x", "--width", "wide"], "Error parsing --width"),
        (["--data", "x", "--mixing", "stirred"], "invalid choice 'stirred' for argument '--mixing'"),
        (["--data", "x", "--widht", "8"], "Unrecognized options: --widht"),
        (["--data"], "Missing value for argument '--data'"),
    ],
)
def test_what_cannot_be_parsed_is_one_line_that_names_the_flag(typed: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_given(Arguments, typed, "mnif test")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


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
