"""The processes that share an evaluation: `torchrun --nproc_per_node N -m -- mnif eval …` or `accelerate launch`."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from accelerate import PartialState

_PATIENCE = timedelta(days=2)  # the slowest part of a large evaluation may be one process's


class Processes:
    """This process and its fellows; one alone if the command was not launched as several.

    Attributes:
        rank: of this process.
        count: of processes.
        device: where this process computes.
    """

    def __init__(self) -> None:
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
