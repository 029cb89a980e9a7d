"""What the denoiser learns to predict, and the scheduler that turns its predictions into samples."""

from typing import Literal

import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr
from torch import Tensor, nn

from latent_prior.denoiser import LatentDenoiser

Objective = Literal["x0", "flow"]
TRAIN_TIMESTEPS = 1000


def sampling_scheduler(objective: Objective) -> SchedulerMixin:
    """The scheduler that samples a denoiser trained with ``objective``.

    ``"x0"`` is sampled by DPM-Solver++ (Lu et al., 2022) on the squared-cosine schedule (Nichol and Dhariwal, 2021),
    ``"flow"`` by Euler steps of the flow (Lipman et al., 2023).
    """
    if objective == "flow":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)
    return DPMSolverMultistepScheduler(
        num_train_timesteps=TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        algorithm_type="dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )


class DenoisingLoss(nn.Module):
    """The training loss of a denoiser, called on the decoder's latents.

    - ``"x0"``: predicts the clean latent on the squared-cosine schedule; the squared error is weighted with
      min(SNR + 1, ``snr_limit``), the error in the velocity bounded for nearly clean inputs (Hang et al., 2023).
    - ``"flow"``: predicts the velocity noise − latent on the straight path between the two.

    Args:
        denoiser: what learns.
        objective: ``"x0"`` or ``"flow"``.
        snr_limit: the largest weight of the x0 error.
    """

    def __init__(self, denoiser: LatentDenoiser, objective: Objective, snr_limit: float = 5.0):
        super().__init__()
        self.denoiser, self.objective, self.snr_limit = denoiser, objective, snr_limit
        self.noising = DDPMScheduler(TRAIN_TIMESTEPS, beta_schedule="squaredcos_cap_v2")

    def forward(self, latents: Tensor) -> Tensor:
        """Mean loss of latents [B, D], with noise and times from torch's generator."""
        noise = torch.randn_like(latents)
        return self.at(latents, noise, torch.rand(len(latents), device=latents.device)).mean()

    def at(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The loss of each latent [B] for given noise [B, D] and times [B] in [0, 1)."""
        clean = self.denoiser.standardised(latents)
        if self.objective == "flow":
            noisy = torch.lerp(clean, noise, time[:, None])
            error = self.denoiser(noisy, time * TRAIN_TIMESTEPS) - (noise - clean)
            return error.square().mean(dim=1)
        timesteps = (time * TRAIN_TIMESTEPS).long()
        noisy = self.noising.add_noise(clean, noise, timesteps)
        weight = (compute_snr(self.noising, timesteps) + 1).clamp(max=self.snr_limit)
        return weight * (self.denoiser(noisy, timesteps) - clean).square().mean(dim=1)


@torch.no_grad()
def validation_loss(loss: DenoisingLoss, latents: Tensor, repeats: int = 8) -> float:
    """The mean loss of latents [N, D] with noise that is the same at every call, times spread evenly."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(repeats):
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        time = (torch.randperm(len(latents), generator=generator) + 0.5) / len(latents)
        total += loss.at(latents, noise, time.to(latents)).mean().item()
    return total / repeats
