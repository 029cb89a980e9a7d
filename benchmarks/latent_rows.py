"""Learned latents at a million rows: a step beside one on few rows, creation, checkpoints, table, shuffling, memory.

    python benchmarks/latent_rows.py

Steps on few and on many rows are timed in alternating rounds, so that a machine whose speed drifts drifts for both.
Needs about 12 GB of memory, and 10 GB of disk in the temporary folder. Peaks hold the pages of files being read, which
the kernel takes back when it needs them; processor seconds say more than the others on a machine that is shared.
"""

import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from mnif.data.batches import ArrayDataset, ShuffledBatches
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.table import LatentTable

FEW = 10_000


@dataclass
class Arguments:
    """Measure latents that learn by themselves."""

    rows: int = 1_000_000
    """Instances."""
    latent_dim: int = 512
    """Numbers in a latent."""
    batch: int = 64
    """Instances per step."""
    rounds: int = 300
    """Timed steps of each size; medians are printed."""


def main(arguments: Arguments) -> None:
    rows, latent_dim = arguments.rows, arguments.latent_dim
    needed = 24 * rows * latent_dim
    free = available_memory()
    if free < needed:
        raise SystemExit(f"{needed / 1e9:.1f} GB of free memory are needed; there are {free / 1e9:.1f}")
    print(f"{rows:,} rows of {latent_dim}, batches of {arguments.batch}, {torch.get_num_threads()} threads")
    before = resident()
    with timed("create latents and optimizer state"):
        many = LatentEmbedding(rows, latent_dim, arguments.batch, 1e-2, seed=0)
    few = LatentEmbedding(FEW, latent_dim, arguments.batch, 1e-2, seed=0)
    state = sum(tensor.nbytes for tensor in (many.latents, many.mean, many.square, many.steps))
    print(f"  {'latents and optimizer state':44} {state / 1e9:9.2f} GB")
    steps(arguments, {f"step, {FEW:,} rows": few, f"step, {rows:,} rows": many})
    print(f"  {'peak memory so far, beyond the libraries':44} {(peak() - before) / 1e9:9.2f} GB")
    with tempfile.TemporaryDirectory() as folder:
        checkpoints_and_table(many, Path(folder))
    shuffling(arguments)
    print(f"  {'peak memory':44} {peak() / 1e9:9.2f} GB")


def steps(arguments: Arguments, sizes: dict[str, LatentEmbedding]) -> None:
    """Times take, gradient and update on batches as training draws them."""
    rounds = arguments.rounds + 20
    orders = {
        name: iter(ShuffledBatches(table.instances, arguments.batch, 0, 0, rounds)) for name, table in sizes.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in sizes}
    for _ in range(rounds):
        for name, table in sizes.items():
            batch = torch.tensor(next(orders[name]))
            started = time.perf_counter()
            table.take(batch).square().mean().backward()
            table.step()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: sorted(values[20:])[arguments.rounds // 2] for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"  {name:44} {median * 1e3:9.3f} ms")
    few, many = medians.values()
    print(f"  {'ratio':44} {many / few:9.2f}")


def checkpoints_and_table(rows: LatentEmbedding, folder: Path) -> None:
    """Times a checkpoint's share and the final table, there and back."""
    with timed("save a checkpoint's share"):
        rows.save(folder)
    with timed("load it"):
        rows.load(folder)
    with timed("read the latents of all rows from it"):
        latents = rows.read_all(folder)
    assert torch.equal(latents[-3:], rows.read(torch.arange(rows.instances)[-3:]))
    ids = [f"instance-{row}" for row in range(rows.instances)]
    held_out = torch.zeros(rows.instances, dtype=torch.bool)
    held_out[::10] = True
    table = LatentTable(latents, ids, held_out, "f" * 64, "benchmark")
    with timed("mean and deviation of the table"):
        table.mean_and_std()
    with timed("save the table"):
        table.save(folder / "latents.safetensors")
    with timed("load the table"):
        loaded = LatentTable.load(folder / "latents.safetensors")
    assert torch.equal(loaded.latents[-3:], latents[-3:])
    assert loaded.ids[-1] == ids[-1]


def shuffling(arguments: Arguments) -> None:
    """Times the order of an epoch, and drawing batches from it."""
    rows = ArrayDataset(row=torch.arange(arguments.rows))
    order = iter(ShuffledBatches(arguments.rows, arguments.batch, 0, 0, arguments.rows))
    with timed("shuffle an epoch"):
        next(order)
    with timed("1,000 further batches"):
        for _ in range(1000):
            rows.__getitems__(next(order))


@contextmanager
def timed(name: str) -> Iterator[None]:
    started, processor, before = time.perf_counter(), time.process_time(), peak()
    yield
    wall, processor, grown = time.perf_counter() - started, time.process_time() - processor, (peak() - before) / 1e9
    print(f"  {name:44} {wall:9.2f} s    processor {processor:6.2f} s    peak memory +{grown:.2f} GB", flush=True)


def peak() -> float:
    """The largest resident set so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident() -> int:
    """The resident set now, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def available_memory() -> int:
    """What the kernel says new processes may take, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
