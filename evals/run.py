"""`mnif eval`: measures samples and reconstructions, each figure beside its controls."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.controls import gaussian_latents, latent_table_of, prior_latents
from evals.features import PROTOCOL, extract_features
from evals.frechet import frechet_distance_from_features
from evals.manifold import copied_share, nearest_neighbour_distances, nearest_neighbour_ratio
from evals.reconstruction import border_step_ratio, fit_pca, mean_image_psnr, psnr_per_image
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.arguments import parse_arguments
from mnif.data import ImageData, load_images, picture_size
from mnif.encoder import PatchEncoder
from mnif.errors import UserError
from mnif.files import write_json
from mnif.fitting import encoded_latents, in_batches
from mnif.latents import LatentTable
from mnif.model_folder import load_component
from mnif.pictures import picture_grid, save_picture, to_pixels
from mnif.runs import command_line, peak_memory_megabytes

COPYING_BELOW = 0.9
EXPECTED_SHARE = 0.05  # of samples that do not copy, by the definition of copied_share


@dataclass(kw_only=True)
class EvalArguments:
    """Measure samples against a reference set, and reconstructions, each beside its controls."""

    reference: str
    """The data set to compare with: a built-in name, a folder or an .npz file."""
    output_dir: Path
    """Gets metrics.json and pictures."""
    model: Path | None = None
    """A model folder, RUN/model; or give --samples."""
    samples: str | None = None
    """A folder or .npz file of samples; or give --model."""
    num_samples: int = 1000
    """How many samples are drawn, or taken from the folder."""
    num_inference_steps: int = 20
    """Denoising steps."""
    seed: int = 0
    """Of the noise."""
    held_out_fraction: float = 0.1
    """Share of the reference's designs kept out of training, where no latent table beside the model tells."""
    refinement_steps: int = 60
    """Adam steps on held-out latents; as given to `mnif fit`."""


def main(arguments: list[str]) -> None:
    """Runs `mnif eval`."""
    evaluate(parse_arguments(EvalArguments, arguments, "mnif eval"))


def evaluate(arguments: EvalArguments) -> None:
    """Writes ``metrics.json`` and pictures to ``arguments.output_dir``.

    Raises:
        UserError: model, samples or reference cannot be read or do not fit each other.
    """
    started = time.perf_counter()
    if arguments.num_samples < 2:
        raise UserError(f"--num_samples {arguments.num_samples}: at least 2 are needed")
    if arguments.model is not None and arguments.samples is None:
        figures = _evaluate_model(arguments, arguments.model)
    elif arguments.samples is not None and arguments.model is None:
        samples = load_images(arguments.samples, picture_size(arguments.samples)).images[: arguments.num_samples]
        reference = load_images(arguments.reference, samples.shape[1])
        figures = _sample_figures(arguments, {"fd_lite0": samples}, reference, _held_out(arguments, reference, None))
    else:
        raise UserError("give either --model RUN/model or --samples FOLDER")
    figures |= {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_rss_mb": peak_memory_megabytes(),
        "command": command_line(),
    }
    write_json(arguments.output_dir / "metrics.json", figures)
    _print_table(figures, arguments.output_dir)


def _evaluate_model(arguments: EvalArguments, model: Path) -> dict[str, Any]:
    pipeline = load_pipeline(model)
    decoder = pipeline.decoder
    reference = load_images(arguments.reference, decoder.config.resolution)
    table = latent_table_of(model, pipeline)
    held_out = _held_out(arguments, reference, table)
    figures = _reconstruction_figures(arguments, model, pipeline, reference, held_out, table)
    latents = prior_latents(pipeline, arguments.num_samples, arguments.seed, arguments.num_inference_steps)
    drawn = {"fd_lite0": to_pixels(in_batches(decoder, latents))}
    if table is not None:
        gaussian = gaussian_latents(table, arguments.num_samples, arguments.seed)
        drawn["fd_lite0_gaussian"] = to_pixels(in_batches(decoder, gaussian))
        standardised = pipeline.denoiser.standardised
        if table.held_out.any():
            parts = [standardised(part).numpy() for part in (latents, table.latents[table.held_out], table.train)]
            figures["nn_ratio_latents"] = nearest_neighbour_ratio(*parts)
            figures["copied_share_latents"] = copied_share(*parts)
    return figures | _sample_figures(arguments, drawn, reference, held_out)


def _held_out(arguments: EvalArguments, reference: ImageData, table: LatentTable | None) -> np.ndarray:
    """Which reference pictures were kept out of training: by the latent table if it is theirs, else by the flag."""
    if table is not None and table.ids == reference.ids:
        return table.held_out.numpy()
    return reference.held_out(arguments.held_out_fraction)


def _reconstruction_figures(
    arguments: EvalArguments,
    model: Path,
    pipeline: MNIFPipeline,
    reference: ImageData,
    held_out: np.ndarray,
    table: LatentTable | None,
) -> dict[str, Any]:
    """PSNR of training and held-out pictures beside PCA with as many numbers and the mean image, and border steps."""
    decoder = pipeline.decoder
    has_encoder = (model / "encoder").is_dir()
    encoder = load_component(PatchEncoder, model, "encoder") if has_encoder else None
    figures: dict[str, Any] = {}
    originals = {"train": reference.images[~held_out], "heldout": reference.images[held_out]}
    pca = fit_pca(originals["train"] / 255, decoder.config.latent_dim)
    for part, images in originals.items():
        if not len(images):
            continue
        values = torch.from_numpy(images).float() / 127.5 - 1
        if part == "train" and encoder is None and table is not None and table.ids == reference.ids:
            latents = table.train
        else:
            steps = arguments.refinement_steps if part == "heldout" or encoder is None else 0
            latents = encoded_latents(decoder, encoder, values, steps, progress=True)
        decoded = (in_batches(decoder, latents) / 2 + 0.5).clamp(0, 1).numpy()
        figures[f"psnr_{part}"] = float(psnr_per_image(decoded, images / 255).mean())
        figures[f"psnr_pca_{part}"] = float(psnr_per_image(pca.reconstruct(images / 255), images / 255).mean())
        figures[f"psnr_mean_{part}"] = mean_image_psnr(originals["train"] / 255, images / 255)
        figures[f"border_step_ratio_{part}"] = border_step_ratio(decoded, images / 255, decoder.config.cells)
        if part == "heldout" and encoder is not None:
            first = (in_batches(decoder, in_batches(encoder, values)) / 2 + 0.5).clamp(0, 1).numpy()
            figures["psnr_heldout_encoder"] = float(psnr_per_image(first, images / 255).mean())
        rows = np.linspace(0, len(images) - 1, min(24, len(images))).astype(int)
        shown = np.concatenate([images[rows], (decoded[rows] * 255).round().astype(np.uint8)])
        path = arguments.output_dir / f"reconstructions_{part}.png"
        save_picture(path, picture_grid(shown, columns=len(rows)))
    return figures


def _sample_figures(
    arguments: EvalArguments, drawn: dict[str, np.ndarray], reference: ImageData, held_out: np.ndarray
) -> dict[str, Any]:
    """Fréchet distances of each set of drawn pictures, their floor, and how near samples lie to training pictures.

    All distances have the same counts and the same reference: one half of the real pictures, whole designs to a side.
    The floor is the distance of as many pictures from the other half.
    """
    real = extract_features(reference.images, description="features of real pictures")
    features = {name: extract_features(images, description=name) for name, images in drawn.items()}
    half = reference.held_out(0.5)
    count = min(int((~half).sum()), *(len(images) for images in drawn.values()))
    other = np.flatnonzero(~half)[np.random.default_rng(0).permutation(int((~half).sum()))[:count]]
    compared = {name: rows[:count] for name, rows in features.items()} | {"fd_lite0_floor": real[other]}
    figures: dict[str, Any] = {
        name: frechet_distance_from_features(rows, real[half]) for name, rows in compared.items()
    }
    train = real[~held_out]
    if held_out.any():
        figures["nn_ratio"] = nearest_neighbour_ratio(features["fd_lite0"], real[held_out], train)
    _, nearest = nearest_neighbour_distances(features["fd_lite0"][:24], train)
    pairs = np.concatenate([drawn["fd_lite0"][:24], reference.images[~held_out][nearest]])
    save_picture(arguments.output_dir / "nearest.png", picture_grid(pairs, columns=len(nearest)))
    figures["protocol"] = {
        "extractor": PROTOCOL,
        "reference": reference.name,
        "reference_fingerprint": reference.fingerprint(),
        "resolution": reference.images.shape[1],
        "samples": count,
        "reference_images": int(half.sum()),
        "held_out_images": int(held_out.sum()),
        "seed": arguments.seed,
        "num_inference_steps": arguments.num_inference_steps,
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
    return "does not copy: its samples lie as far from training pictures as unseen pictures do"


def _print_table(figures: dict[str, Any], output: Path) -> None:
    for name, value in figures.items():
        if isinstance(value, float):
            print(f"  {name:28} {value:10.3f}")
    if verdict := copying_verdict(figures):
        print(f"  this prior {verdict}")
    print(f"{output / 'metrics.json'}")
