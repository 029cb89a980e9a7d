"""`mnif distill`: a student that draws in one to four steps what the prior needs many for."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_prior.denoiser import Denoiser, LatentDenoiser
from latent_prior.energy import energy_distance
from latent_prior.model_card import write_model_card
from latent_prior.objective import (
    TRAIN_TIMESTEPS,
    ErrorSize,
    error_size,
    objective_of,
    sampling_scheduler,
    student_scheduler,
)
from latent_prior.pairs import draw, teacher_pairs
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.arguments import parse_arguments
from mnif.errors import UserError
from mnif.files import folder_written_atomically, merge_json, sha256_of_folder
from mnif.latents import LatentTable
from mnif.model_folder import save_component, save_index
from mnif.rows import Rows
from mnif.runs import begin_stage, finish_stage, peak_memory_megabytes
from mnif.training import TrainingArguments, make_accelerator, train

_HELD_OUT_SHARE = 0.05  # of the pairs
_COMPARED = 2000  # samples and latents that distances are taken over


@dataclass(kw_only=True)
class DistillArguments(TrainingArguments):
    """Teach a small denoiser to draw in few steps what the prior draws in many; adds student and student_scheduler to
    RUN/model."""

    run: Path
    """The run folder of `mnif prior`."""
    student_steps: tuple[int, ...] = (1, 2, 4)
    """The numbers of steps that the student is to sample with; one student serves all."""
    num_pairs: int = 65536
    """Noises that the teacher draws samples from; what it draws stays in RUN/pairs."""
    teacher_steps: int = 8
    """Denoising steps of the teacher, a multiple of each of --student_steps."""
    width: int = 256
    """Hidden units of the student."""
    depth: int = 4
    """Residual blocks of the student."""
    dropout: float = 0.0
    """Dropout in the blocks, if there are too few pairs."""
    loss: ErrorSize = "mse"
    """Mean square, or pseudo-Huber, in which outliers weigh less."""
    train_batch_size: int = 256
    """Pairs per step, over all processes together."""
    max_train_steps: int = 4000
    """Optimizer steps."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Of AdamW."""
    ema_decay: float = 0.999
    """Largest decay of the weights' moving average, which is what is validated and kept."""
    validation_steps: int = 500
    """Steps between validations; the weights with the smallest error on pairs held out are kept."""


class DistillationLoss(nn.Module):
    """How far a student is from where its teacher ends, from noise and from noisy samples on.

    From pure noise this is the regression on pairs of Luhman and Luhman (2021). The other timesteps are those that a
    student of several steps comes by. What it is asked for there is where the teacher would go from that state, not
    where the first noise led it, so that a later step can put right what an earlier one has blurred; as in consistency
    models (Song et al., 2023), one student serves all numbers of steps.

    Args:
        student: what learns; it predicts the clean latent.
        timesteps: [T], of the states; one half of a batch starts at the first, pure noise, if there are others.
        size: what is made of an error.
    """

    timesteps: Tensor
    shares: Tensor

    def __init__(self, student: Denoiser, timesteps: Tensor, size: ErrorSize = "mse"):
        super().__init__()
        self.student, self.size = student, size
        shares = torch.ones(len(timesteps))
        shares[0] = max(len(timesteps) - 1, 1)
        self.register_buffer("timesteps", timesteps)
        self.register_buffer("shares", shares / shares.sum())

    def forward(self, states: Tensor, samples: Tensor) -> Tensor:
        """The mean error over a batch of :class:`latent_prior.pairs.Pairs`, each [B, T, D]; one state of each row."""
        row = torch.arange(len(states), device=states.device)
        place = torch.multinomial(self.shares, len(states), replacement=True)
        guess = self.student(states[row, place], self.timesteps[place])
        return error_size(guess - samples[row, place], self.size).mean()

    @torch.no_grad()
    def errors(self, states: Tensor, samples: Tensor) -> dict[str, float]:
        """Mean square errors from each timestep on, ``error_999`` …; ``validation_loss`` is their mean by shares."""
        guesses = [self.student(states[:, place], timestep) for place, timestep in enumerate(self.timesteps)]
        found = (torch.stack(guesses, dim=1) - samples).square().mean(dim=(0, 2))
        names = [f"error_{timestep}" for timestep in self.timesteps.tolist()]
        return {"validation_loss": float(found @ self.shares)} | dict(zip(names, found.tolist(), strict=True))


def student_timesteps(steps: Sequence[int]) -> list[int]:
    """All timesteps that students of ``steps`` steps come by, from pure noise down."""
    scheduler, found = student_scheduler(), set()
    for count in steps:
        scheduler.set_timesteps(count)
        found.update(scheduler.timesteps.tolist())
    return sorted(found, reverse=True)


def main(arguments: list[str]) -> None:
    """Runs `mnif distill`."""
    distill(parse_arguments(DistillArguments, arguments, "mnif distill"))


def distill(arguments: DistillArguments) -> None:
    """Trains a student of the prior in ``arguments.run``.

    Raises:
        UserError: the run has no finished prior, a flag is out of range, or training diverges.
    """
    started = time.perf_counter()
    _check(arguments)
    run, model = arguments.run, arguments.run / "model"
    if not run.is_dir():
        raise UserError(f"--run {run}: no such run folder; `mnif fit --output_dir {run}` makes it")
    pipeline = load_pipeline(model)
    table = LatentTable.load(run / "latents.safetensors", pipeline.decoder.fingerprint())
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "distill", arguments, {"teacher_sha256": sha256_of_folder(model / "denoiser")}):
        print(f"{run}: `mnif distill` has finished here before with these arguments; nothing to do")
        return
    timesteps = student_timesteps(arguments.student_steps)
    pairs = teacher_pairs(
        run / "pairs",
        model,
        pipeline,
        arguments.num_pairs,
        arguments.seed,
        arguments.teacher_steps,
        timesteps,
        accelerator,
    )
    drawn = time.perf_counter() - started
    set_seed(arguments.seed)
    student = LatentDenoiser(
        latent_dim=pairs.states.shape[2],
        width=arguments.width,
        depth=arguments.depth,
        dropout=arguments.dropout,
        decoder_fingerprint=pipeline.denoiser.config.decoder_fingerprint,
        distilled_steps=sorted(arguments.student_steps),
    )
    student.latent_mean.copy_(pipeline.denoiser.latent_mean)
    student.latent_std.copy_(pipeline.denoiser.latent_std)
    loss = DistillationLoss(student, pairs.timesteps, arguments.loss).to(accelerator.device)
    held_out = max(int(_HELD_OUT_SHARE * arguments.num_pairs), 1)
    accelerator.print(
        f"pairs of {arguments.num_pairs - held_out} noises to learn from, {held_out} held out; "
        f"student {student.num_parameters():,} parameters"
    )

    def validate() -> dict[str, float]:
        return loss.errors(
            *(part[:held_out].to(accelerator.device) for part in (pairs.states, pairs.samples)),
        )

    optimizer = torch.optim.AdamW(
        student.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, fused=True
    )
    ema = EMAModel(loss.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    rows = Rows(states=pairs.states[held_out:], samples=pairs.samples[held_out:])
    train(accelerator, arguments, loss, [optimizer], rows, run, "distill", validate, ema, "validation_loss")
    if accelerator.is_main_process:
        seconds = {"seconds_of_pairs": round(drawn, 1), "seconds": round(time.perf_counter() - started, 1)}
        _finish(arguments, pipeline, student.cpu().eval(), table, seconds)
    accelerator.wait_for_everyone()


def _check(arguments: DistillArguments) -> None:
    for steps in arguments.student_steps or (0,):
        if not 1 <= steps <= TRAIN_TIMESTEPS:
            raise UserError(f"--student_steps {steps}: numbers of steps from 1 to {TRAIN_TIMESTEPS} are needed")
    for steps in arguments.student_steps:
        if arguments.teacher_steps % steps:
            given = f"--teacher_steps {arguments.teacher_steps}"
            raise UserError(f"{given}: must be a multiple of each of --student_steps, also of {steps}")
    for flag in ("teacher_steps", "width", "depth", "max_train_steps", "train_batch_size", "validation_steps"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout {arguments.dropout}: must be at least 0 and below 1")
    if arguments.num_pairs < 2:
        raise UserError(f"--num_pairs {arguments.num_pairs}: at least one to learn from and one held out are needed")


def _finish(
    arguments: DistillArguments,
    pipeline: MNIFPipeline,
    student: LatentDenoiser,
    table: LatentTable,
    seconds: dict[str, float],
) -> None:
    """Adds the student to the model folder and reports its distance from the data beside the teacher's."""
    run = arguments.run
    add_student(run / "model", pipeline, student)
    teacher = MNIFPipeline(pipeline.decoder, pipeline.denoiser.cpu(), pipeline.scheduler)
    distances = energy_distances(arguments, teacher, student, table)
    figures = seconds | {
        "peak_rss_mb": peak_memory_megabytes(),
        "student_parameters": student.num_parameters(),
        "energy_distance": distances,
    }
    merge_json(run / "metrics.json", {"distill": figures})
    write_model_card(run)
    finish_stage(run, "distill")
    print("energy distance of samples from the training latents, standardised:")
    for name, distance in distances.items():
        print(f"  {name:24} {distance:8.4f}")
    print(f"{run / 'model'}: student and student_scheduler added")


def add_student(folder: Path, pipeline: MNIFPipeline, student: LatentDenoiser) -> None:
    """Adds student and scheduler to a model folder that holds the teacher; the index is written last."""
    save_component(folder, "student", student)
    scheduler = student_scheduler()
    with folder_written_atomically(folder / "student_scheduler") as temporary:
        scheduler.save_pretrained(temporary)
    save_index(folder, MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, scheduler))


def energy_distances(
    arguments: DistillArguments, teacher: MNIFPipeline, student: LatentDenoiser, table: LatentTable
) -> dict[str, float]:
    """Distances from the training latents: of both models by number of steps, and of two controls.

    The controls are a full-covariance Gaussian in the place of a model, and the held-out latents if there are any.
    """
    solver = sampling_scheduler(objective_of(teacher.scheduler))
    pipelines = {
        "student": MNIFPipeline(teacher.decoder, student, student_scheduler()),
        "teacher": MNIFPipeline(teacher.decoder, teacher.denoiser, solver),
    }
    train_latents = student.standardised(_some(table.train))
    distances: dict[str, float] = {}
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        for steps in sorted({*arguments.student_steps, *([arguments.teacher_steps] if name == "teacher" else [])}):
            samples = draw(pipeline, arguments.seed, range(_COMPARED), steps)
            distances[f"{name}_{steps}"] = energy_distance(samples, train_latents)
    rows = student.standardised(table.train).double()
    generator = np.random.default_rng([arguments.seed, 1])
    gaussian = generator.multivariate_normal(rows.mean(dim=0), rows.T.cov(), size=_COMPARED, method="eigh")
    distances["gaussian"] = energy_distance(torch.from_numpy(gaussian), train_latents)
    if table.held_out.sum() > 1:
        held_out = student.standardised(_some(table.latents[table.held_out]))
        distances["held_out"] = energy_distance(held_out, train_latents)
    return distances


def _some(latents: Tensor) -> Tensor:
    """At most as many rows as distances are taken over, evenly spread."""
    return latents[torch.linspace(0, len(latents) - 1, min(len(latents), _COMPARED)).long()]
