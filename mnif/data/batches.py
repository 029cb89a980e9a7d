"""Rows of a data set as tensors, in batches that are a function of seed and step alone."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler


class ArrayDataset(Dataset[dict[str, Tensor]]):
    """Arrays with the same first axis; a batch is one indexing of each, under the arrays' names.

    Memory-mapped arrays stay on disk; only the rows that are indexed are read.
    """

    def __init__(self, **arrays: Tensor | np.ndarray):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: batch[0] for name, batch in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        index = torch.as_tensor(rows)
        return {name: _taken(array, index) for name, array in self.arrays.items()}

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """Yields all rows in order, at most ``batch_size`` at a time."""
        for index in torch.arange(len(self)).split(batch_size):
            yield {name: tensor.to(device) for name, tensor in self.__getitems__(index).items()}

    def subset(self, index: np.ndarray) -> "ArrayDataset":
        """Selects some of the rows, which are read when they are indexed."""
        return _Subset(self, index)


class _Subset(ArrayDataset):
    def __init__(self, rows: ArrayDataset, index: np.ndarray):
        self.rows, self.index = rows, torch.as_tensor(index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitems__(self, rows: list[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        return self.rows.__getitems__(self.index[torch.as_tensor(rows)])


class ShuffledBatches(Sampler[list[int]]):
    """Batches of row numbers for steps ``start`` to ``stop``: a function of seed and step alone.

    Rows are dealt to as many lanes as a batch has places, row r to lane r modulo the batch size, and place j of every
    batch is filled from lane j. So if a batch is cut into equal parts for several processes, each process meets the
    rows of its own lanes only, whatever the number of processes. Every epoch shuffles each lane anew; a lane that is
    longer than an epoch leaves its last row for another one. Starting at any step yields what a run from step 0 would
    have seen there, so a resumed run continues exactly.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, start: int, stop: int):
        self.rows, self.batch_size, self.seed, self.start, self.stop = rows, min(batch_size, rows), seed, start, stop
        self.drop_last = True  # read by Accelerate when it shares batches out to processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.rows // self.batch_size
        epoch, order = -1, np.empty((0, 0), dtype=np.int64)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = self._epoch(epoch)
            yield order[step % per_epoch].tolist()

    def _epoch(self, epoch: int) -> np.ndarray:
        """Deals out the row numbers of one epoch, [batches, batch size]."""
        generator = np.random.default_rng([self.seed, epoch])
        lengths = (self.rows - np.arange(self.batch_size) + self.batch_size - 1) // self.batch_size
        keys = generator.random((lengths.max(), self.batch_size))
        keys[np.arange(lengths.max())[:, None] >= lengths] = 2.0  # no such row: sorted behind all that exist
        ranked = keys.argsort(axis=0)[: self.rows // self.batch_size]
        return ranked * self.batch_size + np.arange(self.batch_size)


def _taken(array: Tensor | np.ndarray, index: Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array[index]
    return torch.from_numpy(np.ascontiguousarray(array[index.numpy()]))


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Picks at most ``wanted`` of ``count`` rows, from the first to the last: their numbers, [n] int64 in order."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def array_dataset(arrays: Mapping[str, np.ndarray]) -> ArrayDataset:
    """Wraps the arrays of a data set, with each row's number under ``row``."""
    count = len(next(iter(arrays.values())))
    return ArrayDataset(row=torch.arange(count), **arrays)
