"""What is drawn: latents from the prior, and from a Gaussian in its place."""

import numpy as np

from evals.features.extractor import FeatureCache
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import sample_latents
from mnif.latents.table import LatentTable


def prior_latents(
    cache: FeatureCache, pipeline: MNIFPipeline, count: int, seed: int, steps: int, fingerprint: str
) -> np.ndarray:
    """The latents of samples 0 to ``count`` of ``seed``, [count, D] float32, memory-mapped.

    Sample i is the one of `mnif sample`, whichever process draws it.
    """
    pipeline.set_progress_bar_config(disable=True)

    def drawn(rows: range) -> np.ndarray:
        return sample_latents(pipeline, seed, rows, steps).cpu().numpy()

    key = [fingerprint, "prior", seed, steps]
    return cache.rows(key, count, pipeline.decoder.config.latent_dim, lambda rows: rows, drawn, "sampling")


def gaussian_latents(table: LatentTable, count: int, seed: int) -> np.ndarray:
    """Draws latents [count, D] float32 from a full-covariance Gaussian fitted to the table's training rows."""
    rows = table.train.double().numpy()
    generator = np.random.default_rng([seed, 1])
    drawn = generator.multivariate_normal(rows.mean(axis=0), np.cov(rows.T), size=count, method="eigh")
    return drawn.astype(np.float32)
