"""The training loop both stages share: Accelerate, checkpoints, exact resume, EMA, trackers, curves.

Ctrl-C and SIGTERM are noticed between two steps, by all processes at the same one.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import GradientAccumulationPlugin, LoggerType
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mnif.data.batches import ArrayDataset, ShuffledBatches
from mnif.latents.embedding import LatentEmbedding
from mnif.training.checkpoints import Checkpoints
from mnif.training.run_record import MetricsLog
from mnif.utils.errors import UserError
from mnif.utils.files import remove_leftovers
from mnif.utils.process import progress_bar


def all_reduce_any() -> Callable[[bool], bool]:
    """Whether any process says yes: all learn it at the same step, or one would wait for the others for ever.

    Processes have a channel of their own for it, so that no GPU is waited for.
    """
    if not torch.distributed.is_initialized():
        return lambda said: said
    channel = torch.distributed.new_group(backend="gloo")

    def agreed(said: bool) -> bool:
        answer = torch.tensor([said], dtype=torch.uint8)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX, group=channel)
        return bool(answer)

    return agreed


@contextmanager
def graceful_interrupt() -> Iterator[Callable[[], bool]]:
    """Lets the step at hand finish after a first Ctrl-C or SIGTERM; a second one stops at once."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


LOG_STEPS = 50


@dataclass(kw_only=True)
class TrainingArguments:
    """What every training command takes; names as in the training examples of diffusers."""

    seed: int = 0
    """Same seed, data and arguments give the same model."""
    train_batch_size: int = 64
    """Instances per step, over all processes together."""
    max_train_steps: int = 1000
    """Optimizer steps."""
    gradient_accumulation_steps: int = 1
    """Batches summed up before an optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "cosine"
    """Learning-rate schedule, by its name in diffusers."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of Accelerate's autocast."""
    checkpointing_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Older checkpoints beyond this number are removed."""
    resume_from_checkpoint: str = "latest"
    """"latest", the path of a checkpoint folder, or "no" to forget what was done here and begin anew."""
    validation_steps: int = 500
    """Steps between validations."""
    report_to: str | None = None
    """A tracker of Accelerate, such as tensorboard."""
    dataloader_num_workers: int = 0
    """Worker processes that load data; 0 loads in the training process."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; "auto" compiles on a GPU. On a CPU the fields are an operator of their own, compiled once."""


def make_accelerator(arguments: TrainingArguments, folder: Path) -> Accelerator:
    """An Accelerator for ``arguments`` that logs under ``folder``.

    Raises:
        UserError: Accelerate knows no such tracker.
    """
    if arguments.report_to is not None and arguments.report_to not in LoggerType.list():
        known = ", ".join(LoggerType.list())
        raise UserError(f"--report_to {arguments.report_to}: Accelerate knows {known}")
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # else processes on CPUs stay apart
        mixed_precision=arguments.mixed_precision,
        # The loader's end does not end a sum of batches: all of a step's batches are drawn before the first is used.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=arguments.report_to,
        project_dir=folder,
    )


def train(
    accelerator: Accelerator,
    arguments: TrainingArguments,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rows: ArrayDataset,
    folder: Path,
    stage: str,
    validate: Callable[[], dict[str, float]],
    ema: EMAModel | None = None,
    keep_best: str | None = None,
    latent_rows: LatentEmbedding | None = None,
) -> None:
    """Trains ``module``, whose call on a batch of ``rows`` gives the loss, and leaves the final weights in it.

    Args:
        accelerator: from :func:`make_accelerator`.
        arguments: the common training arguments.
        module: ``module(**batch)`` returns a scalar loss.
        optimizers: over the module's parameters; all follow the same schedule.
        rows: the training instances.
        folder: the run's folder; gets ``checkpoint-<step>`` folders under ``checkpoints/<stage>`` and rows in
            ``metrics.jsonl``.
        stage: the command's name.
        validate: figures of the current weights (of the EMA weights if there is an EMA).
        ema: averages the module's parameters; its weights are the ones validated and kept.
        keep_best: the figure whose smallest value picks the weights that are kept; None keeps the last.
        latent_rows: latents that the module takes and that learn by themselves, each process its own.

    Raises:
        UserError: the loss is not finite, or a checkpoint cannot be used.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    steps, accumulation = arguments.max_train_steps, arguments.gradient_accumulation_steps
    if arguments.compile == "on" or (arguments.compile == "auto" and accelerator.device.type == "cuda"):
        module.compile()
    parameters = list(module.parameters())
    schedules = [_schedule(arguments, optimizer) for optimizer in optimizers]
    model, *prepared = accelerator.prepare(module, *optimizers, *schedules)
    optimizers, schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]

    checkpoints = Checkpoints(
        folder / "checkpoints" / stage, accelerator, ema, latent_rows, limit=arguments.checkpoints_total_limit
    )
    progress = checkpoints.resume(arguments.resume_from_checkpoint)
    if accelerator.is_main_process:  # the others have written what begins a stage, and write nothing here from now on
        for place in (folder, folder / "samples"):
            remove_leftovers(place)
    if arguments.report_to:
        accelerator.init_trackers(stage)
    curves = MetricsLog(folder / "metrics.jsonl", stage, progress.step) if accelerator.is_main_process else None

    def record(metrics: dict[str, float]) -> None:
        if curves is not None:
            curves.add(progress.step, progress.seconds, metrics)
        accelerator.log(metrics, step=progress.step)

    batches = iter(accelerator.prepare(_loader(arguments, rows, progress.step, accelerator.num_processes)))
    bar = progress_bar(
        total=steps, initial=progress.step, desc=stage, unit="step", disable=not accelerator.is_local_main_process
    )
    losses: list[Tensor] = []  # of this process, that ``progress`` lacks

    def mean_loss() -> float:
        """Since the last record; nothing is recorded, kept or saved of a module that has come to NaN."""
        if losses:
            progress.losses += accelerator.reduce(torch.stack(losses).float(), "mean").tolist()
            losses.clear()
        mean = torch.tensor(progress.losses).mean().item()
        if not (math.isfinite(mean) and all(bool(parameter.isfinite().all()) for parameter in parameters)):
            raise UserError(_diverged(progress.step, checkpoints))
        return mean

    started = time.perf_counter() - progress.seconds
    agreed = all_reduce_any()
    with graceful_interrupt() as interrupted, bar:
        while progress.step < steps:
            if progress.step % LOG_STEPS == 0:
                progress.losses.clear()
            step_batches = list(islice(batches, accumulation))  # drawn first: a loader's start uses up random numbers
            _seed_step(arguments.seed, progress.step, accelerator.process_index)
            for batch in step_batches:
                with accelerator.accumulate(model):
                    loss = model(**batch)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(parameters, arguments.max_grad_norm)
                    scale = _scale_of_loss(accelerator)
                    for optimizer in optimizers:
                        optimizer.step()
                    if latent_rows is not None and accelerator.sync_gradients:
                        if accelerator.optimizer_step_was_skipped:  # float16 overflowed
                            latent_rows.forget()
                        else:
                            latent_rows.step(_share_of_peak(optimizers[0]), scale)
                    for optimizer, schedule in zip(optimizers, schedules, strict=True):
                        schedule.step()
                        optimizer.zero_grad()
                losses.append(loss.detach())
            if ema is not None:
                ema.step(parameters)
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            bar.update()
            last = progress.step == steps
            if progress.step % LOG_STEPS == 0 or last:
                mean = mean_loss()
                bar.set_postfix(loss=f"{mean:.4g}")
                record({"loss": mean, "learning_rate": schedules[0].get_last_lr()[0]})
            if progress.step % arguments.validation_steps == 0 or last:
                mean_loss()
                metrics = _validated(module, parameters, validate, ema)
                record(metrics)
                if accelerator.is_main_process:
                    bar.write(f"{stage} step {progress.step}: " + _shown(metrics))
                if keep_best and (progress.best is None or metrics[keep_best] < progress.best):
                    progress.best, progress.best_step = metrics[keep_best], progress.step
                    checkpoints.save_best(parameters)
            stop = agreed(interrupted())
            if progress.step % arguments.checkpointing_steps == 0 or last or stop:
                mean_loss()
                if curves is not None:
                    curves.flush()
                checkpoints.save(progress)
            if stop and not last:
                accelerator.print(f"stopped at step {progress.step}; the same command continues from here")
                raise KeyboardInterrupt
    if arguments.report_to:
        accelerator.end_training()
    if keep_best:
        checkpoints.load_best(parameters)
        accelerator.print(f"kept the weights of step {progress.best_step} ({keep_best} {progress.best:.4g})")
    elif ema is not None:
        ema.copy_to(parameters)


def _schedule(arguments: TrainingArguments, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    steps = arguments.max_train_steps
    warmup = min(arguments.lr_warmup_steps, steps)
    return get_scheduler(arguments.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def batch_size_of(arguments: TrainingArguments, instances: int, processes: int) -> int:
    """Instances in a batch over all processes: what was asked for if there are as many, and as many for each process.

    Raises:
        UserError: that is none.
    """
    batch_size = min(arguments.train_batch_size, instances) // processes * processes
    if not batch_size:
        raise UserError(f"--train_batch_size {arguments.train_batch_size}: fewer than one row for each process")
    return batch_size


def _loader(arguments: TrainingArguments, rows: ArrayDataset, step: int, processes: int) -> DataLoader:
    """Batches from ``step`` to the end; a batch is made by one indexing, so there is nothing to collate."""
    batch_size = batch_size_of(arguments, len(rows), processes)
    accumulation = arguments.gradient_accumulation_steps
    batches = ShuffledBatches(
        len(rows),
        batch_size,
        arguments.seed,
        step * accumulation,
        arguments.max_train_steps * accumulation,
    )
    workers = arguments.dataloader_num_workers
    return DataLoader(rows, batch_sampler=batches, collate_fn=_as_it_is, num_workers=workers)


def _as_it_is(batch: Any) -> Any:
    return batch


def _share_of_peak(optimizer: torch.optim.Optimizer) -> float:
    """What the schedule multiplies learning rates with now."""
    group = optimizer.param_groups[0]
    return group["lr"] / group["initial_lr"]


def _scale_of_loss(accelerator: Accelerator) -> float:
    """How many times too large a gradient is that this process keeps to itself.

    The loss is multiplied for float16, and is the mean of this process's share of the batch alone.
    """
    return accelerator.num_processes * (accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0)


def _seed_step(seed: int, step: int, process: int) -> None:
    """Makes a step's noise a function of seed, step and process, so that no generator state need be kept."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]))


def _validated(
    module: nn.Module,
    parameters: list[nn.Parameter],
    validate: Callable[[], dict[str, float]],
    ema: EMAModel | None,
) -> dict[str, float]:
    if ema is not None:
        ema.store(parameters)
        ema.copy_to(parameters)
    module.eval()
    with torch.no_grad():
        metrics = validate()
    module.train()
    if ema is not None:
        ema.restore(parameters)
    return metrics


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _diverged(step: int, checkpoints: Checkpoints) -> str:
    kept = checkpoints.complete()
    last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    mend = "lower --learning_rate or --max_grad_norm and begin anew with --resume_from_checkpoint no"
    return f"the loss is not finite at step {step}; {last}; {mend}"
