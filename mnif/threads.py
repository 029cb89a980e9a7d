"""One thread, where results must not depend on how many there are."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread of the processor within.

    Matrix products are cut in other places for other numbers of threads, and on some machines the pieces round
    differently (AVX-512: 1e-6 in a denoiser between one thread and two). The field operator does not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
