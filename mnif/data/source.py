"""What names and headers tell of a data source, so that a signal can say whether it is one of its own."""

import os
from collections import Counter
from functools import cached_property
from pathlib import Path

from mnif.data.arrays import npy_array, npz_names


class DataSource:
    """A data source as the user named it: a path, or a name on the hub; what it holds is looked up once, if asked.

    Attributes:
        name: as given to ``--data``.
        path: the same as a path, which may not exist.
    """

    def __init__(self, name: str):
        self.name, self.path = name, Path(name)

    @property
    def suffix(self) -> str:
        """The suffix of a file; empty for a folder, and for what does not exist."""
        return self.path.suffix if self.path.is_file() else ""

    @cached_property
    def array_names(self) -> set[str]:
        """The names of the arrays in an ``.npz`` file; raises UserError if it is damaged."""
        return npz_names(self.path) if self.suffix == ".npz" else set()

    @cached_property
    def array_shape(self) -> tuple[int, ...] | None:
        """The shape of the array in an ``.npy`` file; raises UserError if it is damaged."""
        return npy_array(self.path).shape if self.suffix == ".npy" else None

    @cached_property
    def file_names(self) -> Counter[str]:
        """How many files of each name a folder and the folders in it hold."""
        return Counter(name for _, _, names in os.walk(self.path) for name in names)

    @cached_property
    def file_suffixes(self) -> Counter[str]:
        """How many files of each suffix, in small letters, a folder and the folders in it hold."""
        counts: Counter[str] = Counter()
        for name, count in self.file_names.items():
            counts[os.path.splitext(name)[1].lower()] += count
        return counts
