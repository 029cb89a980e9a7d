"""The one error a user is meant to read, and the checks that every command makes."""

from collections.abc import Sequence
from importlib.util import find_spec


class UserError(Exception):
    """A mistake the user can mend: the message is one line that says what was wrong, where, and what to do.

    The command line prints it to stderr and leaves with exit code 2.
    """


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
