"""The noise a sample is made of: a function of seed and sample number, the same on every machine."""

from collections.abc import Iterable

import numpy as np
import torch


def initial_noise(seed: int, indices: Iterable[int], latent_dim: int) -> np.ndarray:
    """Standard normal noise for samples ``indices`` of ``seed``: [N, latent_dim] float32.

    Sample i depends on seed and i alone, not on the batch size or the number of processes. NumPy's generator makes
    it, so that an exported bundle draws the same pictures without torch.
    """
    return np.stack([np.random.default_rng([seed, i]).standard_normal(latent_dim, dtype=np.float32) for i in indices])


def step_generators(seed: int, indices: Iterable[int]) -> list[torch.Generator]:
    """A generator for each of samples ``indices`` of ``seed``, for schedulers that add noise in every step.

    They live on the CPU, where all machines draw alike, and are independent of :func:`initial_noise`.
    """
    seeds = (np.random.SeedSequence([seed, i], spawn_key=(1,)).generate_state(1, np.uint64)[0] for i in indices)
    return [torch.Generator().manual_seed(int(number)) for number in seeds]


def slerp(start: np.ndarray, end: np.ndarray, fractions: np.ndarray) -> np.ndarray:
    """Noise on the way from one sample's to another's, at ``fractions`` [F] from 0 to 1: [F, D] float32.

    Spherical linear interpolation (Shoemake, 1985): with θ the angle between ``start`` and ``end`` [D],
    (sin((1 - t) θ) start + sin(t θ) end) / sin θ. Points of a straight way would be shorter than any noise the
    denoiser was trained on (White, 2016).
    """
    first, last = start.astype(np.float64), end.astype(np.float64)
    angle = np.arccos(np.clip(first @ last / (np.linalg.norm(first) * np.linalg.norm(last)), -1, 1))
    t = np.asarray(fractions, dtype=np.float64)[:, None]
    if np.sin(angle) < 1e-6:  # one and the same direction
        return ((1 - t) * first + t * last).astype(np.float32)
    return ((np.sin((1 - t) * angle) * first + np.sin(t * angle) * last) / np.sin(angle)).astype(np.float32)
