"""What is drawn: latents from the prior, and from a Gaussian in its place."""

from pathlib import Path

import numpy as np
import torch

from evals.bench import Bench
from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.latents import LatentTable
from mnif.modeling import MNIFModel


def prior_latents(bench: Bench, pipeline: MNIFPipeline, seed: int, steps: int, fingerprint: str) -> np.ndarray:
    """The latents of as many samples of ``seed`` as the protocol asks for, [N, D] float32, memory-mapped.

    Sample i depends on seed and i alone, whichever process draws it.
    """
    pipeline.set_progress_bar_config(disable=True)
    width = pipeline.decoder.config.latent_dim

    def denoised(noise: np.ndarray) -> np.ndarray:
        (found,) = pipeline(
            latents=torch.from_numpy(noise), num_inference_steps=steps, output_type="latent", return_dict=False
        )
        return found.cpu().numpy()

    def noise(rows: range) -> np.ndarray:
        return initial_noise(seed, rows, width)

    key, count = [fingerprint, "prior", seed, steps], bench.protocol.num_samples
    return bench.rows(key, count, width, noise, denoised, "sampling")


def gaussian_latents(table: LatentTable, count: int, seed: int) -> np.ndarray:
    """Latents from a full-covariance Gaussian fitted to the table's training rows, [count, D] float32."""
    rows = table.train.double().numpy()
    generator = np.random.default_rng([seed, 1])
    drawn = generator.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=count, method="eigh")
    return drawn.astype(np.float32)


def latent_table_of(model: Path, decoder: MNIFModel) -> LatentTable | None:
    """The latent table that ``mnif fit`` wrote beside the model folder, or None if it was left behind."""
    path = model.parent / "latents.safetensors"
    return LatentTable.load(path, decoder.fingerprint()) if path.exists() else None
