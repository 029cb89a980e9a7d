"""Samples that are the same to the last bit however the work is shared out, and the noise they are made of.

Noise is a function of seed and sample number, the same on every machine. Matrix products run in other kernels for
other numbers of rows, and those round differently: the same sample drawn alone and among 64 differs by about 1e-6. So
samples are always drawn in the same company: number i in chunk i // 64, which is drawn whole even if only one of it is
wanted, and on one thread. What is drawn then depends on seed and number alone, on one and the same kind of machine and
version of PyTorch, and not on the number of processes or threads or on what was drawn before.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from latent_prior.pipeline import MNIFPipeline
from latent_prior.settings import INFERENCE_STEPS
from mnif.utils.devices import sent
from mnif.utils.process import one_thread


def initial_noise(seed: int, indices: Iterable[int], latent_dim: int) -> Float32[np.ndarray, "n {latent_dim}"]:
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


def slerp(
    start: Float[np.ndarray, " d"], end: Float[np.ndarray, " d"], fractions: Float[np.ndarray, " f"]
) -> Float32[np.ndarray, "f d"]:
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


CHUNK = 64
"""Samples that are drawn together."""


def sample_latents(
    pipeline: MNIFPipeline,
    seed: int,
    indices: Iterable[int],
    num_inference_steps: int = INFERENCE_STEPS,
    **options: Any,
) -> Float[Tensor, "n latent_dim"]:
    """Draws the latents of samples ``indices`` of ``seed``: [N, D] on the pipeline's device.

    Every chunk that one of them lies in is drawn whole, so ask for neighbours together.

    Args:
        pipeline: what draws.
        seed: of the noise, at least 0.
        indices: at least one number from 0 on; a range may begin and end anywhere.
        num_inference_steps: denoising steps, at least 1.
        options: ``truncation`` and ``use_student``, as of the pipeline.

    Raises:
        UserError: the latents hold NaN or infinity.
    """
    latent_dim, drawn = pipeline.decoder.config.latent_dim, []
    for number, wanted in groupby(indices, lambda index: index // CHUNK):
        chunk = range(number * CHUNK, (number + 1) * CHUNK)
        noise = torch.tensor(initial_noise(seed, chunk, latent_dim))
        latents = denoised(pipeline, noise, num_inference_steps, generator=step_generators(seed, chunk), **options)
        rows = [index - chunk.start for index in wanted]
        drawn.append(latents if rows == [*range(CHUNK)] else latents[sent(torch.tensor(rows), latents.device)])
    return torch.cat(drawn)


def denoised(
    pipeline: MNIFPipeline,
    noise: Float[Tensor, "batch latent_dim"],
    num_inference_steps: int = INFERENCE_STEPS,
    **options: Any,
) -> Float[Tensor, "batch latent_dim"]:
    """Draws the latents [B, D] that become of noise [B, D], on one thread.

    Args:
        pipeline: what draws.
        noise: standard normal.
        num_inference_steps: denoising steps, at least 1.
        options: ``generator``, ``truncation`` and ``use_student``, as of the pipeline.

    Raises:
        UserError: the latents hold NaN or infinity.
    """
    with one_thread():
        (latents,) = pipeline(
            latents=noise,
            num_inference_steps=num_inference_steps,
            output_type="latent",
            return_dict=False,
            **options,
        )
    return latents
