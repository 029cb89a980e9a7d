"""How a student's samples come to have the distribution of its teacher's: distribution matching distillation."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latent_prior.denoisers import Denoiser
from latent_prior.diffusion import OBJECTIVES, DenoisingLoss, Objective, noise_levels, student_scheduler
from latent_prior.distillation import energy_distance
from latent_prior.settings import TRAIN_TIMESTEPS
from mnif.data.batches import InstanceGenerator, evenly_spaced
from mnif.utils.devices import sent

_NOISE = (0.02, 0.98)  # shares of all timesteps between which noise is added, as the authors of the method do

_LEAST_ERROR = 1e-3  # that gradients are divided by

_ENERGY_WEIGHT = 2.5

_LATENTS_AT_ONCE = 1024  # that the samples of a batch are held against

_SPREAD_OF_TOLD = 0.4  # standard deviation, at first


class DistributionMatchingLoss(nn.Module):
    """The training loss of a student and of the auxiliary denoiser that follows it.

    A regression on pairs of noise and sample blurs where it is unsure. Here the student is free to choose which noise
    leads to which sample. Its loss is the sum of

    - distribution matching (Yin et al., 2024): noise is added to what the student draws. The teacher guesses what is
      clean there if it came of the data, and the auxiliary denoiser, which learns to denoise the student's samples,
      what is if it came of the student. Their difference is the gradient of the Kullback-Leibler divergence between
      both noisy distributions; it is divided by the teacher's mean absolute error, which has the size of the noise.
    - the energy distance between samples and training latents (Székely and Rizzo, 2013), which sees whether all of the
      data is drawn, where the divergence is content with a part of it.

    A student of several steps learns at each timestep that it comes by, from the states that its own steps before lead
    to, as in DMD2 (Yin et al., 2024). All of a batch is at one of them, at pure noise half of the time.

    Args:
        student: what learns; it predicts the clean latent.
        teacher: whose distribution is wanted; it stays as it is, and is no part of this module.
        auxiliary: of the teacher's objective, a copy of the teacher to begin with. It is told at which timestep the
            student drew.
        objective: what teacher and auxiliary denoiser predict.
        steps: the numbers of steps that the student is to sample with.
        latents: the training latents, standardised [N, D].
    """

    latents: Tensor
    every_timestep: Tensor

    def __init__(
        self,
        student: Denoiser,
        teacher: Denoiser,
        auxiliary: Denoiser,
        objective: Objective,
        steps: Sequence[int],
        latents: Float[Tensor, "n latent_dim"],
    ):
        super().__init__()
        self.student, self.objective = student, objective
        self.following = DenoisingLoss(auxiliary, objective)
        self._teacher = (teacher,)  # in a tuple, so that nobody trains or saves it
        self.ways = {count: _timesteps(count) for count in sorted(steps)}
        self.paths = student_paths(steps)
        self.timesteps = sorted({path[-1] for path in self.paths}, reverse=True)
        told = _SPREAD_OF_TOLD * torch.randn(len(self.timesteps), auxiliary.config.time_width)
        self.told = nn.Parameter(told)
        self.register_buffer("latents", latents, persistent=False)
        # Where they are wanted, so that a number becomes a tensor there without a copy.
        self.register_buffer("every_timestep", torch.arange(TRAIN_TIMESTEPS, dtype=torch.float32), persistent=False)

    def following_parameters(self) -> list[nn.Parameter]:
        """Everything that learns but the student."""
        return [*self.following.parameters(), self.told]

    def forward(self, key: Int64[Tensor, " batch"], row: Int64[Tensor, " batch"] | None = None) -> Float[Tensor, ""]:
        """The sum of the losses of student and auxiliary denoiser, whose gradients do not meet.

        Args:
            key: [B], what noise and times of the samples are made of; PyTorch's generator draws what a batch shares.
            row: not looked at.
        """
        generator = InstanceGenerator(key)
        path = self.paths[_draw_path(self.paths)]
        noise = generator.normal(self.student.config.latent_dim)
        drawn = self.student(self._states(noise, path), self.every_timestep[path[-1]], generator).float()
        told = self.told[self.timesteps.index(path[-1])].expand(len(drawn), -1)
        moved = self._matching(drawn, generator, told.detach()) + _ENERGY_WEIGHT * self._energy(drawn)
        return moved + self._following(drawn.detach(), generator, told)

    @torch.no_grad()
    def _states(self, noise: Tensor, path: Sequence[int]) -> Tensor:
        """Where the student's steps lead from pure noise [B, D] to the last timestep of a path: [B, D]."""
        timesteps = torch.stack([self.every_timestep[timestep] for timestep in path])
        alphas, sigmas = noise_levels("x0", timesteps, self.following.schedule)
        states = noise
        for place, timestep in enumerate(timesteps[:-1]):
            clean = self.student(states, timestep).float()
            noise = (states - alphas[place] * clean) / sigmas[place]
            states = alphas[place + 1] * clean + sigmas[place + 1] * noise
        return states

    def _matching(self, drawn: Tensor, generator: InstanceGenerator, told: Tensor) -> Tensor:
        """Half the mean square of the way that samples [B, D] are to go; its gradient is that way."""
        with torch.no_grad():
            timestep, alpha, sigma = self._levels(generator)
            noisy = alpha * drawn + sigma * generator.normal(drawn.shape[1])
            real = self._clean(self._teacher[0], noisy, timestep, alpha, sigma)
            own = self._clean(self.following.denoiser, noisy, timestep, alpha, sigma, told)
            error = (drawn - real).abs().mean(dim=1, keepdim=True)
            target = drawn - (own - real) / error.clamp(min=_LEAST_ERROR)
        return (drawn - target).square().mean() / 2

    def _levels(self, generator: InstanceGenerator) -> tuple[Tensor, Tensor, Tensor]:
        """Draws timesteps [B], and gives the shares of clean latent and noise there, [B, 1] each."""
        least, most = _NOISE
        timestep = TRAIN_TIMESTEPS * (least + (most - least) * generator.uniform())
        timestep = timestep if OBJECTIVES[self.objective].is_flow else timestep.long()
        alpha, sigma = noise_levels(self.objective, timestep, self.following.schedule)
        return timestep, alpha[:, None], sigma[:, None]

    def _clean(
        self,
        denoiser: Denoiser,
        noisy: Tensor,
        timestep: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        told: Tensor | None = None,
    ) -> Tensor:
        """The clean latents [B, D] that a denoiser guesses."""
        predicted = denoiser(noisy, timestep, None, told).float()
        return OBJECTIVES[self.objective].clean(noisy, predicted, alpha, sigma)

    def _energy(self, drawn: Tensor) -> Tensor:
        """What has the gradient of the energy distance of samples [B, D], in root mean squares over the dimensions.

        They are held against latents that are the same in all processes, and against the samples of all processes.
        """
        real = self.latents[sent(torch.randint(len(self.latents), (_LATENTS_AT_ONCE,)), drawn.device)]
        others = _of_all_processes(drawn.detach())
        within = torch.cdist(drawn, others).mean() * len(others) / max(len(others) - 1, 1)  # none from itself
        return 2 * (torch.cdist(drawn, real).mean() - within) / math.sqrt(drawn.shape[1])

    def _following(self, drawn: Tensor, generator: InstanceGenerator, told: Tensor) -> Tensor:
        """The auxiliary denoiser's loss on the student's samples [B, D]."""
        noise, time = generator.normal(drawn.shape[1]), generator.uniform()
        return self.following.at(self.following.denoiser.to_latents(drawn), noise, time, told=told).mean()

    @torch.no_grad()
    def distances(self, noise: Float[Tensor, "n latent_dim"]) -> dict[str, float]:
        """Energy distances of samples from the training latents, ``energy_distance_1`` … by the number of steps.

        Args:
            noise: that the samples are made of, [N, D].
        """
        real = self.latents[evenly_spaced(len(self.latents), len(noise))]
        drawn = {count: self.student(self._states(noise, way), way[-1]) for count, way in self.ways.items()}
        return {f"energy_distance_{count}": energy_distance(samples, real) for count, samples in drawn.items()}


def _of_all_processes(samples: Tensor) -> Tensor:
    """Joins the samples [B, D] of all processes, [B · processes, D]."""
    if not torch.distributed.is_initialized():
        return samples
    parts = [torch.empty_like(samples) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, samples.contiguous())
    return torch.cat(parts)


def student_paths(steps: Sequence[int]) -> list[tuple[int, ...]]:
    """Collects the ways of students of ``steps`` steps: for each number the timesteps up to the first, the second …

    The first is that to pure noise alone, and none is there twice.
    """
    ways = (_timesteps(count) for count in sorted(steps))
    return list(dict.fromkeys(way[:place] for way in ways for place in range(1, len(way) + 1)))


def _timesteps(count: int) -> tuple[int, ...]:
    """The timesteps of a student of ``count`` steps, from pure noise down."""
    scheduler = student_scheduler()
    scheduler.set_timesteps(count)
    return tuple(scheduler.timesteps.tolist())


def _draw_path(paths: Sequence[tuple[int, ...]]) -> int:
    """Draws the number of a path with PyTorch's generator: half of the time the first, that of pure noise."""
    if len(paths) == 1 or torch.rand(()).item() < 0.5:
        return 0
    return int(torch.randint(1, len(paths), ()))
