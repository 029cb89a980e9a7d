"""Stopping in time: Ctrl-C and SIGTERM are noticed between two steps, by all processes at the same one."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def agreement() -> Callable[[bool], bool]:
    """Whether any process says yes: all learn it at the same step, or one would wait for the others for ever.

    Processes have a channel of their own for it, so that no GPU is waited for.
    """
    if not torch.distributed.is_initialized():
        return lambda said: said
    channel = torch.distributed.new_group(backend="gloo")

    def agreed(said: bool) -> bool:
        answer = torch.tensor([said], dtype=torch.uint8)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, group=channel)
        return bool(answer)

    return agreed


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Lets the step at hand finish after a first Ctrl-C or SIGTERM; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
