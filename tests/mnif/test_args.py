"""Flags from dataclasses: which of them are given, and values that do not come from the command line."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from mnif.utils.args import parse_given
from mnif.utils.errors import UserError
from mnif.utils.flag_files import typed_values, write_config


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


@dataclass(kw_only=True)
class ModelFlags:
    """Of the model."""

    width: int = 24
    """Hidden units
    of a field."""
    cells: int | None = None
    """Cells."""


@dataclass(kw_only=True)
class Trained(ModelFlags):
    """Learn."""

    data: str
    """What from."""
    width: int = 8
    """Fewer units."""
    num_train_epochs: int | None = None
    """Passes."""
    max_train_steps: int = 100
    """Steps."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Precision."""
    flip: bool = False
    """Mirror."""
    tables: list[Path] | None = None
    """Tables."""


def test_help_has_a_box_for_each_group_with_the_documentation_nearest_to_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_given(Trained, ["--help"], "mnif test")
    own, group = capsys.readouterr().out.split(" model options")
    assert "--data TEXT" in own
    assert "What from. (required)" in own
    assert "--flip, --no_flip" in own
    assert "--width INT" in group
    assert "Fewer units. (default: 8)" in group
    assert re.search(r"--cells INT +Cells\. *\n", group)


YAML = """
data: pictures
width: 16
mixed_precision: no
flip: True
tables: [a, b]
cells: null
num_train_epochs: 3
"""


def test_flags_given_win_over_those_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(YAML)
    config = ["--config", f"{tmp_path}/flags.yaml"]
    values = {"data": "pictures", "width": 16, "mixed_precision": "no", "flip": True, "cells": None}
    values |= {"tables": [Path("a"), Path("b")], "num_train_epochs": 3}
    assert parse_given(Trained, config, "mnif test") == values
    assert parse_given(Trained, [*config, "--width", "4", "--no_flip"], "mnif test") == values | {
        "width": 4,
        "flip": False,
    }
    del values["num_train_epochs"]  # a number of steps takes the place of epochs that stand elsewhere
    assert parse_given(Trained, [*config, "--max_train_steps", "7"], "mnif test") == values | {"max_train_steps": 7}


def test_a_file_may_be_json_and_may_have_several_commands(tmp_path: Path) -> None:
    (tmp_path / "flags.json").write_text(json.dumps({"data": "x", "width": 16, "tables": ["a"], "flip": True}))
    given = parse_given(Trained, ["--config", f"{tmp_path}/flags.json"], "mnif test")
    assert given == {"data": "x", "width": 16, "tables": [Path("a")], "flip": True}
    write_config(
        tmp_path / "config.yaml", {"test": {"data": "x", "mixed_precision": "no", "cells": None}, "other": {}}
    )
    given = parse_given(Trained, ["--config", f"{tmp_path}/config.yaml"], "mnif test")
    assert given == {"data": "x", "mixed_precision": "no", "cells": None}


BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b]\nd: [*c, *c, *c, *c, *c]\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("widht: 8", "no such flag: widht; did you mean width?"),
        ("zzz: 1\nyyy: 2", "no such flag: zzz, yyy; mnif test --help lists them"),
        ("width: wide", "--width wide: must be a whole number"),
        ("mixed_precision: maybe", "--mixed_precision maybe: must be one of no, bf16"),
        ("width: [1, 2]", "--width ['1', '2']: one value is needed"),
        ("fit: {width: 8}\nprior: {width: 8}", "it holds flags of fit, prior, none of `mnif test`"),
        ("- width", "flags and their values are needed, such as `width: 24`"),
        ("", "flags and their values are needed"),
        ("width: 8\n depth: 9", "mapping values are not allowed here"),
        ("width: !!python/object/apply:os.system [true]", "--width ['true']: one value is needed"),
        ("[" * 5000, "too many lists within one another"),
        (BOMB, "flags and their values are needed"),
        ("\0", "special characters are not allowed"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "flags.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        parse_given(Trained, ["--config", f"{tmp_path}/flags.yaml", "--data", "x"], "mnif test")
    text = str(error.value)
    assert message in text
    assert text.startswith("--config ")
    assert text.count("flags.yaml") >= 1
    assert len(text) < 400
    with pytest.raises(UserError, match=r"--config .*elsewhere.yaml: no such file"):
        parse_given(Trained, ["--config", f"{tmp_path}/elsewhere.yaml"], "mnif test")


def test_a_run_stands_for_the_model_in_it(tmp_path: Path) -> None:
    @dataclass
    class Command:
        """A command."""

        model: Path

    (tmp_path / "run/model/decoder").mkdir(parents=True)
    assert parse_given(Command, ["--model", f"{tmp_path}/run"], "mnif test")["model"] == tmp_path / "run/model"
    assert parse_given(Command, ["--model", f"{tmp_path}/run/model"], "mnif test")["model"] == tmp_path / "run/model"
    assert parse_given(Command, ["--model", "user/name"], "mnif test")["model"] == Path("user/name")
