"""Do feature extractors agree? Fréchet distances of pictures that are worse and worse in known ways, over the floor.

    python benchmarks/extractors.py --run runs/demo --num_samples 300

For a run of pictures with a prior: its reconstructions and samples, controls, and real pictures that are changed. What
an extractor prints is each distance over that of as many real pictures, and how its order of them agrees with the
first extractor's (Spearman's rank correlation).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from judges import PictureJudge, judge_of
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr

from evals.features import extractor_by_name
from evals.features.extractor import extract_features
from evals.features.resize import bicubic_antialias
from evals.image_sets import latent_images
from evals.loaded_run import drawn_latents, gaussian_latents
from evals.metrics.frechet import frechet_distance, moments_of
from latent_prior.pipeline import MNIFPipeline
from mnif.data.dataset import Split
from mnif.latents.pca import fit_pca


@dataclass
class Arguments:
    """Compares extractors."""

    run: Path
    """The run folder."""
    extractors: tuple[str, ...] = ("lite0", "resnet")
    """Of `mnif eval`."""
    num_samples: int = 300
    """Of every set; the reference has three times as many."""


def picture_sets(run: Path, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields ``reference``, ``real``, and then what is worse: names and [N, H, W, 3] uint8."""
    judge = judge_of(run)
    assert isinstance(judge, PictureJudge)
    choose = np.random.default_rng(0)
    images = np.asarray(judge.data.images[:])
    real = images[choose.permutation(judge.reference.floor)[:count]]
    train = images[judge.splits == Split.TRAIN]
    some = choose.permutation(len(judge.table.train))[:count]
    yield "reference", images[choose.permutation(judge.reference.rows)[: 3 * count]]
    yield "real", real

    def decoded(latents: np.ndarray) -> np.ndarray:
        return latent_images(judge.decoder, latents, "", quantise=True).read(range(len(latents)))

    pipeline = MNIFPipeline.from_pretrained(run / "model")
    yield "reconstructions", decoded(judge.table.train[some].numpy())
    yield "samples", decoded(drawn_latents(pipeline, count, 0, 8).numpy())
    yield "Gaussian latents", decoded(gaussian_latents(judge.table, count, seed=0))
    pca = fit_pca(train / np.float32(255), judge.table.train.shape[1])
    yield "PCA", _bytes(255 * pca.reconstruct(train[:count] / np.float32(255)))
    for sigma in (0.5, 1):
        yield f"blur {sigma} px", _bytes(gaussian_filter(real.astype(np.float32), (0, sigma, sigma, 0)))
    yield "noise 4 of 255", _bytes(real + choose.normal(0, 4, real.shape))
    half = real.shape[2] // 2
    yield "halves of two", np.concatenate([real[:, :, :half], np.roll(real, 1, axis=0)[:, :, half:]], axis=2)
    yield "means of two", _bytes((real.astype(np.float32) + np.roll(real, 1, axis=0)) / 2)


def _bytes(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 255) + 0.5).astype(np.uint8)


@torch.no_grad()
def main(arguments: Arguments) -> None:
    sets = dict(picture_sets(arguments.run, arguments.num_samples))
    first: list[float] = []
    print(f"| over the floor | {' | '.join(name for name in sets if name != 'reference')} | order |")
    print("|---" * (len(sets) + 1) + "|")
    for name in arguments.extractors:
        extractor = extractor_by_name(name)
        moments = {
            kind: moments_of(extract_features(images, extractor, bicubic_antialias, description=f"{name}: {kind}"))
            for kind, images in sets.items()
        }
        reference = moments.pop("reference")
        distances = [frechet_distance(one, reference) for one in moments.values()]
        first = first or distances
        ratios = " | ".join(f"{distance / distances[0]:.2f}" for distance in distances)
        print(f"| {name} | {ratios} | {spearmanr(first, distances)[0]:.2f} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
