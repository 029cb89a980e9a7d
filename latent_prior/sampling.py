"""Samples that are the same to the last bit however the work is shared out, and the noise they are made of.

Noise is a function of seed and sample number, the same on every machine. Matrix products run in other kernels for
other numbers of rows, and those round differently: the same sample drawn alone and among 64 differs by about 1e-6. So
samples are always drawn in the same company: number i in block i // 64, which is drawn whole even if only one of it is
wanted, and on one thread. What is drawn then depends on seed and number alone, on one and the same kind of machine and
version of PyTorch, and not on the number of processes or threads or on what was drawn before.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latent_prior.pipeline import MNIFPipeline
from mnif.utils.errors import UserError
from mnif.utils.process import one_thread


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


BLOCK = 64
"""Samples that are drawn together."""


@dataclass(frozen=True)
class ExactSampler:
    """Draws the samples of one seed.

    Args:
        pipeline: what draws.
        seed: of the noise.
        num_inference_steps: at least 1.
        truncation: as of the pipeline.
        use_student: likewise.
    """

    pipeline: MNIFPipeline
    seed: int
    num_inference_steps: int
    truncation: float = 1.0
    use_student: bool | None = None

    def block(self, number: int) -> Tensor:
        """The latents of samples ``number`` · 64 to ``number`` · 64 + 63: [64, D].

        Raises:
            UserError: they hold NaN or infinity.
        """
        indices = range(number * BLOCK, (number + 1) * BLOCK)
        noise = torch.tensor(initial_noise(self.seed, indices, self.pipeline.decoder.config.latent_dim))
        return self.latents(noise, step_generators(self.seed, indices))

    def samples(self, count: int) -> Tensor:
        """The latents of the first ``count`` samples, [count, D]."""
        return torch.cat([self.block(number) for number in range(-(-count // BLOCK))])[:count]

    def latents(self, noise: Tensor, generators: list[torch.Generator] | None = None) -> Tensor:
        """The latents [B, D] that become of noise [B, D]."""
        with one_thread():
            (latents,) = self.pipeline(
                latents=noise,
                generator=generators,
                num_inference_steps=self.num_inference_steps,
                truncation=self.truncation,
                output_type="latent",
                use_student=self.use_student,
                return_dict=False,
            )
        if not latents.isfinite().all():
            raise UserError(
                f"the denoiser draws NaN or infinity with {self.num_inference_steps} steps of "
                f"{type(self.pipeline.scheduler).__name__}; take another number of steps or another scheduler"
            )
        return latents


def draw(pipeline: MNIFPipeline, seed: int, indices: range, steps: int) -> Tensor:
    """The standardised latents of samples ``indices`` of ``seed``, [N, D] on the CPU."""
    noise = torch.from_numpy(initial_noise(seed, indices, pipeline.decoder.config.latent_dim))
    (latents,) = pipeline(latents=noise, num_inference_steps=steps, output_type="latent", return_dict=False)
    return pipeline.denoiser.standardised(latents).cpu()
