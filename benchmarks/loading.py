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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import tyro
from PIL import Image

from mnif.commands.fit import parse_fit_arguments
from mnif.data.batches import array_dataset
from mnif.data.images import ImageData, image_files, load_images
from mnif.signals.image import Image as ImageSignal
from mnif.training.assembly import bare_steps
from mnif.training.loader import make_loader

T = TypeVar("T")

_PICTURES_IN_A_SHARD = 1_000
_TRAINED = 1_000  # pictures that steps are taken on; a step takes the same time on more
_STEPS = 10  # of training in a round


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
    """Times batches alone and steps of training in alternating rounds, a pass of each way of loading."""
    rows = array_dataset(data.rows(np.flatnonzero(~data.held_out(0.1))).arrays())
    flags = ["--data", data.name, "--output_dir", str(run), "--resolution", str(arguments.size)]
    flags += ["--train_batch_size", str(arguments.batch), "--max_train_steps", str(_STEPS * (arguments.rounds + 2))]
    fit = parse_fit_arguments(flags)
    training = bare_steps(fit, ImageSignal.from_data(data, {"stride": fit.stride}), data.rows(np.arange(_TRAINED)))
    endless = {}
    for workers in (0, 2):
        loading = replace(fit, dataloader_num_workers=workers, max_train_steps=1 << 30)
        endless[f"training's loader, {workers} workers"] = iter(make_loader(loading, rows, 0, 1, torch.device("cpu")))
    rates: dict[str, list[float]] = {}
    for _ in range(arguments.rounds + 1):
        ways: dict[str, tuple[int, Iterator]] = {"batches in order": (len(rows), rows.batches(arguments.batch))}
        for name, batches in endless.items():
            ways[name] = (len(rows), islice(batches, len(rows) // arguments.batch))
        ways["training, `mnif fit` as it comes"] = (_STEPS * arguments.batch, islice(training, _STEPS))
        for name, (pictures, batches) in ways.items():
            rates.setdefault(name, []).append(pictures / timed(partial(_exhaust, batches))[0])
    for name, values in rates.items():
        show(name, float(np.median(values[1:])))  # the first round reads the disk and starts workers


def _exhaust(batches: Iterator) -> None:
    for _ in batches:
        pass


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of a call, and what it returns."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def show(name: str, rate: float) -> None:
    """Prints a row."""
    print(f"  {name:48} {rate:12,.0f} images/s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
