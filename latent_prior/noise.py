"""The noise a sample starts from: a function of seed and sample number, the same on every machine."""

from collections.abc import Iterable

import numpy as np


def initial_noise(seed: int, indices: Iterable[int], latent_dim: int) -> np.ndarray:
    """Standard normal noise for samples ``indices`` of ``seed``: [N, latent_dim] float32.

    Sample i depends on seed and i alone, not on the batch size or the number of processes. NumPy's generator makes
    it, so that an exported bundle draws the same pictures without torch.
    """
    return np.stack([np.random.default_rng([seed, i]).standard_normal(latent_dim, dtype=np.float32) for i in indices])
