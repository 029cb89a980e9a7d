"""What evaluation costs: the Fréchet distance, precision and recall, features made while pictures are read.

    python benchmarks/evaluation.py [--dimension 2048] [--largest 20000] [--samples FOLDER]

Times of ours and theirs are taken in the same run, so that a machine whose speed drifts drifts for both.
"""

import argparse
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import scipy.linalg
from PIL import Image

from evals.features import extractor_by_name
from evals.features.extractor import extract_features
from evals.features.resize import bicubic_antialias
from evals.image_sets import sample_images
from evals.metrics.frechet import frechet_distance, moments_of
from evals.metrics.precision_recall import precision_recall
from mnif.utils.process import Processes
from mnif.utils.resumable import compute_in_chunks

GENERATOR = np.random.default_rng(0)


def timed(function: Callable[[], float]) -> tuple[float, float]:
    started = time.perf_counter()
    value = function()
    return value, time.perf_counter() - started


def correlated(count: int, dimension: int) -> np.ndarray:
    """Features whose covariance has the long tail of a network's."""
    scale = np.geomspace(1, 1e-3, dimension)
    return (GENERATOR.standard_normal((count, dimension)) * scale) @ GENERATOR.standard_normal((dimension, dimension))


def frechet(dimension: int) -> None:
    x, y = correlated(2 * dimension, dimension), correlated(2 * dimension, dimension)
    a, b = moments_of(x), moments_of(y)

    def by_root_of_the_product() -> float:
        root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
        return float(np.square(a.mean - b.mean).sum() + np.trace(a.covariance + b.covariance - 2 * root))

    theirs, slow = timed(by_root_of_the_product)
    ours, fast = timed(lambda: frechet_distance(a, b))
    _, again = timed(lambda: frechet_distance(a, b))
    _, nuclear = timed(lambda: frechet_distance(moments_of(x[:1000]), moments_of(y[:1000])))
    print(f"Fréchet distance, D={dimension}; relative difference {abs(ours - theirs) / theirs:.1e}")
    print(f"  root of the product (scipy sqrtm)       {slow:8.2f} s")
    print(f"  symmetric eigendecomposition            {fast:8.2f} s, ratio {slow / fast:.1f}")
    print(f"  the same reference again                {again:8.2f} s, ratio {slow / again:.1f}")
    print(f"  nuclear norm, 1,000 samples each        {nuclear:8.2f} s, moments included")


def precision_and_recall(largest: int, dimension: int = 64) -> None:
    print(f"precision, recall, density, coverage; D={dimension}, k=3")
    for count in (largest // 4, largest // 2, largest):
        samples, real = GENERATOR.standard_normal((2, count, dimension)).astype(np.float32)
        tracemalloc.start()
        _, seconds = timed(lambda s=samples, r=real: float(precision_recall(s, r, 3).precision.mean()))
        peak = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
        print(f"  {count:6,} × {count:6,}   {seconds:7.1f} s   {peak:6.1f} MB at most beside the features")


def overlapped(folder: Path) -> None:
    samples, extractor = sample_images(str(folder)), extractor_by_name("lite0")

    def features(images: np.ndarray) -> np.ndarray:
        return extract_features(images, extractor, bicubic_antialias, progress=False)

    def in_turn() -> float:
        rows = [range(start, min(start + 64, samples.count)) for start in range(0, samples.count, 64)]
        return float(np.concatenate([features(samples.read(some)) for some in rows]).mean())

    def reading_ahead() -> float:
        with TemporaryDirectory() as scratch:
            path, chunks = Path(scratch) / "features.npy", Path(scratch) / "chunks"
            count, width = samples.count, extractor.dimension
            found = compute_in_chunks(path, chunks, count, width, 64, samples.read, features, Processes(), "features")
            return float(found.mean())

    features(samples.read(range(8)))
    _, slow = timed(in_turn)
    _, fast = timed(reading_ahead)
    _, reading = timed(lambda: float(samples.read(range(samples.count)).mean()))
    print(
        f"features of {samples.count} pictures of {samples.size[0]}×{samples.size[1]}, reading alone {reading:.1f} s"
    )
    print(f"  read, then computed                     {slow:8.1f} s")
    print(f"  read ahead while computing              {fast:8.1f} s, chunks kept on disk")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--largest", type=int, default=20_000)
    parser.add_argument("--samples", type=Path, help="a folder of pictures; default: 256 made-up ones of 512×512")
    options = parser.parse_args()
    frechet(options.dimension)
    precision_and_recall(options.largest)
    if options.samples is not None:
        overlapped(options.samples)
        return
    with TemporaryDirectory() as folder:
        for index in range(256):
            pixels = GENERATOR.integers(0, 256, (512, 512, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"{folder}/{index:03d}.png")
        overlapped(Path(folder))


if __name__ == "__main__":
    main()
