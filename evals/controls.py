"""What is measured beside the model: pictures from the prior, and from a Gaussian in its place."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.latents import LatentTable
from mnif.progress import progress_bar


def prior_latents(pipeline: MNIFPipeline, count: int, seed: int, steps: int, batch_size: int = 256) -> Tensor:
    """The latents of samples 0 to ``count`` of ``seed``, [count, D]."""
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for begin in progress_bar(range(0, count, batch_size), desc="sampling", unit="batch"):
        noise = initial_noise(seed, range(begin, min(begin + batch_size, count)), pipeline.decoder.config.latent_dim)
        (batch,) = pipeline(
            latents=torch.from_numpy(noise), num_inference_steps=steps, output_type="latent", return_dict=False
        )
        batches.append(batch)
    return torch.cat(batches)


def gaussian_latents(table: LatentTable, count: int, seed: int) -> Tensor:
    """Latents from a full-covariance Gaussian fitted to the table's training rows, [count, D]."""
    rows = table.train.double().numpy()
    generator = np.random.default_rng([seed, 1])
    drawn = generator.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=count, method="eigh")
    return torch.from_numpy(drawn).float()


def latent_table_of(model: Path, pipeline: MNIFPipeline) -> LatentTable | None:
    """The latent table that ``mnif fit`` wrote beside the model folder, or None if it was left behind."""
    path = model.parent / "latents.safetensors"
    return LatentTable.load(path, pipeline.decoder.fingerprint()) if path.exists() else None
