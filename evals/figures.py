"""The figures of an evaluation, each beside its controls."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.features import PROTOCOL, extract_features
from evals.frechet import frechet_distance_from_features
from evals.manifold import copied_share, nearest_neighbour_distances, nearest_neighbour_ratio
from evals.reconstruction import border_step_ratio, mean_image_psnr, psnr_per_image
from mnif.data import ImageData, Split
from mnif.inner_loop import InnerLoop
from mnif.latents import LatentTable
from mnif.modeling import MNIFModel
from mnif.pca import fit_pca
from mnif.pictures import picture_grid, save_picture, to_pixels
from mnif.refinement import Finder, latents_of
from mnif.rows import rows_of
from mnif.signal_table import signal_of_model

COPYING_BELOW = 0.9
EXPECTED_SHARE = 0.05  # of samples that do not copy, by the definition of copied_share
SHOWN = 24


def reconstruction_figures(
    decoder: MNIFModel,
    finder: Finder,
    reference: ImageData,
    sides: np.ndarray,
    table: LatentTable | None,
    refinement_steps: int,
    pictures: Path,
) -> dict[str, float]:
    """PSNR of every side's pictures beside PCA with as many numbers and the mean image, and border steps.

    Args:
        decoder: the bases.
        finder: gives training latents and the start of the others; None takes the table's and starts from zero.
        reference: the pictures.
        sides: [N] of :class:`mnif.data.Split`.
        table: the latents of ``reference``, if they are known.
        refinement_steps: Adam steps on the latents of pictures not trained on.
        pictures: folder for pictures of originals above reconstructions.

    Returns:
        PSNR in dB, mean over pictures, on [0, 1]; border steps as a share of the originals'; ``pca_components``, fewer
        than the latent's numbers only where there are fewer training pictures.
    """
    signal = signal_of_model(decoder)
    train = reference.images[sides == Split.TRAIN]
    # PCA cannot have more components than there are pictures or numbers in one.
    components = min(decoder.config.latent_dim, len(train), reference.images[0].size)
    pca = fit_pca(train / 255, components)
    figures: dict[str, float] = {"pca_components": components}
    for part, side in (("train", Split.TRAIN), ("heldout", Split.HELD_OUT), ("test", Split.TEST)):
        images = reference.images[sides == side]
        if not len(images):
            continue
        rows = rows_of({"images": images})
        if side == Split.TRAIN and finder is None and table is not None:
            latents = table.train
        else:
            steps = 0 if side == Split.TRAIN and finder is not None else refinement_steps
            latents = torch.cat([*latents_of(decoder, signal, rows, finder, steps, progress=True)])
        decoded = decoded_pictures(decoder, latents) / 255
        figures |= {
            f"psnr_{part}": float(psnr_per_image(decoded, images / 255).mean()),
            f"psnr_pca_{part}": float(psnr_per_image(pca.reconstruct(images / 255), images / 255).mean()),
            f"psnr_mean_{part}": mean_image_psnr(train / 255, images / 255),
        }
        if all(pixels % decoder.config.cells == 0 for pixels in images.shape[1:3]):
            figures[f"border_step_ratio_{part}"] = border_step_ratio(decoded, images / 255, decoder.config.cells)
        if side != Split.TRAIN and finder is not None:
            first = torch.cat([*latents_of(decoder, signal, rows, finder, 0)])
            found = decoded_pictures(decoder, first) / 255
            name = "inner_loop" if isinstance(finder, InnerLoop) else "encoder"
            figures[f"psnr_{part}_{name}"] = float(psnr_per_image(found, images / 255).mean())
        pick = np.linspace(0, len(images) - 1, min(SHOWN, len(images))).astype(int)
        shown = np.concatenate([images[pick], (decoded[pick] * 255).round().astype(np.uint8)])
        save_picture(pictures / f"reconstructions_{part}.png", picture_grid(shown, columns=len(pick)))
    return figures


def memorisation_figures(samples: np.ndarray, table: LatentTable) -> dict[str, float]:
    """How near sampled latents [N, D] lie to training latents, by the measure of held-out ones.

    Both are standardised per dimension, as the prior sees them.
    """
    mean, std = (statistic.numpy() for statistic in table.mean_and_std())
    parts = (samples, table.latents[table.held_out].numpy(), table.train.numpy())
    standardised = [(part - mean) / std for part in parts]
    return {
        "nn_ratio_latents": nearest_neighbour_ratio(*standardised),
        "copied_share_latents": copied_share(*standardised),
    }


def sample_figures(
    drawn: dict[str, np.ndarray], reference: ImageData, sides: np.ndarray, pictures: Path
) -> dict[str, Any]:
    """Fréchet distances of each set of drawn pictures, their floor, and how near samples lie to training pictures.

    All distances have the same counts and the same reference: one half of the real pictures, whole designs to a side.
    The floor is the distance of as many pictures from the other half.

    Args:
        drawn: figure name → pictures [N, H, W, 3] uint8; ``"fd_lite0"`` are the samples.
        reference: the real pictures.
        sides: [N] of :class:`mnif.data.Split`.
        pictures: folder for a picture of samples above their nearest training pictures.

    Returns:
        The distances, ``nn_ratio`` if anything was held out, and the ``protocol``.
    """
    real = extract_features(reference.images, description="features of real pictures")
    features = {name: extract_features(images, description=name) for name, images in drawn.items()}
    half = reference.held_out(0.5)
    others = np.flatnonzero(~half)
    count = min(len(others), *(len(images) for images in drawn.values()))
    floor = real[np.random.default_rng(0).permutation(others)[:count]]
    compared = {name: rows[:count] for name, rows in features.items()} | {"fd_lite0_floor": floor}
    figures: dict[str, Any] = {
        name: frechet_distance_from_features(rows, real[half]) for name, rows in compared.items()
    }
    held_out, train_side = sides == Split.HELD_OUT, sides == Split.TRAIN
    samples, train = features["fd_lite0"], real[train_side]
    if held_out.any():
        figures["nn_ratio"] = nearest_neighbour_ratio(samples, real[held_out], train)
    _, nearest = nearest_neighbour_distances(samples[:SHOWN], train)
    pairs = np.concatenate([drawn["fd_lite0"][:SHOWN], reference.images[train_side][nearest]])
    save_picture(pictures / "nearest.png", picture_grid(pairs, columns=len(nearest)))
    figures["protocol"] = PROTOCOL | {
        "reference": reference.name,
        "resolution": reference.images.shape[1],
        "samples": count,
        "reference_images": int(half.sum()),
        "held_out_images": int(held_out.sum()),
    }
    if count < real.shape[1]:
        print(f"note: {count} samples are fewer than the {real.shape[1]} feature dimensions; distances are biased up")
    return figures


def copying_verdict(figures: dict[str, Any]) -> str | None:
    """What the memorisation figures say, in words; None if they are missing.

    In pictures the decoder's blur keeps even a copy away from its original, so the smaller of the two ratios counts.
    """
    ratios = [figures[name] for name in ("nn_ratio", "nn_ratio_latents") if name in figures]
    if not ratios:
        return None
    if min(ratios) < COPYING_BELOW:
        return "copies: its samples lie nearer to training pictures than unseen pictures do"
    share = figures.get("copied_share_latents", 0.0)
    if share > 2 * EXPECTED_SHARE:
        return f"copies at times: {share:.0%} of its samples are nearer to a training picture than 95 % of unseen ones"
    return (
        "does not copy more than unseen pictures do: its samples lie as far from training pictures as those, which "
        "may themselves be variants of training designs"
    )


@torch.no_grad()
def decoded_pictures(decoder: MNIFModel, latents: torch.Tensor, batch_size: int = 256) -> np.ndarray:
    """Pictures of latents [N, D]: [N, H, W, C] uint8, as files of them hold."""
    return np.concatenate([to_pixels(decoder(batch)) for batch in latents.split(batch_size)])
