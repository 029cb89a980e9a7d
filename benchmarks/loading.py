"""Pictures a second of loading alone, beside those of training: shards, the cache, batches and the training's loader.

    OMP_NUM_THREADS=1 python benchmarks/loading.py

Pictures are made up, written as PNG to tar shards, looked through and decoded into the memory-mapped cache, and from
there drawn as `mnif fit` draws them. Batches drawn alone and steps of training take turns, so that a machine whose
speed drifts drifts for both.
"""

import os
import tarfile
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from mnif.commands.fit import bare_steps, parse_fit_arguments
from mnif.data.batches import ArrayDataset, array_dataset
from mnif.data.images import ImageData, image_files, load_images
from mnif.signals.image import Image as ImageSignal
from mnif.training.loop import make_loader

_PICTURES_IN_A_SHARD = 1_000


@dataclass
class Arguments:
    """Measure loading beside training."""

    pictures: int = 27_000
    """Made-up pictures."""
    size: int = 64
    """Pixels per axis."""
    batch: int = 32
    """Pictures in a batch."""
    rounds: int = 5
    """Timed rounds; medians are printed."""


def main(arguments: Arguments) -> None:
    print(f"{arguments.pictures:,} pictures, {arguments.size}×{arguments.size}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {"MNIF_CACHE": str(folder / "cache"), "MNIF_MEMORY_LIMIT_MB": "0"}
        write_shards(folder / "shards", arguments)
        data = read_shards(str(folder / "shards"), arguments)
        beside_training(data, folder / "run", arguments)


def write_shards(folder: Path, arguments: Arguments) -> None:
    """Writes smooth pictures with some noise, which PNG packs about as well as photographs."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for start in range(0, arguments.pictures, _PICTURES_IN_A_SHARD):
        with tarfile.open(folder / f"{start:07d}.tar", "w") as archive:
            for row in range(start, min(start + _PICTURES_IN_A_SHARD, arguments.pictures)):
                coarse = Image.fromarray(generator.integers(0, 240, (5, 5, 3), dtype=np.uint8))
                smooth = np.asarray(coarse.resize((arguments.size,) * 2, Image.Resampling.BICUBIC))
                content = BytesIO()
                pixels = np.clip(smooth, 0, 240) + generator.integers(0, 8, smooth.shape, dtype=np.uint8)
                Image.fromarray(pixels).save(content, format="PNG", compress_level=1)
                member = tarfile.TarInfo(f"{row:07d}.png")
                member.size = content.tell()
                content.seek(0)
                archive.addfile(member, content)


def read_shards(source: str, arguments: Arguments) -> ImageData:
    """Times the headers, what is done once, and what every later command does."""
    pictures = arguments.pictures
    seconds, _ = timed(lambda: image_files(source))
    show("headers of shards", pictures / seconds)
    seconds, data = timed(lambda: load_images(source, arguments.size))
    show("headers and pictures into the cache, once", pictures / seconds)
    seconds, data = timed(lambda: load_images(source, arguments.size))
    show("headers, and the cache mapped, from then on", pictures / seconds)
    return data


def beside_training(data: ImageData, run: Path, arguments: Arguments) -> None:
    """Times batches alone and steps of training in alternating rounds, each way of loading for as many pictures."""
    rows = array_dataset(data.rows(np.flatnonzero(~data.held_out(0.1))).arrays())
    fit_flags = ["--data", data.name, "--output_dir", str(run), "--resolution", str(arguments.size)]
    steps = 10
    fit_flags += ["--train_batch_size", str(arguments.batch), "--max_train_steps", str(steps * (arguments.rounds + 2))]
    fit = parse_fit_arguments(fit_flags)
    training = bare_steps(fit, ImageSignal(arguments.size), data.rows(np.arange(1_000)))
    loaders = {f"training's loader, {workers} workers": loader(rows, arguments, workers) for workers in (0, 2)}
    rates: dict[str, list[float]] = {}
    for _ in range(arguments.rounds + 1):
        ways: dict[str, tuple[int, Iterable]] = {
            "batches in order, one pass": (len(rows), rows.batches(arguments.batch)),
            **{name: (len(rows), islice(batches, len(rows) // arguments.batch)) for name, batches in loaders.items()},
            "training, default form of `mnif fit`": (steps * arguments.batch, islice(training, steps)),
        }
        for name, (pictures, batches) in ways.items():
            seconds, _ = timed(lambda batches=batches: sum(1 for _ in batches))
            rates.setdefault(name, []).append(pictures / seconds)
    for name, values in rates.items():
        show(name, float(np.median(values[1:])))  # the first round compiles, reads the disk and starts workers


def loader(rows: ArrayDataset, arguments: Arguments, workers: int) -> Iterable:
    """An endless row of shuffled batches, as `mnif fit` draws them."""
    flags = ["--data", "none", "--output_dir", "none", "--train_batch_size", str(arguments.batch)]
    flags += ["--dataloader_num_workers", str(workers), "--max_train_steps", str(1 << 30)]
    return iter(make_loader(parse_fit_arguments(flags), rows, step=0, processes=1))


def timed(work):
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def show(name: str, rate: float) -> None:
    print(f"  {name:48} {rate:12,.0f} images/s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
