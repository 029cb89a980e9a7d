"""The batches of a run: of how many instances, how many steps of them, and where their rows are."""

import math
from typing import Any

import torch
from torch.utils.data import DataLoader

from mnif.data.batches import ArrayDataset, ShuffledBatches
from mnif.training.arguments import TrainingArguments
from mnif.utils.devices import memory_of
from mnif.utils.errors import UserError

RESIDENT_SHARE = 1 / 4
"""Of a GPU's memory: training data that take no more live there, unless a flag says otherwise."""


def batch_size_of(arguments: TrainingArguments, instances: int, processes: int) -> int:
    """Instances in a batch over all processes: what was asked for if there are as many, and as many for each process.

    Raises:
        UserError: that is none.
    """
    batch_size = min(arguments.train_batch_size, instances) // processes * processes
    if not batch_size:
        raise UserError(f"--train_batch_size {arguments.train_batch_size}: fewer than one row for each process")
    return batch_size


def steps_of_epochs(epochs: int, train_batch_size: int, accumulation: int, instances: int) -> int:
    """The number of optimizer steps in passes over the data.

    A pass has whole batches only; a last step that sums up fewer than ``accumulation`` of them is filled up.
    """
    return math.ceil(epochs * (instances // min(train_batch_size, instances)) / accumulation)


def fill_in_steps(arguments: TrainingArguments, instances: int) -> None:
    """Turns passes over the data, where they are asked for, into a number of optimizer steps."""
    if arguments.num_train_epochs is not None:
        batch_size, accumulation = arguments.train_batch_size, arguments.gradient_accumulation_steps
        arguments.max_train_steps = steps_of_epochs(arguments.num_train_epochs, batch_size, accumulation, instances)


def placed(arguments: TrainingArguments, rows: ArrayDataset, device: torch.device) -> ArrayDataset:
    """The training data on the device, where ``--data_on_device`` says so or they fit, or as they are.

    A batch is indexed where its rows are; of those that stay, each is read and pinned while one is learned from.
    """
    wanted = arguments.data_on_device
    fits = wanted == "auto" and rows.nbytes() <= RESIDENT_SHARE * memory_of(device)
    return rows.on(device) if wanted == "on" or fits else rows


def make_loader(
    arguments: TrainingArguments, rows: ArrayDataset, step: int, processes: int, device: torch.device
) -> DataLoader:
    """Batches from ``step`` to the end for ``device``; a batch is one indexing, so there is nothing to collate."""
    batch_size = batch_size_of(arguments, len(rows), processes)
    accumulation = arguments.gradient_accumulation_steps
    batches = ShuffledBatches(
        len(rows),
        batch_size,
        arguments.seed,
        step * accumulation,
        arguments.max_train_steps * accumulation,
    )
    is_host = rows.device.type == "cpu"
    workers = arguments.dataloader_num_workers if is_host else 0  # others would need a device of their own
    pins = is_host and device.type == "cuda"
    return DataLoader(rows, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers, pin_memory=pins)


def _as_it_is(batch: Any) -> Any:
    return batch
