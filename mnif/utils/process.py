"""This process: its command, memory, threads, signals and output, and the other processes that share its work.

torch and accelerate are imported where they are needed: whoever reads data shows progress without them.
"""

import contextlib
import math
import os
import re
import resource
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TextIO, cast

from tqdm import tqdm

from mnif.utils.devices import chosen_device
from mnif.utils.errors import UserError, printable


class _Lines:
    """A stream that is written in whole lines, each at once; what stands in a line is the subclass's."""

    def __init__(self, stream: TextIO):
        self._stream, self._begun = stream, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            self._write_line(line)
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def _write_line(self, line: str) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Escaped(_Lines):
    """Lines as they are and all else that is no visible character as its escape, above any progress bar."""

    def _write_line(self, line: str) -> None:
        shown = "".join(part if part.isspace() else printable(part) for part in re.split("([\\r\\t]+)", line)) + "\n"
        if self._stream.isatty():
            with tqdm.external_write_mode(file=cast(TextIO, self)):
                self._stream.write(shown)
        else:
            self._stream.write(shown)

    def end(self) -> None:
        """Writes a last line that has no end."""
        if self._begun:
            self._stream.write(printable(self._begun))
            self._begun = ""


class _Log(_Lines):
    """A progress bar's lines below one another, as a log file or a pipe has them."""

    def write(self, text: str) -> int:
        shown = text.replace("\r", "\n").replace("\x1b[A", "")  # which goes up a line
        return super().write(shown if shown.endswith("\n") else shown + "\n")

    def _write_line(self, line: str) -> None:
        if line.strip():
            self._stream.write(line.rstrip() + "\n")


@contextmanager
def escaped_output() -> Iterator[None]:
    """Whatever is printed within, no name from data can do more to the terminal than begin a line."""
    escaped = _Escaped(sys.stdout)
    try:
        with contextlib.redirect_stdout(cast(TextIO, escaped)):
            yield
    finally:
        escaped.end()


@contextmanager
def plain_output() -> Iterator[None]:
    """What is printed within is from us alone, such as the colours of a help, and goes out as it is."""
    stream = sys.stdout._stream if isinstance(sys.stdout, _Escaped) else sys.stdout
    with contextlib.redirect_stdout(stream):
        yield


class Terminated(KeyboardInterrupt):
    """A SIGTERM: like Ctrl-C it ends a command, by way of whatever clears up."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Makes a SIGTERM raise :class:`Terminated` within, so that a command ends as it does on Ctrl-C.

    Of the processes of one launch the main one alone does so: the others may be waiting for it where no signal is
    noticed, and have nothing to clear up.
    """

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one is not to stop the clearing up
        raise Terminated

    if not is_main_process() or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


_ONE_WISH = 2.0  # seconds within which signals are one and the same wish: launchers and shells send several


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], list[int]]]:
    """Lets the step at hand finish after Ctrl-C or SIGTERM; a second one that comes later stops at once.

    Yields:
        What gives the signals received, in their order.
    """
    received: list[int] = []
    first = math.inf

    def note(number: int, frame: Any) -> None:
        nonlocal first
        if time.monotonic() - first > _ONE_WISH:
            raise interruption([number])
        first = min(first, time.monotonic())
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def interruption(received: list[int]) -> KeyboardInterrupt:
    """What ends a command that got these signals; a process that got none of its own follows another."""
    return Terminated() if signal.SIGTERM in received else KeyboardInterrupt()


_RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # torchrun and accelerate, Open MPI, MPICH


def is_main_process() -> bool:
    """Whether this is the process that writes files, as far as the launcher's environment tells."""
    return next((os.environ[name] for name in _RANKS if name in os.environ), "0") == "0"


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread of the processor within.

    Matrix products are cut in other places for other numbers of threads, and on some machines the pieces round
    differently (AVX-512: 1e-6 in a denoiser between one thread and two). The field operator does not.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@cache
def tell(line: str) -> None:
    """Tells the user a line that is no error: once, however often it comes up and however many processes run."""
    if is_main_process():
        print(printable(line))


BAR_DELAY = 1.0
"""Seconds that something takes before a bar of it is shown."""


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; in a log file or a pipe a line every 20 seconds."""
    if not sys.stderr.isatty():
        options |= {"file": _Log(sys.stderr), "mininterval": 20.0}
    return tqdm(iterable, delay=BAR_DELAY, dynamic_ncols=True, **options)


_PATIENCE = timedelta(days=7)  # that processes wait for the slowest of them


class Processes:
    """This process and its fellows; one alone if the command was not launched as several.

    Args:
        device: as ``--device`` has it; of several processes each takes one of its kind.

    Attributes:
        rank: of this process.
        count: of processes.
        device: where this process computes.

    Raises:
        UserError: there is no such device here, or not for each process.
    """

    def __init__(self, device: str | None = None) -> None:
        from accelerate import PartialState

        wanted = chosen_device(device)
        self._state = PartialState(cpu=wanted.type == "cpu", timeout=_PATIENCE)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        if self.count > 1 and wanted.index is not None:
            raise UserError(f"--device {device}: one for {self.count} processes; take {wanted.type}, or leave it out")
        self.device = self._state.device if self.count > 1 else wanted

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reads what all have done, and writes files."""
        return self.rank == 0

    def share(self, work: Sequence) -> Sequence:
        """This process's part of ``work``: every ``count``-th, nothing twice and nothing padded."""
        return work[self.rank :: self.count]

    def wait(self) -> None:
        """Returns once every process has come here."""
        self._state.wait_for_everyone()


def command_line() -> str:
    """The command this process runs, as a user would type it."""
    text = shlex.join(["mnif", *sys.argv[1:]])
    return text.encode("utf-8", "backslashreplace").decode()  # of names of files, which may be no UTF-8


def public_command(command: str) -> str:
    """A command as others may see it, on one line: of paths outside the working folder the last name alone."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its end
        return printable(command)
    return printable(shlex.join(map(public_name, words)))


def public_name(word: str) -> str:
    """A path outside the working folder without the folders that it is in, which are nobody else's business."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{Path(value).name}" if value.startswith(("/", "~", "..")) else word


def peak_memory_megabytes() -> float:
    """The largest resident set of this process so far, in MB (10⁶ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
