"""The flags that every training command takes; names as in the training examples of diffusers."""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class LearningFlags:
    """How long and how fast a model learns."""

    seed: int = 0
    """Same seed, data and arguments give the same model."""
    train_batch_size: int = 64
    """Instances per step, over all processes together."""
    max_train_steps: int = 1000
    """Optimizer steps; given here, they win over the epochs of a preset."""
    num_train_epochs: int | None = None
    """Passes over the data; takes the place of --max_train_steps."""
    gradient_accumulation_steps: int = 1
    """Batches summed up before an optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    lr_scheduler: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"
    ] = "cosine"
    """Learning-rate schedule, by its name in diffusers; only a finished run with a constant one can be made longer."""
    lr_warmup_steps: int = 100
    """Steps of linear warm-up."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""


@dataclass(kw_only=True)
class SavingFlags:
    """What is kept and shown of a run on its way."""

    checkpointing_steps: int = 1000
    """Steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """Older checkpoints beyond this number are removed."""
    resume_from_checkpoint: str = "latest"
    """"latest", the path of a checkpoint folder, or "no" to forget what was done here and begin anew."""
    validation_steps: int = 500
    """Steps between validations."""
    report_to: str | None = None
    """A tracker of Accelerate, such as tensorboard: gets the flags, the curves, and pictures at every validation."""
    tracker_project_name: str | None = None
    """The project that a tracker files the run under; default: the name of the run folder."""


@dataclass(kw_only=True)
class MachineFlags:
    """How a run uses the machine."""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of autocast; default: what `accelerate launch` says, by its flag or `accelerate config`; else no."""
    allow_tf32: bool = False
    """Let an NVIDIA GPU round what it multiplies to TensorFloat-32: float32 products several times as fast."""
    data_on_device: Literal["auto", "on", "off"] = "auto"
    """Training data live on the device and are indexed there; "auto": on an NVIDIA GPU, if they take a quarter of its
    memory at most. Each process holds all of them."""
    dataloader_num_workers: int = 0
    """Worker processes that load data that are not on the device; 0 loads in the training process."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; "auto" compiles on a GPU. On a CPU the fields are an operator of their own, compiled once."""


@dataclass(kw_only=True)
class TrainingArguments(LearningFlags, SavingFlags, MachineFlags):
    """What every training command takes."""
