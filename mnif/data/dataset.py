"""What every data set is: instances with ids and groups, a split that does not leak, a fingerprint."""

import hashlib
from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import replace
from enum import IntEnum
from typing import Any, Self, cast

import numpy as np

from mnif.utils.errors import UserError

_CHUNK_BYTES = 1 << 26


class Split(IntEnum):
    """Which part of a data set an instance belongs to."""

    TRAIN = 0
    HELD_OUT = 1
    TEST = 2


class Dataset(ABC):
    """N instances of one kind; the dataclasses that derive from it add their arrays.

    Attributes:
        name: as the user gave it.
        ids: N unique names.
        groups: N names; instances of one group (variants of one design) stay on one side of the split.
    """

    # Only annotated here, so that each kind of data keeps an order of fields of its own.
    name: str
    ids: list[str]
    groups: list[str]

    def __post_init__(self) -> None:
        repeated = [id for id, count in Counter(self.ids).items() if count > 1]
        if repeated:
            raise UserError(f"duplicate id {repeated[0]!r} in {self.name}: every instance needs a name of its own")
        lengths = {"groups": len(self.groups)} | {name: len(array) for name, array in self.arrays().items()}
        for name, length in lengths.items():
            if length != len(self.ids):
                raise UserError(f"{self.name}: {len(self.ids)} ids but {length} {name}")

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def arrays(self) -> dict[str, np.ndarray]:
        """Returns what a training row is made of, by the names of the fields; the first axis of each is N."""

    def held_out(self, fraction: float) -> np.ndarray:
        """Says which instances are kept out of training: [N] bool, about ``fraction`` of the groups.

        A group's side depends on its name alone (a hash), so it stays where it is when the data set grows.
        """
        return self._units() < fraction

    def split(self, held_out_fraction: float, test_fraction: float) -> np.ndarray:
        """Assigns every instance to a split: [N] int8 of :class:`Split`.

        ``HELD_OUT`` is exactly :meth:`held_out`, so a test part can be added without moving what was held out.

        Args:
            held_out_fraction: share of the groups held out (to choose settings on), in [0, 1].
            test_fraction: share of the groups for the last test, in [0, 1].

        Raises:
            UserError: a fraction is negative, or they add up to more than 1.
        """
        if held_out_fraction < 0 or test_fraction < 0 or held_out_fraction + test_fraction > 1:
            raise UserError(
                f"--held_out_fraction {held_out_fraction} and --test_fraction {test_fraction}: "
                "must be at least 0 and add up to at most 1"
            )
        units = self._units()
        splits = np.full(len(self), Split.TRAIN, dtype=np.int8)
        splits[units < held_out_fraction + test_fraction] = Split.TEST
        splits[units < held_out_fraction] = Split.HELD_OUT
        return splits

    def _units(self) -> np.ndarray:
        unit = {group: _unit_hash(group) for group in set(self.groups)}
        return np.array([unit[group] for group in self.groups], dtype=np.float64)

    def fingerprint(self) -> str:
        """Computes the SHA-256 of ids and arrays, in chunks: a memory-mapped array never is in memory as a whole."""
        digest = hashlib.sha256("\n".join(self.ids).encode())
        for name, array in self.arrays().items():
            digest.update(f"\n{name} {array.dtype} {list(array.shape)}\n".encode())
            row_bytes = array.dtype.itemsize * int(np.prod(array.shape[1:]))
            step = max(1, _CHUNK_BYTES // max(1, row_bytes))
            for start in range(0, len(array), step):
                digest.update(np.ascontiguousarray(array[start : start + step]).data)
        return digest.hexdigest()

    def rows(self, selection: np.ndarray) -> Self:
        """Makes the same kind of data with some of the instances only.

        Args:
            selection: [N] bool, or row numbers, none twice.

        Returns:
            Arrays in memory are copied; memory-mapped ones become :class:`SelectedRows`.
        """
        index = np.arange(len(self))[selection]
        arrays = {name: _selected(array, index) for name, array in self.arrays().items()}
        ids, groups = [self.ids[row] for row in index], [self.groups[row] for row in index]
        return cast(Self, replace(cast(Any, self), ids=ids, groups=groups, **arrays))


class SelectedRows:
    """Some rows of a memory-mapped array, read from disk when they are indexed along the first axis.

    It has the shape, dtype and length of the array it stands for; ``np.asarray`` of it reads all of them.
    """

    def __init__(self, array: np.ndarray, index: np.ndarray) -> None:
        self.array, self.index = array, index
        self.dtype, self.ndim = array.dtype, array.ndim
        self.shape = (len(index), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        return self.array[self.index[key]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


def _selected(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    if isinstance(array, SelectedRows):
        return cast(np.ndarray, SelectedRows(array.array, array.index[index]))
    if isinstance(array, np.memmap):
        return cast(np.ndarray, SelectedRows(array, index))
    return array[index]


def _unit_hash(text: str) -> float:
    """Hashes a text to a number in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
