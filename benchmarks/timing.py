"""How long a call takes in a stream of calls, as what is measured is used."""

import time
from collections.abc import Callable

import numpy as np


def settled_seconds(function: Callable[[], object], least: float = 0.05) -> float:
    """The median of the second half of ``least`` seconds of calls, of two at least: the first never counts."""
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() < begun + least:
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[len(seconds) // 2 :]))
