"""`mnif distill`: a student that draws in one to four steps what the prior needs many for."""

from __future__ import annotations

import time
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from latent_prior.settings import TRAIN_TIMESTEPS, HubFlags, LossType, check_heads
from mnif.training.arguments import TrainingArguments
from mnif.training.run_record import begin_stage, check_finished, finish_stage
from mnif.utils.args import parse_arguments
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import folder_written_atomically, remove_folder, sha256_of_folder
from mnif.utils.json_files import merge_json
from mnif.utils.output_folders import holds_folder
from mnif.utils.process import peak_memory_megabytes

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from latent_prior.denoisers import Denoiser
    from latent_prior.distillation import Pairs
    from latent_prior.pipeline import MNIFPipeline
    from mnif.latents.table import LatentTable
    from mnif.models.mnif_model import MNIFModel

_HELD_OUT_SHARE = 0.05  # of the pairs
_MATCHING = "distill-matching"  # stage of its curves and checkpoints
_BY_HEART = 0.6  # times the error on other pairs: that on learned ones is less where there are too few
_COMPARED = 2000  # samples and latents that distances are taken over


@dataclass(kw_only=True)
class StudentFlags:
    """The network that learns."""

    student_steps: tuple[int, ...] = (1, 2, 4)
    """The numbers of steps that the student is to sample with; one student serves all."""
    denoiser: Literal["modulated", "transformer"] | None = None
    """Of what form it is, as of `mnif prior`; unless given: modulated, whatever the teacher is."""
    width: int = 192
    """Hidden units of the student; of a transformer at each token."""
    depth: int = 6
    """Residual blocks of the student; one step gains more from them than from width."""
    dropout: float = 0.0
    """Dropout in the blocks, if there are too few pairs."""


@dataclass(kw_only=True)
class TeacherFlags:
    """What it learns from."""

    num_pairs: int = 65536
    """Noises that the teacher draws samples from; what it draws stays in RUN/pairs."""
    teacher_steps: int = 8
    """Denoising steps of the teacher, a multiple of each of --student_steps."""


@dataclass(kw_only=True)
class MatchingFlags:
    """How its samples are brought to the distribution of the teacher's, after it has learned of pairs."""

    matching_steps: int = 2000
    """Optimizer steps of distribution matching; 0: the student stays what it learned of pairs."""
    matching_learning_rate: float = 1.5e-3
    """Its peak learning rate, also that of the auxiliary denoiser that follows the student."""
    matching_share: float = 1.0
    """How far the weights go from what was learned of pairs (0) to where matching ends (1); three quarters
    of the way may draw nearer to the data in one step than either (as Wortsman et al., 2022, found of classifiers)."""


@dataclass(kw_only=True)
class OptimizerFlags:
    """How the network moves."""

    loss: LossType = "mse"
    """Mean square, or pseudo-Huber, in which outliers weigh less."""
    weight_decay: float = 0.0
    """Of AdamW."""
    ema_decay: float = 0.999
    """Largest decay of the weights' moving average, which is what is validated and kept."""


@dataclass(kw_only=True)
class DistillArguments(StudentFlags, TeacherFlags, MatchingFlags, OptimizerFlags, TrainingArguments, HubFlags):
    """Teach a small denoiser to draw in few steps what the prior draws in many; adds student and student_scheduler to
    RUN/model."""

    run: Path
    """The run folder of `mnif prior`."""

    train_batch_size: int = 256
    """Pairs per step, over all processes together."""
    max_train_steps: int = 4000
    """Optimizer steps on pairs, before those of --matching_steps."""
    learning_rate: float = 2e-3
    """Peak learning rate of these."""
    validation_steps: int = 500
    """Steps between validations; the weights with the smallest error on pairs held out are kept."""


def main(arguments: list[str]) -> None:
    """Runs `mnif distill`."""
    distill(parse_arguments(DistillArguments, arguments, "mnif distill"))


@holds_folder("run")
def distill(arguments: DistillArguments) -> None:
    """Trains a student of the prior in ``arguments.run``.

    Raises:
        UserError: the run has no finished prior, a flag is out of range, or training diverges.
    """
    from accelerate.utils import set_seed

    from latent_prior.denoisers import settings_of_tokens
    from latent_prior.distillation import student_timesteps, teacher_pairs
    from latent_prior.hub import push, repository_for
    from latent_prior.pipeline import load_pipeline
    from mnif.latents.table import LatentTable
    from mnif.training.loader import fill_in_steps
    from mnif.training.loop import check_machine, make_accelerator

    started = time.perf_counter()
    _check(arguments)
    run, model = arguments.run, arguments.run / "model"
    if not run.is_dir():
        raise UserError(f"--run {run}: no such run folder; `mnif fit --output_dir {run}` makes it")
    check_machine(arguments)
    check_finished(run, "prior")
    pipeline = load_pipeline(model)
    table = LatentTable.load_for(pipeline.decoder, run / "latents.safetensors")
    settings_of_tokens(arguments.denoiser or "modulated", pipeline.decoder)  # in time: nothing has been written yet
    fill_in_steps(arguments, arguments.num_pairs - _held_out(arguments))
    repository = repository_for(arguments, model)
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "distill", arguments, {"teacher_sha256": sha256_of_folder(model / "denoiser")}):
        print(f"{run}: `mnif distill` has finished here before with these arguments; nothing to do")
        push(model, repository)
        return
    pairs = teacher_pairs(
        run / "pairs",
        model,
        pipeline,
        arguments.num_pairs,
        arguments.seed,
        arguments.teacher_steps,
        student_timesteps(arguments.student_steps),
        accelerator,
    )
    drawn = time.perf_counter() - started
    set_seed(arguments.seed)
    student = make_student(arguments, pipeline.denoiser, pipeline.decoder)
    _train(arguments, accelerator, student, pairs)
    if arguments.matching_steps:
        _match(arguments, accelerator, student, pipeline, table)
    if accelerator.is_main_process:
        seconds = {"seconds_of_pairs": round(drawn, 1), "seconds": round(time.perf_counter() - started, 1)}
        _finish(arguments, pipeline, student.eval(), table, seconds)
        push(model, repository)
    accelerator.wait_for_everyone()


def _held_out(arguments: DistillArguments) -> int:
    """The number of pairs that are not learned from."""
    return max(int(_HELD_OUT_SHARE * arguments.num_pairs), 1)


def _train(arguments: DistillArguments, accelerator: Accelerator, student: Denoiser, pairs: Pairs) -> None:
    """Leaves in ``student`` what was learned of the pairs."""
    import torch
    from diffusers.training_utils import EMAModel

    from latent_prior.distillation import DistillationLoss
    from mnif.data.batches import array_dataset
    from mnif.training.loop import TrainLoop

    loss = DistillationLoss(student, pairs.timesteps, arguments.loss).to(accelerator.device)
    held_out, run = _held_out(arguments), arguments.run
    arguments = _of_loop(arguments, "distill")
    accelerator.print(
        f"pairs of {arguments.num_pairs - held_out} noises to learn from, {held_out} held out; "
        f"student {student.num_parameters():,} parameters"
    )

    def errors(begin: int, end: int) -> dict[str, float]:
        return loss.errors(*(part[begin:end].to(accelerator.device) for part in (pairs.states, pairs.samples)))

    def validate() -> dict[str, float]:
        learned = errors(held_out, 2 * held_out)["validation_loss"]
        return errors(0, held_out) | {"validation_loss_train": learned}

    optimizer = torch.optim.AdamW(
        student.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, fused=True
    )
    ema = EMAModel(loss.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    rows = array_dataset({"states": pairs.states[held_out:], "samples": pairs.samples[held_out:]})
    keep_best = "validation_loss"
    loop = TrainLoop(accelerator, arguments, loss, [optimizer], rows, run, "distill", validate, ema, keep_best)
    matched = run / "checkpoints" / _MATCHING
    if loop.progress.step < arguments.max_train_steps and accelerator.is_main_process and matched.exists():
        remove_folder(matched)  # it went on from other weights
    loop.run()
    found = validate()
    learned, others = found["validation_loss_train"], found["validation_loss"]
    if learned < _BY_HEART * others:
        accelerator.print(
            f"the student knows its pairs by heart: it errs by {learned:.3g} on them and by {others:.3g} on others; "
            f"to go on learning it wants a larger --num_pairs than {arguments.num_pairs}"
        )


def _match(
    arguments: DistillArguments,
    accelerator: Accelerator,
    student: Denoiser,
    pipeline: MNIFPipeline,
    table: LatentTable,
) -> None:
    """Brings the samples of ``student`` to the distribution of the teacher's."""
    import torch
    from diffusers.training_utils import EMAModel

    from latent_prior.diffusion import objective_of
    from latent_prior.distribution_matching import DistributionMatchingLoss
    from latent_prior.sampling import initial_noise
    from mnif.data.batches import ArrayDataset
    from mnif.training.loop import TrainLoop

    of_pairs = [parameter.detach().clone() for parameter in student.parameters()]
    accelerator.free_memory()  # checkpoints hold what is learned now, and no longer what was
    teacher, objective = pipeline.denoiser.eval().requires_grad_(False), objective_of(pipeline.scheduler)
    auxiliary = deepcopy(teacher).train().requires_grad_(True)
    latents = student.standardised(table.train.to(accelerator.device))
    loss = DistributionMatchingLoss(student.train(), teacher, auxiliary, objective, arguments.student_steps, latents)
    loss.to(accelerator.device)
    noise = torch.from_numpy(initial_noise(arguments.seed, range(_COMPARED), latents.shape[1])).to(accelerator.device)
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            parameters, lr=arguments.matching_learning_rate, betas=(0.0, 0.99), weight_decay=0, fused=True
        )
        for parameters in (student.parameters(), loss.following_parameters())
    ]
    ema = EMAModel(loss.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    rows, validate = ArrayDataset(row=torch.arange(arguments.num_pairs)), partial(loss.distances, noise)
    arguments = _of_loop(arguments, _MATCHING)
    TrainLoop(accelerator, arguments, loss, optimizers, rows, arguments.run, _MATCHING, validate, ema).run()
    with torch.no_grad():
        for matched, before in zip(student.parameters(), of_pairs, strict=True):
            matched.lerp_(before.to(matched.device), 1 - arguments.matching_share)


def _of_loop(arguments: DistillArguments, stage: str) -> DistillArguments:
    """The arguments of one of the two loops, which does not go on from a checkpoint of the other."""
    named = Path(arguments.resume_from_checkpoint)
    resume = "latest" if named.is_dir() and named.parent.name != stage else arguments.resume_from_checkpoint
    if stage != _MATCHING:
        return replace(arguments, resume_from_checkpoint=resume)
    steps, rate = arguments.matching_steps, arguments.matching_learning_rate
    return replace(arguments, resume_from_checkpoint=resume, max_train_steps=steps, learning_rate=rate)


def make_student(arguments: DistillArguments, teacher: Denoiser, decoder: MNIFModel) -> Denoiser:
    """The student, freshly drawn, with the statistics of the latents that the teacher learned from."""
    from latent_prior.denoisers import DENOISERS, settings_of_tokens

    name = arguments.denoiser or "modulated"
    kind: Any = DENOISERS[name]
    student: Denoiser = kind(
        **settings_of_tokens(name, decoder),
        latent_dim=teacher.config.latent_dim,
        width=arguments.width,
        depth=arguments.depth,
        dropout=arguments.dropout,
        decoder_fingerprint=teacher.config.decoder_fingerprint,
        rounded_fingerprints=teacher.config.rounded_fingerprints,
        distilled_steps=sorted(arguments.student_steps),
    )
    student.latent_mean.copy_(teacher.latent_mean)
    student.latent_std.copy_(teacher.latent_std)
    return student


def _check(arguments: DistillArguments) -> None:
    for steps in arguments.student_steps or (0,):
        if not 1 <= steps <= TRAIN_TIMESTEPS:
            raise UserError(f"--student_steps {steps}: numbers of steps from 1 to {TRAIN_TIMESTEPS} are needed")
    for steps in arguments.student_steps:
        if arguments.teacher_steps % steps:
            given = f"--teacher_steps {arguments.teacher_steps}"
            raise UserError(f"{given}: must be a multiple of each of --student_steps, also of {steps}")
    check_at_least(
        1,
        teacher_steps=arguments.teacher_steps,
        width=arguments.width,
        depth=arguments.depth,
        max_train_steps=arguments.max_train_steps,
        num_train_epochs=arguments.num_train_epochs,
        train_batch_size=arguments.train_batch_size,
        validation_steps=arguments.validation_steps,
    )
    matching = {"matching_steps": arguments.matching_steps, "matching_learning_rate": arguments.matching_learning_rate}
    check_at_least(0, **matching)
    if not 0 <= arguments.matching_share <= 1:
        raise UserError(f"--matching_share {arguments.matching_share}: must lie between 0 and 1")
    if arguments.denoiser == "transformer":
        check_heads(arguments.width)
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout {arguments.dropout}: must be at least 0 and below 1")
    if arguments.num_pairs < 2:
        raise UserError(f"--num_pairs {arguments.num_pairs}: at least one to learn from and one held out are needed")


def _finish(
    arguments: DistillArguments,
    pipeline: MNIFPipeline,
    student: Denoiser,
    table: LatentTable,
    seconds: dict[str, float],
) -> None:
    """Adds the student to the model folder and reports its distance from the data beside the teacher's."""
    from latent_prior.model_card import write_model_card
    from latent_prior.pipeline import MNIFPipeline

    run = arguments.run
    add_student(run / "model", pipeline, student)
    teacher = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler)
    distances = energy_distances(arguments, teacher, student, table)
    metrics = seconds | {
        "peak_rss_mb": peak_memory_megabytes(),
        "student_parameters": student.num_parameters(),
        "energy_distance": distances,
    }
    merge_json(run / "metrics.json", {"distill": metrics})
    write_model_card(run)
    finish_stage(run, "distill")
    print("energy distance of samples from the training latents, standardised:")
    for name, distance in distances.items():
        print(f"  {name:24} {distance:8.4f}")
    print(f"{run / 'model'}: student and student_scheduler added")


def add_student(folder: Path, pipeline: MNIFPipeline, student: Denoiser) -> None:
    """Adds student and scheduler to a model folder that holds the teacher; the index is written last."""
    from latent_prior.diffusion import student_scheduler
    from latent_prior.pipeline import MNIFPipeline
    from latent_prior.pipeline_folder import save_index
    from mnif.models.io import save_component

    scheduler = student_scheduler()
    both = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, scheduler)
    save_component(folder, "student", student)
    with folder_written_atomically(folder / "student_scheduler") as temporary:
        scheduler.save_pretrained(temporary)
    save_index(folder, both)


def energy_distances(
    arguments: DistillArguments, teacher: MNIFPipeline, student: Denoiser, table: LatentTable
) -> dict[str, float]:
    """Distances from the training latents: of both models by number of steps, and of two controls.

    Samples are drawn where the student is, and compared on the CPU, in double precision.
    The controls are a full-covariance Gaussian in the place of a model, and the held-out latents if there are any.
    """
    import torch

    from latent_prior.diffusion import objective_of, sampling_scheduler, student_scheduler
    from latent_prior.distillation import energy_distance
    from latent_prior.pipeline import MNIFPipeline
    from latent_prior.sampling import sample_latents

    def standardised(latents: Tensor) -> Tensor:
        return student.standardised(latents.to(student.device)).cpu()

    solver, decoder = sampling_scheduler(objective_of(teacher.scheduler)), teacher.decoder.to(student.device)
    pipelines = {
        "student": MNIFPipeline(decoder, student, student_scheduler()),
        "teacher": MNIFPipeline(decoder, teacher.denoiser, solver),
    }
    train_latents = standardised(_some(table.train))
    distances: dict[str, float] = {}
    for name, pipeline in pipelines.items():
        pipeline.set_progress_bar_config(disable=True)
        for steps in sorted({*arguments.student_steps, *([arguments.teacher_steps] if name == "teacher" else [])}):
            samples = standardised(sample_latents(pipeline, arguments.seed, range(_COMPARED), steps))
            distances[f"{name}_{steps}"] = energy_distance(samples, train_latents)
    rows = standardised(table.train).double()
    generator = np.random.default_rng([arguments.seed, 1])
    gaussian = generator.multivariate_normal(rows.mean(dim=0), rows.T.cov(), size=_COMPARED, method="eigh")
    distances["gaussian"] = energy_distance(torch.from_numpy(gaussian), train_latents)
    if table.held_out.sum() > 1:
        held_out = standardised(_some(table.latents[table.held_out]))
        distances["held_out"] = energy_distance(held_out, train_latents)
    return distances


def _some(latents: Tensor) -> Tensor:
    """At most as many rows as distances are taken over, evenly spread."""
    import torch

    return latents[torch.linspace(0, len(latents) - 1, min(len(latents), _COMPARED)).long()]
