"""Progress bars with rate and remaining time."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; in a log file or a pipe it prints a line's worth every 20 seconds only."""
    quiet = not sys.stderr.isatty()
    return tqdm(iterable, mininterval=20.0 if quiet else 0.1, delay=1.0, dynamic_ncols=True, **options)
