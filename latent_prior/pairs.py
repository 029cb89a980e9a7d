"""Pairs of noise and of what the teacher draws from it, which students learn from."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from latent_prior.noise import initial_noise
from latent_prior.objective import objective_of, sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.files import sha256_of_folder
from mnif.parts import Parts
from mnif.progress import progress_bar

_PART = 1024  # samples at a time, whatever the number of processes: rounding depends on the size of a batch
_FIRST = 2**40  # number of the first sample that is drawn for students; nobody's own samples come that far


def teacher_pairs(
    folder: Path, model: Path, pipeline: MNIFPipeline, count: int, seed: int, steps: int, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Noise [count, D] and the standardised latents [count, D] that the teacher makes of it.

    They are drawn with the deterministic scheduler of the teacher's objective, whatever scheduler it is sampled with,
    in parts that stay in ``folder``: a stopped command continues, and another one asks for more of the same.

    Args:
        folder: where the parts are kept.
        model: the model folder.
        pipeline: what is in it.
        count: pairs.
        seed: of the noise.
        steps: of the teacher.
        accelerator: whose processes share the work.
    """
    teacher = MNIFPipeline(pipeline.decoder, pipeline.denoiser, sampling_scheduler(objective_of(pipeline.scheduler)))
    teacher.to(accelerator.device)
    teacher.set_progress_bar_config(disable=True)
    search = {"teacher": sha256_of_folder(model / "denoiser"), "seed": seed, "steps": steps}
    with accelerator.main_process_first():
        parts = Parts(folder, search)
    begins = range(0, count, _PART)
    missing = [begin for begin in begins if begin not in parts]
    accelerator.wait_for_everyone()
    with progress_bar(
        total=len(begins) * _PART,
        initial=(len(begins) - len(missing)) * _PART,
        desc="teacher's samples",
        unit="sample",
        disable=not accelerator.is_local_main_process,
    ) as bar:
        for begin in missing[accelerator.process_index :: accelerator.num_processes]:
            parts.save(begin, draw(teacher, seed, range(_FIRST + begin, _FIRST + begin + _PART), steps))
            bar.update(_PART * accelerator.num_processes)
    accelerator.wait_for_everyone()
    noise = torch.from_numpy(initial_noise(seed, range(_FIRST, _FIRST + count), teacher.decoder.config.latent_dim))
    return noise, parts.all()[:count]


def draw(pipeline: MNIFPipeline, seed: int, indices: range, steps: int) -> Tensor:
    """The standardised latents of samples ``indices`` of ``seed``, [N, D] on the CPU."""
    noise = torch.from_numpy(initial_noise(seed, indices, pipeline.decoder.config.latent_dim))
    (latents,) = pipeline(latents=noise, num_inference_steps=steps, output_type="latent", return_dict=False)
    return pipeline.denoiser.standardised(latents).cpu()
