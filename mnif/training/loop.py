"""The training loop both stages share: Accelerate, checkpoints, exact resume, EMA, trackers, curves.

Ctrl-C and SIGTERM are noticed between two steps, by all processes at the same one.
"""

import math
import os
import time
from collections.abc import Callable, Generator
from itertools import islice
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.tracking import get_available_trackers
from accelerate.utils import GradientAccumulationPlugin, LoggerType, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL.Image import Image
from torch import Tensor, nn

from mnif.data.batches import ArrayDataset, instance_keys
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.inner_loop import InnerLoop
from mnif.training.arguments import TrainingArguments
from mnif.training.checkpoints import Checkpoints
from mnif.training.loader import make_loader, placed
from mnif.training.run_record import MetricsLog, flags_as_json
from mnif.utils.devices import default_device
from mnif.utils.errors import UserError, require
from mnif.utils.files import remove_leftovers
from mnif.utils.process import graceful_interrupt, interruption, progress_bar


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


LOG_STEPS = 50


def check_machine(arguments: TrainingArguments) -> None:
    """Refuses what this machine or environment cannot do, before any work; fills in the precision.

    Raises:
        UserError: a tracker that is unknown or not installed, or a precision that Accelerate was told to use and that
            there is not here.
    """
    tracker = arguments.report_to
    if tracker is not None and tracker not in LoggerType.list():
        raise UserError(f"--report_to {tracker}: Accelerate knows {', '.join(LoggerType.list())}")
    if tracker not in (None, "all", *map(str, get_available_trackers())):
        if tracker == "tensorboard":
            require("tensorboard", "trackers", f"--report_to {tracker}")
        raise UserError(f"--report_to {tracker}: its package is missing; install it, or leave the flag out")
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    precision, whose = arguments.mixed_precision or told, "" if arguments.mixed_precision else " (of accelerate)"
    if precision not in ("no", "fp16", "bf16"):
        raise UserError(f"--mixed_precision {precision}{whose}: must be one of no, fp16, bf16")
    if precision == "fp16" and default_device().type == "cpu":
        raise UserError(f"--mixed_precision fp16{whose}: needs a GPU, and there is none here; take bf16 or no")
    if arguments.allow_tf32 and default_device().type != "cuda":
        raise UserError("--allow_tf32: needs an NVIDIA GPU, and there is none here; leave it out")
    arguments.mixed_precision = cast(Literal["no", "fp16", "bf16"], precision)


def make_accelerator(arguments: TrainingArguments, folder: Path) -> Accelerator:
    """An Accelerator for ``arguments`` whose tracker writes to ``folder/logs``.

    Raises:
        UserError: as :func:`check_machine`.
    """
    check_machine(arguments)
    if arguments.allow_tf32:
        torch.set_float32_matmul_precision("high")  # the fields' kernels go by it too
    device = default_device()
    return Accelerator(
        cpu=device.type == "cpu",  # else processes on CPUs stay apart
        mixed_precision=arguments.mixed_precision,
        # The loader's end does not end a sum of batches: all of a step's batches are drawn before the first is used.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=arguments.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        dataloader_config=DataLoaderConfiguration(split_batches=True, non_blocking=device.type not in ("cpu", "mps")),
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
    )


class TrainLoop:
    """Trains ``module``, whose call on a batch of ``rows`` gives the loss.

    What is random in a step is a function of seed, step and instance, so that several processes end where one does, up
    to rounding: ``key`` for what differs from instance to instance, PyTorch's generator for what all of them share.

    Making one prepares everything and resumes from a checkpoint; :meth:`run` trains to the end.

    Args:
        accelerator: from :func:`make_accelerator`.
        arguments: the common training arguments.
        module: ``module(key=key, **batch)`` returns a scalar loss; ``key`` [B] int64 is for an
            :class:`mnif.data.batches.InstanceGenerator`.
        optimizers: over the module's parameters; all follow the same schedule.
        rows: the training instances, with their numbers under ``row``.
        folder: the run's folder; gets ``checkpoint-<step>`` folders under ``checkpoints/<stage>`` and rows in
            ``metrics.jsonl``.
        stage: the command's name.
        validate: figures of the current weights (of the EMA weights if there is an EMA).
        ema: averages the module's parameters; its weights are the ones validated and kept.
        keep_best: the figure whose smallest value picks the weights that are kept; None keeps the last.
        latent_embedding: latents that the module takes and that learn by themselves, each process its own.
        show: a picture of what the current weights do, for trackers.

    Raises:
        UserError: a checkpoint cannot be used.
    """

    def __init__(
        self,
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
        latent_embedding: LatentEmbedding | None = None,
        show: Callable[[], Image] | None = None,
    ):
        self.accelerator, self.arguments, self.stage = accelerator, arguments, stage
        self.validate, self.ema, self.keep_best, self.latent_embedding = validate, ema, keep_best, latent_embedding
        self.show = show

        if arguments.compile == "on" or (arguments.compile == "auto" and accelerator.device.type == "cuda"):
            module.compile()
        self.module, self.parameters = module, list(module.parameters())
        schedules = [_schedule(arguments, optimizer) for optimizer in optimizers]
        self.model, *prepared = accelerator.prepare(module, *optimizers, *schedules)
        self.optimizers, self.schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]

        limit = arguments.checkpoints_total_limit
        self.checkpoints = Checkpoints(folder / "checkpoints" / stage, accelerator, ema, latent_embedding, limit)
        self.progress = self.checkpoints.resume(arguments.resume_from_checkpoint)
        self.losses: list[Tensor] = []  # of this process, that ``progress`` lacks
        self.metrics_log: MetricsLog | None = None
        # The other processes have written what begins a stage, and write nothing here from now on.
        if accelerator.is_main_process:
            for place in (folder, folder / "samples"):
                remove_leftovers(place)
            self.metrics_log = MetricsLog(folder / "metrics.jsonl", stage, self.progress.step)
        if arguments.report_to:
            self._start_trackers(folder)
        rows = placed(arguments, rows, accelerator.device)
        loader = make_loader(arguments, rows, self.progress.step, accelerator.num_processes, accelerator.device)
        self.batches = iter(accelerator.prepare(loader))

    def _start_trackers(self, folder: Path) -> None:
        """Begins a run of this stage in the tracker's project, with the flags as its hyperparameters."""
        project = self.arguments.tracker_project_name or folder.resolve().name
        if self.arguments.report_to == "tensorboard":  # a project is a folder there, and a run one in it
            project = f"{project}/{self.stage}"
        flags = {name: value for name, value in flags_as_json(self.arguments).items() if value is not None}
        config = {
            name: " ".join(map(str, value)) if isinstance(value, list) else value for name, value in flags.items()
        }
        self.accelerator.init_trackers(project, config, {"wandb": {"name": self.stage}})

    def run(self) -> None:
        """Trains to the last step and leaves the final weights in the module.

        Raises:
            UserError: the loss is not finite, or the best weights are damaged.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
        """
        for _ in self.steps():
            pass
        if self.arguments.report_to:
            self.accelerator.end_training()
        if self.keep_best:
            self.checkpoints.load_best(self.parameters)
            best = f"{self.keep_best} {self.progress.best:.4g}"
            self.accelerator.print(f"kept the weights of step {self.progress.best_step} ({best})")
        elif self.ema is not None:
            self.ema.copy_to(self.parameters)

    def steps(self) -> Generator[int]:
        """Trains, and yields the number of steps done after each; whoever closes the iterator stops the training.

        Raises:
            UserError: the loss is not finite.
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
        """
        arguments, progress = self.arguments, self.progress
        self.started = time.perf_counter() - progress.seconds
        self.bar = progress_bar(
            total=arguments.max_train_steps,
            initial=progress.step,
            desc=self.stage,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        any_process = all_reduce_any()
        with graceful_interrupt() as interrupted, self.bar:
            while progress.step < arguments.max_train_steps:
                self._train_step()
                self.bar.update()
                if self._is_due(LOG_STEPS):
                    self._log()
                if self._is_due(arguments.validation_steps):
                    self._validate()
                stop = any_process(bool(interrupted()))
                if stop or self._is_due(arguments.checkpointing_steps):
                    self._save()
                if stop and progress.step < arguments.max_train_steps:
                    self.accelerator.print(f"stopped at step {progress.step}; the same command continues from here")
                    raise interruption(interrupted())
                yield progress.step

    def _is_due(self, every: int) -> bool:
        """Whether something that is done every so many steps, and at the last, is to be done now."""
        return self.progress.step % every == 0 or self.progress.step == self.arguments.max_train_steps

    def _train_step(self) -> None:
        """Learns from as many batches as are accumulated."""
        if self.progress.step % LOG_STEPS == 0:
            self.progress.losses.clear()
        # Drawn first: a loader's start uses up random numbers.
        batches = list(islice(self.batches, self.arguments.gradient_accumulation_steps))
        for number, batch in enumerate(batches, start=self.progress.step * len(batches)):
            _seed_batch(self.arguments.seed, number)
            key = instance_keys(self.arguments.seed, number, batch["row"])
            with self.accelerator.accumulate(self.model):
                loss = self.model(key=key, **batch)
                self.accelerator.backward(loss)
                self._update()
            self.losses.append(loss.detach())
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.progress.step += 1
        self.progress.seconds = time.perf_counter() - self.started

    def _update(self) -> None:
        """Moves weights and latents by the gradients; between accumulated batches Accelerate lets nothing move."""
        accelerator = self.accelerator
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(self.parameters, self.arguments.max_grad_norm)
        scale = _scale_of_loss(accelerator)
        for optimizer in self.optimizers:
            optimizer.step()
        if self.latent_embedding is not None and accelerator.sync_gradients:
            if accelerator.optimizer_step_was_skipped:  # float16 overflowed
                self.latent_embedding.forget()
            else:
                self.latent_embedding.step(_share_of_peak(self.optimizers[0]), scale)
        for optimizer, schedule in zip(self.optimizers, self.schedules, strict=True):
            schedule.step()
            optimizer.zero_grad()

    def _mean_loss(self) -> float:
        """The mean loss since the last record, over all processes.

        Nothing is recorded, kept or saved before it is asked for: a module that has come to NaN ends here.

        Raises:
            UserError: the loss or a parameter is not finite.
        """
        progress = self.progress
        if self.losses:
            progress.losses += self.accelerator.reduce(torch.stack(self.losses).float(), "mean").tolist()
            self.losses.clear()
        mean = torch.tensor(progress.losses).mean().item()
        finite = torch.stack([parameter.isfinite().all() for parameter in self.parameters]).all()
        if not (math.isfinite(mean) and finite):
            for part in self.module.modules():
                if isinstance(part, InnerLoop):
                    part.check()
            raise UserError(_diverged(progress.step, self.checkpoints))
        return mean

    def _log(self) -> None:
        """Records the mean loss and the learning rate."""
        mean = self._mean_loss()
        self.bar.set_postfix(loss=f"{mean:.4g}")
        self._record({"loss": mean, "learning_rate": self.schedules[0].get_last_lr()[0]})

    def _record(self, metrics: dict[str, float]) -> None:
        """Adds a row to the run's metrics, and to the tracker's."""
        if self.metrics_log is not None:
            self.metrics_log.add(self.progress.step, self.progress.seconds, metrics)
        self.accelerator.log(metrics, step=self.progress.step)

    def _validate(self) -> None:
        """Measures the weights, and keeps them if they are the best so far."""
        self._mean_loss()
        metrics = self._validation_metrics()
        self._record(metrics)
        if self.accelerator.is_main_process:
            print(f"{self.stage} step {self.progress.step}: " + _shown(metrics))
        if self.keep_best and (self.progress.best is None or metrics[self.keep_best] < self.progress.best):
            self.progress.best, self.progress.best_step = metrics[self.keep_best], self.progress.step
            self.checkpoints.save_best(self.parameters)

    def _validation_metrics(self) -> dict[str, float]:
        """What ``validate`` says of the weights, of the EMA's if there is an EMA."""
        if self.ema is not None:
            self.ema.store(self.parameters)
            self.ema.copy_to(self.parameters)
        self.module.eval()
        with torch.no_grad():
            metrics = self.validate()
            if self.show is not None and self.accelerator.is_main_process:
                self._track_picture(self.show)
        self.module.train()
        if self.ema is not None:
            self.ema.restore(self.parameters)
        return metrics

    def _track_picture(self, show: Callable[[], Image]) -> None:
        """Adds a picture to those trackers that take any in the way of diffusers' training examples."""
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({self.stage: np.asarray(show())[None]}, step=self.progress.step, **layout)

    def _save(self) -> None:
        """Writes a checkpoint, after the rows that a stage resumed from it keeps."""
        self._mean_loss()
        if self.metrics_log is not None:
            self.metrics_log.flush()
        self.checkpoints.save(self.progress)


def _schedule(arguments: TrainingArguments, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    steps = arguments.max_train_steps
    warmup = min(arguments.lr_warmup_steps, steps)
    return get_scheduler(arguments.lr_scheduler, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def _share_of_peak(optimizer: torch.optim.Optimizer) -> float:
    """What the schedule multiplies learning rates with now."""
    group = optimizer.param_groups[0]
    return group["lr"] / group["initial_lr"]


def _scale_of_loss(accelerator: Accelerator) -> float:
    """How many times too large a gradient is that this process keeps to itself.

    The loss is multiplied for float16, and is the mean of this process's share of the batch alone.
    """
    return accelerator.num_processes * (accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0)


def _seed_batch(seed: int, number: int) -> None:
    """Makes what all instances of a batch share, such as the pixels that are looked at, the same in every process.

    What differs from instance to instance comes from their keys; no state of a generator need be kept for either.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, number, 1]).generate_state(1, np.uint64)[0]))


def _shown(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def _diverged(step: int, checkpoints: Checkpoints) -> str:
    kept = checkpoints.complete()
    last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    mend = "lower --learning_rate or --max_grad_norm and begin anew with --resume_from_checkpoint no"
    return f"the loss is not finite at step {step}; {last}; {mend}"
