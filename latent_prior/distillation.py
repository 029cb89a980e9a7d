"""What students learn from: pairs of a noisy latent and the sample its teacher ends at from there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float, Int64
from torch import Tensor, nn

from latent_prior.denoisers import Denoiser
from latent_prior.diffusion import (
    OBJECTIVES,
    LossType,
    Objective,
    noise_levels,
    objective_of,
    penalty,
    sampling_scheduler,
    student_scheduler,
)
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from mnif.data.batches import InstanceGenerator
from mnif.utils.devices import sent
from mnif.utils.files import sha256_of_folder
from mnif.utils.process import progress_bar
from mnif.utils.resumable import Chunks


@torch.no_grad()
def energy_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'|, over all pairs of different points (Székely and Rizzo, 2013).

    It is zero if both sets come from one distribution, and only then; for finite sets it is estimated without bias, so
    it may come out a little below zero.

    Args:
        x: points [N, D], at least 2.
        y: points [M, D], at least 2.
    """
    x, y = x.double(), y.double()
    return (2 * torch.cdist(x, y).mean() - _mean_within(x) - _mean_within(y)).item()


def _mean_within(points: Tensor) -> Tensor:
    """The mean distance of two different points."""
    count = len(points)
    return torch.nn.functional.pdist(points).sum() * 2 / (count * (count - 1))


_CHUNK = 1024  # samples at a time, whatever the number of processes: rounding depends on the size of a batch

_FIRST = 2**40  # number of the first sample that is drawn for students; nobody's own samples come that far

_APART = 2**36  # further on begins the noise that is added to samples for the next timestep


@dataclass(frozen=True)
class Pairs:
    """The states that students are shown, and the samples that they are to guess.

    Attributes:
        timesteps: [T], from pure noise down; those of the students' scheduler.
        states: [N, T, D] standardised latents with the noise of their timestep: pure noise first, then the sample that
            the teacher made of it, with new noise added.
        samples: [N, T, D], the standardised latents that the teacher ends at when it goes on from each of the states.
    """

    timesteps: Tensor
    states: Tensor
    samples: Tensor


@dataclass(frozen=True)
class Teacher:
    """A denoiser with the deterministic scheduler of its objective, from any timestep of the students' on.

    Args:
        denoiser: of standardised latents.
        objective: what it predicts.
        steps: from pure noise to the sample; from other timesteps on as many as are left of these.
    """

    denoiser: Denoiser
    objective: Objective
    steps: int

    @torch.no_grad()
    def samples(self, states: Float[Tensor, "batch latent_dim"], timestep: int) -> Float[Tensor, "batch latent_dim"]:
        """Solves to the end: the teacher's samples [B, D].

        Args:
            states: [B, D] standardised latents with the noise of ``timestep`` on the squared-cosine schedule.
            timestep: for ``"x0"`` and ``"v"`` one of those of ``steps`` steps.
        """
        scheduler, begin = sampling_scheduler(self.objective), 0
        if OBJECTIVES[self.objective].is_flow:
            alpha, sigma = (level.item() for level in noise_levels("x0", torch.tensor([timestep])))
            level = sigma / (alpha + sigma)  # where on the straight path to noise the same mixture lies
            states = states / (alpha + sigma)
            left = max(round(level * self.steps), 1)
            scheduler.set_timesteps(sigmas=np.linspace(level, level / left, left))
        else:
            scheduler.set_timesteps(self.steps)
            begin = scheduler.timesteps.tolist().index(timestep)
        scheduler.set_begin_index(begin)
        steps = scheduler.timesteps[begin:]  # on the CPU, where the scheduler looks numbers up by them
        for step, told in zip(steps, sent(steps, states.device), strict=True):
            states = scheduler.step(self.denoiser(states, told), step, states).prev_sample
        return states


def teacher_pairs(
    folder: Path,
    model: Path,
    pipeline: MNIFPipeline,
    count: int,
    seed: int,
    steps: int,
    timesteps: Sequence[int],
    accelerator: Accelerator,
) -> Pairs:
    """Draws the pairs of ``count`` noises.

    The teacher draws with the deterministic scheduler of its objective, whatever scheduler it is sampled with, in
    chunks that stay in ``folder``: a stopped command continues, and another one asks for more of the same.

    Args:
        folder: where the chunks are kept.
        model: the model folder.
        pipeline: what is in it.
        count: of noises.
        seed: of the noise.
        steps: of the teacher.
        timesteps: of the states, from pure noise down.
        accelerator: whose processes share the work.
    """
    denoiser = pipeline.denoiser.to(accelerator.device)
    teacher = Teacher(denoiser, objective_of(pipeline.scheduler), steps)
    search = {"teacher": sha256_of_folder(model / "denoiser"), "seed": seed, "steps": steps}
    with accelerator.main_process_first():
        chunks = Chunks(folder, "latents", search | {"timesteps": list(timesteps)})
    begins = range(0, count, _CHUNK)
    missing = [begin for begin in begins if begin not in chunks]
    accelerator.wait_for_everyone()
    with progress_bar(
        total=len(begins) * _CHUNK,
        initial=(len(begins) - len(missing)) * _CHUNK,
        desc="teacher's samples",
        unit="noise",
        disable=not accelerator.is_local_main_process,
    ) as bar:
        for begin in missing[accelerator.process_index :: accelerator.num_processes]:
            noise = _noise(seed, begin, _CHUNK, len(timesteps), pipeline).to(accelerator.device)
            chunks.save(begin, _ends(teacher, noise, timesteps).cpu().numpy())
            bar.update(_CHUNK * accelerator.num_processes)
    accelerator.wait_for_everyone()
    samples, states = torch.from_numpy(chunks.all(begins)[:count]), _noise(seed, 0, count, len(timesteps), pipeline)
    for place, timestep in enumerate(timesteps[1:], start=1):
        states[:, place] = _noisy(samples[:, 0], states[:, place], timestep)
    return Pairs(torch.tensor(timesteps), states, samples)


def _ends(teacher: Teacher, noise: Tensor, timesteps: Sequence[int]) -> Tensor:
    """Solves from pure noise, and from what came of it with the noise of each further timestep: [B, T, D]."""
    ends = [teacher.samples(noise[:, 0], timesteps[0])]
    for place, timestep in enumerate(timesteps[1:], start=1):
        ends.append(teacher.samples(_noisy(ends[0], noise[:, place], timestep), timestep))
    return torch.stack(ends, dim=1)


def _noise(seed: int, begin: int, count: int, timesteps: int, pipeline: MNIFPipeline) -> Tensor:
    """Draws noise from number ``begin`` on, another for each timestep: [count, T, D]."""
    latent_dim = pipeline.decoder.config.latent_dim
    starts = (_FIRST + place * _APART + begin for place in range(timesteps))
    drawn = [initial_noise(seed, range(start, start + count), latent_dim) for start in starts]
    return torch.from_numpy(np.stack(drawn, axis=1))


def _noisy(samples: Tensor, noise: Tensor, timestep: int) -> Tensor:
    """Mixes samples [B, D] with as much of the noise [B, D] as there is at ``timestep``."""
    alpha, sigma = (level.item() for level in noise_levels("x0", torch.tensor(timestep)))
    return alpha * samples + sigma * noise


class DistillationLoss(nn.Module):
    """The training loss of a student: how far it is from where its teacher ends, from noise and noisy samples on.

    From pure noise this is the regression on pairs of Luhman and Luhman (2021). The other timesteps are those that a
    student of several steps comes by. There it learns where the teacher would go from that state, not where the first
    noise led it, so that a later step can put right what an earlier one has blurred; as in consistency
    models (Song et al., 2023), one student serves all numbers of steps.

    Args:
        student: what learns; it predicts the clean latent.
        timesteps: [T], of the states; one half of a batch starts at the first, pure noise, if there are others.
        loss_type: what is made of an error (:func:`latent_prior.diffusion.penalty`).
    """

    timesteps: Tensor
    shares: Tensor
    bounds: Tensor

    def __init__(self, student: Denoiser, timesteps: Tensor, loss_type: LossType = "mse"):
        super().__init__()
        self.student, self.loss_type = student, loss_type
        shares = torch.ones(len(timesteps))
        shares[0] = max(len(timesteps) - 1, 1)
        self.register_buffer("timesteps", timesteps)
        self.register_buffer("shares", shares / shares.sum())
        # Kept, as torch.compile for GPUs cannot look numbers up in what is a part of a tensor.
        self.register_buffer("bounds", self.shares.cumsum(0)[:-1].clone(), persistent=False)

    def forward(
        self,
        states: Float[Tensor, "batch timesteps latent_dim"],
        samples: Float[Tensor, "batch timesteps latent_dim"],
        key: Int64[Tensor, " batch"],
        row: Int64[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, ""]:
        """The mean error over a batch of :class:`latent_prior.distillation.Pairs`, each [B, T, D]; one state of each,
        chosen by its key [B]. ``row`` is not looked at."""
        generator = InstanceGenerator(key)
        each = torch.arange(len(states), device=states.device)
        place = torch.bucketize(generator.uniform(), self.bounds, right=True)
        guess = self.student(states[each, place], self.timesteps[place], generator)
        return penalty(guess - samples[each, place], self.loss_type).mean()

    @torch.no_grad()
    def errors(
        self, states: Float[Tensor, "batch timesteps latent_dim"], samples: Float[Tensor, "batch timesteps latent_dim"]
    ) -> dict[str, float]:
        """Mean square errors from each timestep on, ``error_999`` …; ``validation_loss`` is their mean by shares."""
        guesses = [self.student(states[:, place], timestep) for place, timestep in enumerate(self.timesteps)]
        found = (torch.stack(guesses, dim=1) - samples).square().mean(dim=(0, 2))
        names = [f"error_{timestep}" for timestep in self.timesteps.tolist()]
        return {"validation_loss": float(found @ self.shares)} | dict(zip(names, found.tolist(), strict=True))


def student_timesteps(steps: Sequence[int]) -> list[int]:
    """Collects the timesteps that students of ``steps`` steps come by, from pure noise down."""
    scheduler, found = student_scheduler(), set()
    for count in steps:
        scheduler.set_timesteps(count)
        found.update(scheduler.timesteps.tolist())
    return sorted(found, reverse=True)
