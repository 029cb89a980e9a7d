"""Rows of a data set in batches that are a function of seed and step alone, and the random numbers of instances."""

import math
from collections.abc import Iterator, Mapping
from itertools import chain, pairwise

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mnif.utils.devices import sent


class ArrayDataset(Dataset[dict[str, Tensor]]):
    """Arrays with the same first axis; a batch is one indexing of each, under the arrays' names.

    Memory-mapped arrays stay on disk; only the rows that are indexed are read. Tensors are indexed where they are.
    """

    def __init__(self, **arrays: Tensor | np.ndarray):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: batch[0] for name, batch in self.__getitems__([row]).items()}

    def __getitems__(self, rows: list[int] | np.ndarray | Tensor) -> dict[str, Tensor]:
        index = sent(torch.as_tensor(rows), self.device)
        return {name: _taken(array, index) for name, array in self.arrays.items()}

    def batches(self, batch_size: int, device: torch.device | str = "cpu") -> Iterator[dict[str, Tensor]]:
        """Yields all rows in order, at most ``batch_size`` at a time; an accelerator gets each while it is at work on
        the one before."""
        parts = torch.arange(len(self)).split(batch_size)
        batches = ({name: sent(part, device) for name, part in self.__getitems__(index).items()} for index in parts)
        return batches if torch.device(device).type == "cpu" else _one_ahead(batches)

    @property
    def device(self) -> torch.device:
        """Where the rows are indexed."""
        first = next(iter(self.arrays.values()))
        return first.device if isinstance(first, Tensor) else torch.device("cpu")

    def on(self, device: torch.device | str) -> "ArrayDataset":
        """Copies the arrays to a device, some rows at a time, to be indexed there."""
        return ArrayDataset(**{name: _on_device(array, device) for name, array in self.arrays.items()})

    def nbytes(self) -> int:
        """Counts the bytes of all arrays."""
        arrays = self.arrays.values()
        return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)

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


_STEP = 0x9E3779B97F4A7C15 - 2**64  # as SplitMix64 counts: 2⁶⁴ over the golden ratio, here as a signed number


class InstanceGenerator:
    """Draws random numbers for the instances of a batch, those of each instance from its own key.

    What an instance gets depends on its key and on what was drawn for it before, not on which others are in the batch
    or which process it is learned by. Number n of a key is what SplitMix64 (Steele, Lea and Flood, 2014) makes of it,
    worked out for all instances at once where the keys are.

    Args:
        keys: [B] int64 (:func:`instance_keys`).
    """

    def __init__(self, keys: Int64[Tensor, " batch"]):
        self.keys, self._drawn = keys, 0

    def uniform(self, *shape: int) -> Float[Tensor, "batch *shape"]:
        """Draws numbers evenly spread over [0, 1), [B, *shape] float32."""
        return self._integers(shape).add_(2.0**23).mul_(2.0**-24)

    def normal(self, *shape: int) -> Float[Tensor, "batch *shape"]:
        """Draws standard normal numbers, [B, *shape] float32, none beyond ±5.5."""
        return self._integers(shape).add_(0.5).mul_(2.0**-23).erfinv_().mul_(math.sqrt(2))

    def dropout(self, values: Float[Tensor, "batch *shape"], share: float) -> Float[Tensor, "batch *shape"]:
        """Sets a ``share`` of values [B, ...] to zero, to 1/65536, and scales the rest so that their mean stays."""
        if not share:
            return values
        count = math.prod(values.shape[1:])
        kept = self._bits(-(-count // 4)).view(torch.int16)[:, :count] >= round(share * 2**16) - 2**15
        return values * kept.view(values.shape) / (1 - share)

    def _integers(self, shape: tuple[int, ...]) -> Tensor:
        """Draws whole numbers from -2²³ to 2²³ - 1, as float32, which holds all of them."""
        count = math.prod(shape)
        halves = self._bits(-(-count // 2)).view(torch.int32)[:, :count]
        return (halves >> 8).float().view(len(self.keys), *shape)

    def _bits(self, count: int) -> Tensor:
        """Draws the next 64 · count random bits of each instance, [B, count] int64."""
        self._drawn += count
        return _random_bits(self.keys, self._drawn - count, count)


# An operator of its own, because torch.compile works out whole numbers without wrapping them at 64 bits.
@torch.library.custom_op("mnif::random_bits", mutates_args=())
def _random_bits(keys: Tensor, drawn: int, count: int) -> Tensor:
    """Outputs ``drawn`` + 1 to ``drawn`` + ``count`` of SplitMix64 from each key on: [B, count] int64."""
    return _mixed(keys[:, None] + _STEP * torch.arange(drawn + 1, drawn + count + 1, device=keys.device))


@_random_bits.register_fake
def _(keys: Tensor, drawn: int, count: int) -> Tensor:
    return keys.new_empty(len(keys), count)


def instance_keys(seed: int, batch: int, rows: Int64[Tensor, " batch"]) -> Int64[Tensor, " batch"]:
    """Gives each of ``rows`` [B] int64 the key that its random numbers in a batch are made of: [B] int64.

    Args:
        seed: of the training.
        batch: its number.
        rows: of the data set, in any order and number.
    """
    (key,) = np.random.SeedSequence([seed, batch]).generate_state(1, np.uint64).view(np.int64).tolist()
    return _mixed(key + _STEP * rows)


def _mixed(numbers: Tensor) -> Tensor:
    """Spreads every bit of int64 numbers over all of them: the last part of SplitMix64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1)):
        above = (numbers >> shift) & ((1 << (64 - shift)) - 1)  # zeros come in from the left, not the sign
        numbers = (numbers ^ above) * factor
    return numbers


def _taken(array: Tensor | np.ndarray, index: Tensor) -> Tensor:
    if isinstance(array, Tensor):
        return array[index]
    return torch.from_numpy(np.ascontiguousarray(array[index.numpy()]))


def _one_ahead(batches: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Has the next batch read and on its way before one is worked on."""
    for batch, _ in pairwise(chain(batches, [{}])):
        yield batch


_COPIED_BYTES = 1 << 26  # at a time


def _on_device(array: Tensor | np.ndarray, device: torch.device | str) -> Tensor:
    """Copies an array to a device without ever having all of it in memory."""
    step = max(_COPIED_BYTES // max(math.prod(array.shape[1:]) * array.dtype.itemsize, 1), 1)
    parts = (_taken(array, index) for index in torch.arange(len(array)).split(step))
    first = next(parts)
    copy = torch.empty(array.shape, dtype=first.dtype, device=device)
    for begin, part in zip(range(0, len(array), step), chain([first], parts), strict=True):
        copy[begin : begin + step] = sent(part, device)
    return copy


def evenly_spaced(count: int, wanted: int) -> np.ndarray:
    """Picks at most ``wanted`` of ``count`` rows, from the first to the last: their numbers, [n] int64 in order."""
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(int)


def array_dataset(arrays: Mapping[str, Tensor | np.ndarray]) -> ArrayDataset:
    """Wraps the arrays of a data set, with each row's number under ``row``."""
    count = len(next(iter(arrays.values())))
    return ArrayDataset(row=torch.arange(count), **arrays)
