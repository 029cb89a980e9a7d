"""This process: its command, memory, threads and progress, and the other processes that share its work.

torch and accelerate are imported where they are needed: whoever reads data shows progress without them.
"""

import os
import resource
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    import torch


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


def default_device() -> "torch.device":
    """Where this process computes unless it is told otherwise: the accelerator if there is one, else the CPU."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return device or torch.device("cpu")


@cache
def tell(line: str) -> None:
    """Tells the user a line that is no error: once, however often it comes up and however many processes run."""
    if os.environ.get("RANK", "0") == "0":
        print(line.encode("utf-8", "backslashreplace").decode())


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; in a log file or a pipe it prints a line's worth every 20 seconds only."""
    quiet = not sys.stderr.isatty()
    return tqdm(iterable, mininterval=20.0 if quiet else 0.1, delay=1.0, dynamic_ncols=True, **options)


_PATIENCE = timedelta(days=2)  # the slowest part of a large evaluation may be one process's


class Processes:
    """This process and its fellows; one alone if the command was not launched as several.

    Attributes:
        rank: of this process.
        count: of processes.
        device: where this process computes.
    """

    def __init__(self) -> None:
        import torch
        from accelerate import PartialState

        self._state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        self.rank, self.count = self._state.process_index, self._state.num_processes
        self.device = self._state.device

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


def peak_memory_megabytes() -> float:
    """The largest resident set of this process so far, in MB (10⁶ bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)
