"""Guidance by a weaker denoiser: samples are led away from what a worse model of the same latents would draw.

Autoguidance (Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024) needs no labels. Every step
costs both denoisers; why no student learns it is told in docs/experiments.md.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from latent_prior.denoisers import Denoiser
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.settings import TRAIN_TIMESTEPS
from mnif.data.batches import InstanceGenerator
from mnif.utils.errors import UserError


class GuidedDenoiser(Denoiser):
    """A denoiser led away from a weaker one of the same latents: it predicts weak + scale · (strong − weak).

    It draws wherever the strong one does, whose configuration it has. It is two networks and not saved.

    Args:
        strong: whose latents are drawn.
        weak: standardises latents as the strong one does, and predicts the same.
        scale: 1 is the strong one, 0 the weak one, to the bit.
        start: the share of the timesteps, from pure noise on, in which the strong one predicts alone, 0 to 1
            (Kynkäänniemi et al., Applying Guidance in a Limited Interval, 2024).

    Raises:
        UserError: they belong to different decoders, standardise latents differently, or predict different things.
    """

    def __init__(self, strong: Denoiser, weak: Denoiser, scale: float, start: float = 0.0):
        super().__init__(strong.config.latent_dim)
        if weak.config.decoder_fingerprint != strong.config.decoder_fingerprint:
            raise UserError("its latents are another decoder's; train it on a copy of the run")
        if weak.config.prediction_type != strong.config.prediction_type:
            own, wanted = weak.config.prediction_type, strong.config.prediction_type
            raise UserError(f"its denoiser predicts {own}, the prior's {wanted}; train it with the same --objective")
        probe = torch.tensor([[0.0], [1.0]], device=strong.device).expand(-1, strong.config.latent_dim)
        if not torch.allclose(strong.standardised(weak.to_latents(probe)), probe, atol=1e-3):
            raise UserError("it was trained on latents of another mean and spread; train it on a copy of the run")
        self.latent_mean.copy_(strong.latent_mean)
        self.latent_std.copy_(strong.latent_std)
        self.register_to_config(**strong.config)
        self.strong, self.weak, self.scale, self.start = strong, weak, scale, start
        self.train(strong.training)

    def forward(
        self,
        sample: Float[Tensor, "batch latent_dim"],
        timestep: Tensor | float,
        generator: InstanceGenerator | None = None,
        told: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        """Noisy standardised latents [B, D] at the scheduler's timestep → the prediction [B, D]."""
        strong, weak = (denoiser(sample, timestep, generator, told) for denoiser in (self.strong, self.weak))
        guided = torch.lerp(weak, strong, self.scale)
        if not self.start:
            return guided
        is_noisy = torch.as_tensor(timestep, device=sample.device).reshape(-1, 1) >= (1 - self.start) * TRAIN_TIMESTEPS
        return torch.where(is_noisy, strong, guided)


def guided_pipeline(pipeline: MNIFPipeline, guide: Path, scale: float, start: float = 0.0) -> MNIFPipeline:
    """Makes a pipeline that draws with the denoiser of another, led away from that of ``guide``; without a student.

    Args:
        pipeline: whose parts are taken.
        guide: run or model folder of a weaker prior of the same latents.
        scale: of the guidance (:class:`GuidedDenoiser`).
        start: of the guidance, as a share of all timesteps.

    Raises:
        UserError: there is no prior in the folder, or not one of the same latents.
    """
    weak = load_pipeline(guide).denoiser
    try:
        guided = GuidedDenoiser(pipeline.denoiser, weak, scale, start)
    except UserError as error:
        raise UserError(f"--guide {guide}: {error}") from None
    return MNIFPipeline(pipeline.decoder, guided, pipeline.scheduler)
