"""Latents of many samples that are the same to the last bit however the work is shared out.

Matrix products run in other kernels for other numbers of rows, and those round differently: the same sample drawn
alone and among 64 differs by about 1e-6. So samples are always drawn in the same company: number i in block i // 64,
which is drawn whole even if only one of it is wanted, and on one thread. What is drawn then depends on seed and number
alone, on one and the same kind of machine and version of PyTorch, and not on the number of processes or threads or on
what was drawn before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from latent_prior.noise import initial_noise, step_generators
from latent_prior.pipeline import MNIFPipeline
from mnif.errors import UserError
from mnif.threads import one_thread

BLOCK = 64
"""Samples that are drawn together."""


@dataclass(frozen=True)
class Drawing:
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
