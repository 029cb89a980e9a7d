"""Flags from dataclasses: a command's dataclass is its command line; presets and files are other values for it.

A base class called ``XFlags`` is the group ``x`` of the help; what the command's own class declares comes first.
"""

import argparse
import ast
import contextlib
import inspect
import io
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypedDict, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro

from mnif.utils.errors import UserError
from mnif.utils.flag_files import laid_over, read_config, typed_value
from mnif.utils.model_folders import model_folder_in
from mnif.utils.process import plain_output

T = TypeVar("T")

_CONFIG_HELP = "A YAML or JSON file of flags, such as a run's config.yaml; flags given win over it."


def parse_arguments(command: type[T], arguments: list[str], program: str) -> T:
    """Reads a command's flags.

    Args:
        command: a dataclass; its fields are the flags, its docstring and theirs the help.
        arguments: what follows the command on the command line.
        program: such as ``mnif fit``.

    Raises:
        UserError: an unknown flag, a missing one, or a value of the wrong kind.
    """
    return command(**parse_given(command, arguments, program))


def parse_given(command: type, arguments: list[str], program: str) -> dict[str, Any]:
    """Reads a command's flags as :func:`parse_arguments` does, but gives only those that are given.

    That is on the command line, or in the file that ``--config`` names; :func:`model_folder_in` finds ``--model``.

    Raises:
        UserError: an unknown flag, a missing one, or a value of the wrong kind.
    """
    given = _typed_on_the_command_line(command, arguments, program)
    if (config := given.pop("config", None)) is not None:
        given = laid_over(read_config(config, command, program), given)
    needed = (field.name for field in fields(command) if field.default is field.default_factory is MISSING)
    if missing := [f"--{name}" for name in needed if name not in given]:
        raise UserError(f"{', '.join(missing)}: needed and not given")
    if isinstance(folder := given.get("model"), Path):
        given["model"] = model_folder_in(folder)
    return given


def _typed_on_the_command_line(command: type, arguments: list[str], program: str) -> dict[str, Any]:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tyro's complaint, a box of several lines
            description = " ".join((inspect.getdoc(command) or "").split())
            parsed: Any = _parse(flags_of_command(command), arguments, program, description)
            return {name: value for group in parsed.values() for name, value in group.items()}
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(_complaint(command, arguments) or f"unusable arguments; see {program} --help")


def _parse(flags: Any, arguments: list[str], program: str, description: str | None = None) -> Any:
    if arguments and arguments[0].startswith("--tyro"):
        raise UserError(f"{arguments[0]}: no such flag; `mnif --completion bash` prints what completes commands")
    with plain_output():
        return tyro.cli(flags, args=arguments, prog=program, description=description, use_underscores=True)


def flags_of_command(command: type) -> Any:
    """A command's flags by group, as tyro takes them: none has a default, so that what is parsed is what was given."""
    kinds, documentation = get_type_hints(command, include_extras=True), _documentation(command)
    groups: dict[str, dict[str, Any]] = {_group_of(home): {} for home in command.__mro__}
    for field in fields(command):
        (*_, first) = [home for home in command.__mro__ if field.name in inspect.get_annotations(home)]
        flag = _flag(kinds[field.name], documentation.get(field.name, ""), _hint(field))
        groups[_group_of(first)][field.name] = flag
    groups[""]["config"] = _flag(Path, _CONFIG_HELP, "")
    return _struct(groups)


def _group_of(home: type) -> str:
    """The title of the flags that a class declares."""
    return home.__name__.removesuffix("Flags").lower() if home.__name__.endswith("Flags") else ""


def _struct(groups: Mapping[str, Mapping[str, Any]]) -> Any:
    """Makes a type of dictionaries, one for each group of flags that holds any, as tyro takes it."""
    make: Any = TypedDict  # of names that are not known beforehand
    kinds = {}
    for title, flags in groups.items():
        if flags:
            group = make(title or "options", flags, total=False)
            kinds[title or "options"] = Annotated[group, tyro.conf.arg(name=title, help="")]
    return make("flags", kinds)


def _flag(kind: Any, documentation: str, hint: str, metavar: str | None = None) -> Any:
    """What tyro is to know of a flag; its group is no part of its name."""
    shown = tyro.conf.arg(
        help=documentation, help_behavior_hint=hint, metavar=_metavar(kind, metavar), prefix_name=False
    )
    return Annotated[kind, shown]


def _metavar(kind: Any, value: str | None = None) -> str | None:
    """What stands for a flag's value in the help; ``value`` if that is not told by its kind."""
    origin, inner = get_origin(kind), get_args(kind)
    if tyro.conf.UseCounterAction[int] == kind or kind is bool:
        return None
    if origin in (Annotated, Union, UnionType):
        return _metavar(inner[0], value)
    if origin in (list, tuple):
        return "{0} [{0} ...]".format(_metavar(inner[0], value))
    if origin is Literal:
        return value or f"{{{','.join(map(str, inner))}}}"
    return value or {str: "TEXT"}.get(kind, kind.__name__.upper())


def _hint(field: Field) -> str:
    """What stands behind a flag's help: what it is unless given."""
    if field.default is field.default_factory is MISSING:
        return "(required)"
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is None or default == "" or default == []:
        return ""
    if isinstance(default, bool):
        return f"(default: {'on' if default else 'off'})"
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    return f"(default: {shown})"


def _documentation(command: type) -> dict[str, str]:
    """The text below each field of a dataclass or of those it builds on, on one line."""
    texts = {}
    for home in reversed(command.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(home))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, below in pairwise(tree.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(statement.target, ast.Name)
                texts[statement.target.id] = " ".join(ast.literal_eval(below.value).split())
    return texts


def flags_of_parser(parser: argparse.ArgumentParser) -> Any:
    """The flags of a command that argparse reads, as :func:`flags_of_command` gives those of the others."""
    flags = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        inner = Path if action.type is Path else str if action.type is None else int
        kind: Any = Literal[tuple(action.choices)] if action.choices else inner
        if action.nargs == 0:
            kind = tyro.conf.UseCounterAction[int]  # that shows a flag without a value
        elif action.nargs is not None:
            kind = list[kind]
        hint = "(required)" if action.required else ""
        if action.default not in (None, False, []) and "default" not in (action.help or ""):
            default = action.default
            hint = f"(default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
        flags[action.dest] = _flag(kind, action.help or "", hint, str(action.metavar or "") or None)
    return _struct({"": flags})


def print_help(parser: argparse.ArgumentParser) -> None:
    """Prints the help of a command that argparse reads in the form that the others' has, and raises SystemExit."""
    _parse(flags_of_parser(parser), ["--help"], parser.prog, parser.description)


def print_completion(commands: Mapping[str, tuple[Any, str]], shell: str) -> None:
    """Prints what makes a shell complete commands and flags.

    Args:
        commands: for each command its flags, as :func:`flags_of_command` gives them, and its purpose.
        shell: ``bash``, ``zsh`` or ``fish``.
    """
    kinds = [
        Annotated[flags, tyro.conf.subcommand(name, description=text)] for name, (flags, text) in commands.items()
    ]
    every: Any = Union[tuple(kinds)]  # noqa: UP007 as many as there are
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        tyro.cli(every, args=["--tyro-print-completion", shell], prog="mnif", use_underscores=True)
    script = printed.getvalue()
    for name, (_, text) in commands.items():  # zsh and fish would show its name beside it once more
        purpose = text.replace("'", "’")  # no quotation marks: each shell has its own way to write them
        script = script.replace(f"{name!r}: {{'description': {name!r}", f"{name!r}: {{'description': {purpose!r}")
    print(script.replace(_ZSH_CALL, _ZSH_START), end="")


_ZSH_CALL = '\n_tyro_mnif "$@"\n'  # how the script of zsh ends, which is right for a file of $fpath alone
_ZSH_START = """
if [[ $funcstack[1] == _mnif ]]; then
  _tyro_mnif "$@"
else
  compdef _tyro_mnif mnif
fi
"""


def _complaint(command: type, arguments: list[str]) -> str | None:
    """Says in one line what is wrong with arguments that were refused."""
    kinds = get_type_hints(command) | {"config": Path}
    words, flags = _words_of_flags(arguments)
    annotated = get_type_hints(command, include_extras=True)
    takes_words = any(tyro.conf.Positional in getattr(kind, "__metadata__", ()) for kind in annotated.values())
    if words and not takes_words:
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
                typed_value(kind, values if len(values) > 1 else values[0])
            except ValueError as error:
                return f"--{name} {' '.join(values)}: {error}"
    return None


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
