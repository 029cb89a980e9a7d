"""What bounds the samples of a run: how far pictures are from the data that a given stage one draws of known latents.

    python benchmarks/trials/bounds.py --run runs/emoji

No prior is asked. A perfect one draws latents as new as held-out ones: as good as held-out reconstructions are. A
distance has a bias that grows as pictures get fewer, and depends on how many of them the reference holds: sets of one
size stand together, with the pictures themselves beside what is drawn of them.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from evals.loaded_run import gaussian_latents
from evals.metrics.neighbours import memorisation_metrics
from mnif.data.batches import array_dataset
from mnif.data.dataset import Split
from mnif.latents.inference import infer_latents, load_latent_init
from mnif.signals.registry import signal_of_model

sys.path.append(str(Path(__file__).parents[1]))
from judges import PictureJudge, judge_of


@dataclass
class Arguments:
    """Measure pictures of training latents, held-out ones, and of what lies around and between them."""

    run: Path
    """A run folder in which `mnif fit --method encoder` has finished on pictures."""
    num_samples: int = 1000
    """That distances are taken over, where there are so many."""
    novelty: float = 0.95
    """The nn_ratio_latents that noise is added up to."""
    refinement_steps: int = 60
    """Of latents that are refined."""


def main(arguments: Arguments) -> None:
    judge = judge_of(arguments.run)
    assert isinstance(judge, PictureJudge)
    held_out = int(judge.table.held_out.sum())
    print(f"| what is drawn | pictures | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 2)}")
    for count in sorted({arguments.num_samples, min(held_out, arguments.num_samples)}, reverse=True):
        for name, rows in real_rows(judge, count, held_out).items():
            show(f"real {name}", count, judge.of_features(judge.real[rows]))
        for name, latents in sets_of(judge, arguments, count):
            show(name, len(latents), judge.of_latents(latents.astype(np.float32)))


COLUMNS = ("fd_lite0", "precision", "recall", "coverage", "nn_ratio", "nn_ratio_latents")


def show(name: str, count: int, figures: dict[str, float]) -> None:
    cells = [f"{figures[key]:.1f}" if key == "fd_lite0" else f"{figures.get(key, np.nan):.2f}" for key in COLUMNS]
    print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)


def real_rows(judge: PictureJudge, count: int, held_out: int) -> dict[str, np.ndarray]:
    """The rows of the real pictures beside which drawn ones stand; of the first the reference has none."""
    train = np.flatnonzero(judge.splits == Split.TRAIN)
    chosen = np.random.default_rng(0).permutation(len(train))[:count]  # as of sets_of
    rows = {"pictures": judge.reference.floor[:count], "training pictures": train[chosen]}
    if count <= held_out:
        rows["held-out pictures"] = np.flatnonzero(judge.splits == Split.HELD_OUT)[:count]
    return rows


def sets_of(judge: PictureJudge, arguments: Arguments, count: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields latents [count, D] with the name of what they are."""
    generator = np.random.default_rng(0)
    train, held_out = judge.table.train.numpy(), judge.table.latents[judge.table.held_out].numpy()
    chosen = generator.permutation(len(train))[:count]
    yield "training latents", train[chosen]
    if count <= len(held_out):
        yield "held-out latents", held_out[:count]
        yield "held-out latents, refined", refined(judge, arguments, Split.HELD_OUT, np.arange(count))
        return
    yield "training latents, refined", refined(judge, arguments, Split.TRAIN, chosen)
    std, noise = train.std(axis=0), generator.standard_normal((count, train.shape[1]))
    shaped = noise @ np.linalg.cholesky(np.cov(train.T)).T
    for name, change in (("as wide along all axes", std * noise), ("of the latents' covariance", shaped)):

        def latents(share: float, change: np.ndarray = change) -> np.ndarray:
            return mixed(train, chosen, train.mean(axis=0) + change, share)

        for share in (0.1, 0.3, share_at(arguments.novelty, latents, judge)):
            yield f"training latents, {share:.2f} of their variance noise {name}", latents(share)
    others, near = generator.permutation(len(train))[:count], nearest(train, std)[chosen]
    for share in (0.1, 0.3, 0.5):
        yield f"two training latents, {share:.1f} of another's variance", mixed(train, chosen, train[others], share)
    for share in (0.1, 0.3, 0.5):
        yield f"two training latents, {share:.1f} of the nearest other's", mixed(train, chosen, train[near], share)
    yield "Gaussian of their covariance", gaussian_latents(judge.table, count, seed=0)


def mixed(train: np.ndarray, chosen: np.ndarray, others: np.ndarray, share: float) -> np.ndarray:
    """Latents of which ``share`` of the variance is of others [count, D]; of noise, a kernel density estimate."""
    mean = train.mean(axis=0)
    return mean + np.sqrt(1 - share) * (train[chosen] - mean) + np.sqrt(share) * (others - mean)


def share_at(novelty: float, latents: Callable[[float], np.ndarray], judge: PictureJudge) -> float:
    """The share of noise at which latents are as new as is asked, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(8):
        share = (low + high) / 2
        found = memorisation_metrics(latents(share), judge.table)["nn_ratio_latents"]
        low, high = (share, high) if found < novelty else (low, share)
    return share


def nearest(train: np.ndarray, std: np.ndarray) -> np.ndarray:
    """The nearest other training latent of each, [N], in standard deviations."""
    rows = train / std
    squares = np.square(rows).sum(axis=1)
    distances = squares[:, None] + squares - 2 * rows @ rows.T
    np.fill_diagonal(distances, np.inf)
    return distances.argmin(axis=1)


def refined(judge: PictureJudge, arguments: Arguments, split: Split, chosen: np.ndarray) -> np.ndarray:
    """The latents of some of a split's pictures, from the encoder on improved by gradients."""
    signal = signal_of_model(judge.decoder)
    encoder = load_latent_init(arguments.run / "model", judge.decoder, signal, "encoder")
    rows = array_dataset(judge.data.rows(judge.splits == split).arrays()).subset(chosen)
    found = infer_latents(judge.decoder, signal, rows, encoder, arguments.refinement_steps, batch_size=64)
    return np.concatenate([latents.numpy() for latents in found])


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
