"""The training loop both stages share: Accelerate, checkpoints, exact resume, EMA, trackers, curves."""

import json
import math
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from mnif.errors import UserError
from mnif.files import folder_written_atomically, read_json, write_json
from mnif.progress import progress_bar

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
    lr_scheduler: str = "cosine"
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
    """"latest", the path of a checkpoint folder, or "no" to begin anew."""
    validation_steps: int = 500
    """Steps between validations."""
    report_to: str | None = None
    """A tracker of Accelerate, such as tensorboard."""
    dataloader_num_workers: int = 0
    """Worker processes that load data; 0 loads in the training process."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; "auto" compiles where a C++ compiler or a GPU is present."""


class ShuffledBatches(Sampler[list[int]]):
    """Batches of row numbers for steps ``start`` to ``stop``: a function of seed and step alone.

    Every epoch is a new permutation; rows beyond the last whole batch of an epoch wait for the next one. Starting at
    any step yields what a run from step 0 would have seen there, so a resumed run continues exactly.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, start: int, stop: int):
        self.rows, self.batch_size, self.seed, self.start, self.stop = rows, min(batch_size, rows), seed, start, stop
        self.drop_last = True  # read by Accelerate when it shares batches out to processes

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.rows // self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.start, self.stop):
            if step // per_epoch != epoch:
                epoch = step // per_epoch
                order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
            begin = step % per_epoch * self.batch_size
            yield order[begin : begin + self.batch_size].tolist()


class Rows(Dataset[dict[str, Tensor]]):
    """Tensors with the same first axis; a batch is one indexing of each, under the tensors' names."""

    def __init__(self, **tensors: Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: tensor[row] for name, tensor in self.tensors.items()}

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(rows)
        return {name: tensor[index] for name, tensor in self.tensors.items()}


def make_accelerator(arguments: TrainingArguments, folder: Path) -> Accelerator:
    """An Accelerator for ``arguments`` that logs under ``folder``."""
    return Accelerator(
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with=arguments.report_to,
        project_dir=folder,
    )


def train(
    accelerator: Accelerator,
    arguments: TrainingArguments,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    rows: Rows,
    folder: Path,
    stage: str,
    validate: Callable[[], dict[str, float]],
    ema: EMAModel | None = None,
    keep_best: str | None = None,
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

    Raises:
        UserError: the loss is not finite, or a checkpoint cannot be used.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    checkpoints = folder / "checkpoints" / stage
    steps = arguments.max_train_steps
    schedules = [
        get_scheduler(
            arguments.lr_scheduler,
            optimizer,
            num_warmup_steps=min(arguments.lr_warmup_steps, steps),
            num_training_steps=steps,
        )
        for optimizer in optimizers
    ]
    if arguments.compile == "on" or (arguments.compile == "auto" and _can_compile(accelerator)):
        module.compile()
    parameters = list(module.parameters())
    prepared = accelerator.prepare(module, *optimizers, *schedules)
    model, optimizers, schedules = prepared[0], prepared[1 : 1 + len(optimizers)], prepared[1 + len(optimizers) :]

    state = {"step": 0, "seconds": 0.0, "best": None, "best_step": 0}
    checkpoint = _checkpoint_to_resume(arguments, checkpoints)
    if checkpoint is not None:
        accelerator.print(f"resuming from {checkpoint}")
        state = _load(accelerator, checkpoint, ema)
    curves = Curves(folder / "metrics.jsonl", stage, state["step"]) if accelerator.is_main_process else None
    if arguments.report_to:
        accelerator.init_trackers(stage)

    accumulation = arguments.gradient_accumulation_steps
    sampler = ShuffledBatches(
        len(rows), arguments.train_batch_size, arguments.seed, state["step"] * accumulation, steps * accumulation
    )
    loader = DataLoader(
        rows, batch_sampler=sampler, collate_fn=_as_it_is, num_workers=arguments.dataloader_num_workers
    )
    batches = iter(accelerator.prepare(loader))
    bar = progress_bar(
        total=steps, initial=state["step"], desc=stage, unit="step", disable=not accelerator.is_local_main_process
    )
    running, started = [], time.perf_counter() - state["seconds"]
    with _interruptible() as interrupted, bar:
        while state["step"] < steps:
            _seed_step(arguments.seed, state["step"], accelerator.process_index)
            for _ in range(accumulation):
                with accelerator.accumulate(model):
                    loss = model(**next(batches))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(_dense(parameters), arguments.max_grad_norm)
                    for optimizer, schedule in zip(optimizers, schedules, strict=True):
                        optimizer.step()
                        schedule.step()
                        optimizer.zero_grad()
                running.append(loss.detach())
            if ema is not None:
                ema.step(parameters)
            state["step"] += 1
            bar.update()
            step, last = state["step"], state["step"] == steps
            state["seconds"] = time.perf_counter() - started
            if step % LOG_STEPS == 0 or last:
                mean = accelerator.reduce(torch.stack(running).mean(), "mean").item()
                running.clear()
                if not math.isfinite(mean):
                    raise UserError(_diverged(step, checkpoints))
                rate = schedules[0].get_last_lr()[0]
                bar.set_postfix(loss=f"{mean:.4g}")
                _record(accelerator, curves, state, {"loss": mean, "learning_rate": rate})
            if step % arguments.validation_steps == 0 or last:
                figures = _validated(accelerator, module, parameters, validate, ema)
                _record(accelerator, curves, state, figures)
                bar.write(f"{stage} step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()))
                if keep_best and (state["best"] is None or figures[keep_best] < state["best"]):
                    state.update(best=figures[keep_best], best_step=step)
                    _save_best(accelerator, parameters, ema, checkpoints)
            if step % arguments.checkpointing_steps == 0 or last or interrupted():
                _save(accelerator, checkpoints, state, ema, arguments.checkpoints_total_limit)
            if interrupted() and not last:
                accelerator.print(f"stopped at step {step}; the same command continues from here")
                raise KeyboardInterrupt
    if arguments.report_to:
        accelerator.end_training()
    if keep_best:
        _load_best(parameters, checkpoints)
        accelerator.print(f"kept the weights of step {state['best_step']} ({keep_best} {state['best']:.4g})")
    elif ema is not None:
        ema.copy_to(parameters)


class Curves:
    """Appends rows to a run's ``metrics.jsonl``; a resumed stage first drops its rows beyond the step it starts at."""

    def __init__(self, path: Path, stage: str, step: int):
        self.path, self.stage = path, stage
        if path.exists():
            kept = [row for row in read_curves(path) if row["stage"] != stage or row["step"] <= step]
            path.write_text("".join(json.dumps(row) + "\n" for row in kept))

    def add(self, step: int, seconds: float, figures: dict[str, float]) -> None:
        """Appends one row: stage, step, seconds of training so far, and the figures."""
        row = {"stage": self.stage, "step": step, "seconds": round(seconds, 3), **figures}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_curves(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _can_compile(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch


def _dense(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Without the embeddings that have sparse gradients, whose rows belong to single instances."""
    return [p for p in parameters if p.grad is not None and not p.grad.is_sparse]


def _seed_step(seed: int, step: int, process: int) -> None:
    """Makes a step's noise a function of seed, step and process, so that no generator state need be kept."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0]))


def _record(accelerator: Accelerator, curves: Curves | None, state: dict[str, Any], figures: dict[str, float]) -> None:
    if curves is not None:
        curves.add(state["step"], state["seconds"], figures)
    accelerator.log(figures, step=state["step"])


def _validated(
    accelerator: Accelerator,
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
        figures = validate()
    module.train()
    if ema is not None:
        ema.restore(parameters)
    return figures


def _checkpoint_to_resume(arguments: TrainingArguments, checkpoints: Path) -> Path | None:
    if arguments.resume_from_checkpoint == "no":
        shutil.rmtree(checkpoints, ignore_errors=True)
        return None
    if arguments.resume_from_checkpoint != "latest":
        path = Path(arguments.resume_from_checkpoint)
        if not (path / "state.json").is_file():
            raise UserError(f"--resume_from_checkpoint {path}: not a checkpoint folder")
        return path
    found = _numbered(checkpoints)
    return found[-1] if found else None


def _numbered(checkpoints: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    folders = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.rpartition("-")[2]))


def _save(
    accelerator: Accelerator, checkpoints: Path, state: dict[str, Any], ema: EMAModel | None, limit: int
) -> None:
    target = checkpoints / f"checkpoint-{state['step']}"
    if accelerator.is_main_process:
        with folder_written_atomically(target) as temporary:
            accelerator.save_state(str(temporary), safe_serialization=True)
            if ema is not None:
                shadow = {str(index): p.contiguous() for index, p in enumerate(ema.shadow_params)}
                save_file(shadow, temporary / "ema.safetensors")
            write_json(temporary / "state.json", state | {"ema_step": ema.optimization_step if ema else 0})
        for old in _numbered(checkpoints)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def _load(accelerator: Accelerator, checkpoint: Path, ema: EMAModel | None) -> dict[str, Any]:
    try:
        accelerator.load_state(str(checkpoint))
        state = read_json(checkpoint / "state.json")
        ema_step = state.pop("ema_step")
        if ema is not None:
            shadow = load_file(checkpoint / "ema.safetensors")
            for index, parameter in enumerate(ema.shadow_params):
                parameter.copy_(shadow[str(index)])
            ema.optimization_step = ema_step
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{checkpoint}: cannot resume from it ({reason}); remove the folder to use an older one"
        ) from None
    return state


def _save_best(
    accelerator: Accelerator, parameters: list[nn.Parameter], ema: EMAModel | None, checkpoints: Path
) -> None:
    if accelerator.is_main_process:
        best = ema.shadow_params if ema is not None else parameters
        with folder_written_atomically(checkpoints / "best") as temporary:
            tensors = {str(index): p.detach().contiguous() for index, p in enumerate(best)}
            save_file(tensors, temporary / "parameters.safetensors")
    accelerator.wait_for_everyone()


def _load_best(parameters: list[nn.Parameter], checkpoints: Path) -> None:
    best = load_file(checkpoints / "best" / "parameters.safetensors")
    with torch.no_grad():
        for index, parameter in enumerate(parameters):
            parameter.copy_(best[str(index)])


def _diverged(step: int, checkpoints: Path) -> str:
    kept = _numbered(checkpoints)
    last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"
    return f"the loss is not finite at step {step}; {last}; lower --learning_rate or --max_grad_norm"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
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
