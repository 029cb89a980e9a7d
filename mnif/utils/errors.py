"""The one error a user is meant to read, the checks that every command makes, and names that are safe to show."""

import re
from collections.abc import Sequence
from importlib.util import find_spec


class UserError(Exception):
    """A mistake the user can mend: the message is one line that says what was wrong, where, and what to do.

    The command line prints it to stderr and leaves with exit code 2. Names from data may stand in it as they are
    (:func:`printable`).
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: object) -> str:
    """Makes one line of a text that may hold a name from data: what is no visible character is written as its escape.

    So no file name moves the cursor, colours what follows, or begins a line that looks like one of ours; and what is
    not UTF-8 can be printed at all.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def markdown_code(text: str) -> str:
    """Writes a name from data or a command as code within a line of Markdown, which it cannot break out of."""
    text = printable(text)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def check_at_least(least: float, **flags: float | Sequence[float] | None) -> None:
    """Refuses flags that are too small.

    Args:
        least: the smallest value allowed.
        flags: for each flag its value, all of its values, or None where it was not given.

    Raises:
        UserError: a value is smaller.
    """
    for flag, given in flags.items():
        for value in given if isinstance(given, Sequence) else (given,):
            if value is not None and not value >= least:  # NaN is refused too
                raise UserError(f"--{flag} {value}: must be at least {least}")


def require(package: str, extra: str, work: str, module: str | None = None) -> None:
    """Refuses work whose optional package is not installed.

    Args:
        package: its name on the package index.
        extra: the extra of this project that brings it.
        work: what needs it, the beginning of the message.
        module: what is imported of it, if its name differs.

    Raises:
        UserError: it is missing; the message says how to install it.
    """
    if find_spec(module or package.replace("-", "_")) is None:
        raise UserError(f'{work}: the package "{package}" is missing; run: pip install "mnif-diffusion[{extra}]"')
