"""Pairs that students learn from: a noisy latent, and the sample its teacher ends at from there."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from latent_prior.denoiser import Denoiser
from latent_prior.noise import initial_noise
from latent_prior.objective import Objective, noise_levels, objective_of, sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.files import sha256_of_folder
from mnif.parts import Parts
from mnif.progress import progress_bar

_PART = 1024  # samples at a time, whatever the number of processes: rounding depends on the size of a batch
_FIRST = 2**40  # number of the first sample that is drawn for students; nobody's own samples come that far
_APART = 2**36  # further on begins the noise that is added to samples for the next timestep


@dataclass(frozen=True)
class Pairs:
    """What students are shown.

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
    def samples(self, states: Tensor, timestep: int) -> Tensor:
        """Where the teacher ends, [B, D].

        Args:
            states: [B, D] standardised latents with the noise of ``timestep`` on the squared-cosine schedule.
            timestep: for ``"x0"`` and ``"v"`` one of those of ``steps`` steps.
        """
        scheduler, begin = sampling_scheduler(self.objective), 0
        if self.objective == "flow":
            alpha, sigma = (level.item() for level in noise_levels("x0", torch.tensor([timestep])))
            level = sigma / (alpha + sigma)  # where on the straight path to noise the same mixture lies
            states = states / (alpha + sigma)
            left = max(round(level * self.steps), 1)
            scheduler.set_timesteps(sigmas=np.linspace(level, level / left, left), device=states.device)
        else:
            scheduler.set_timesteps(self.steps, device=states.device)
            begin = scheduler.timesteps.tolist().index(timestep)
        scheduler.set_begin_index(begin)
        for step in scheduler.timesteps[begin:]:
            states = scheduler.step(self.denoiser(states, step), step, states).prev_sample
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
    """The pairs of ``count`` noises.

    The teacher draws with the deterministic scheduler of its objective, whatever scheduler it is sampled with, in
    parts that stay in ``folder``: a stopped command continues, and another one asks for more of the same.

    Args:
        folder: where the parts are kept.
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
        parts = Parts(folder, search | {"timesteps": list(timesteps)})
    begins = range(0, count, _PART)
    missing = [begin for begin in begins if begin not in parts]
    accelerator.wait_for_everyone()
    with progress_bar(
        total=len(begins) * _PART,
        initial=(len(begins) - len(missing)) * _PART,
        desc="teacher's samples",
        unit="noise",
        disable=not accelerator.is_local_main_process,
    ) as bar:
        for begin in missing[accelerator.process_index :: accelerator.num_processes]:
            noise = _noise(seed, begin, _PART, len(timesteps), pipeline).to(accelerator.device)
            ends = [teacher.samples(noise[:, 0], timesteps[0])]
            for place, timestep in enumerate(timesteps[1:], start=1):
                ends.append(teacher.samples(_noisy(ends[0], noise[:, place], timestep), timestep))
            parts.save(begin, torch.stack(ends, dim=1))
            bar.update(_PART * accelerator.num_processes)
    accelerator.wait_for_everyone()
    samples, states = parts.all()[:count], _noise(seed, 0, count, len(timesteps), pipeline)
    for place, timestep in enumerate(timesteps[1:], start=1):
        states[:, place] = _noisy(samples[:, 0], states[:, place], timestep)
    return Pairs(torch.tensor(timesteps), states, samples)


def _noise(seed: int, begin: int, count: int, timesteps: int, pipeline: MNIFPipeline) -> Tensor:
    """Noise number ``begin`` and on, another for each timestep: [count, T, D]."""
    latent_dim = pipeline.decoder.config.latent_dim
    starts = (_FIRST + place * _APART + begin for place in range(timesteps))
    drawn = [initial_noise(seed, range(start, start + count), latent_dim) for start in starts]
    return torch.from_numpy(np.stack(drawn, axis=1))


def _noisy(samples: Tensor, noise: Tensor, timestep: int) -> Tensor:
    alpha, sigma = noise_levels("x0", torch.tensor([timestep], device=samples.device))
    return alpha * samples + sigma * noise


def draw(pipeline: MNIFPipeline, seed: int, indices: range, steps: int) -> Tensor:
    """The standardised latents of samples ``indices`` of ``seed``, [N, D] on the CPU."""
    noise = torch.from_numpy(initial_noise(seed, indices, pipeline.decoder.config.latent_dim))
    (latents,) = pipeline(latents=noise, num_inference_steps=steps, output_type="latent", return_dict=False)
    return pipeline.denoiser.standardised(latents).cpu()
