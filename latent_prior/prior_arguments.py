"""The flags of `mnif prior`, their presets, and what they may not be."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from latent_prior.objective import ErrorSize, Objective, Weighting
from latent_prior.paper_denoiser import GROUPS
from mnif.arguments import given_flag, parse_arguments, preset_defaults, read_preset
from mnif.errors import UserError
from mnif.training import TrainingArguments

PRESETS = Path(__file__).parent / "presets"
_NOT_OF_A_PRESET = {"run", "preset", "extra_latents"}


@dataclass(kw_only=True)
class PriorArguments(TrainingArguments):
    """Learn the distribution of a run's latents; adds denoiser and scheduler to RUN/model."""

    run: Path
    """The run folder of `mnif fit`."""
    preset: str | None = None
    """Other defaults: paper (the paper's prior, exactly), edge (small enough for a board), or the path of a JSON file.
    Flags given win over it."""

    objective: Objective = "x0"
    """Predict the clean latent, the velocity of a diffusion, or the velocity of a straight flow."""
    weighting: Weighting = "snr-plus-one"
    """Of errors at different noise levels: as they are; as errors of the velocity, bounded; or min-SNR."""
    snr_limit: float = 5.0
    """Bounds the weight of nearly clean latents; not for plain weighting."""
    loss: ErrorSize = "mse"
    """Mean square, or pseudo-Huber, in which outliers weigh less."""
    sampler: Literal["solver", "ancestral"] = "solver"
    """The scheduler that is stored: a deterministic one of few steps, or the paper's DDPM of 1000."""

    denoiser: Literal["modulated", "paper"] = "modulated"
    """Blocks scaled and shifted by the time, or the paper's network."""
    width: int = 512
    """Hidden units of the denoiser."""
    depth: int = 4
    """Residual blocks of the denoiser."""
    dropout: float = 0.1
    """Dropout in the blocks (modulated)."""
    latent_noise: float = 0.0
    """Noise added to the latents while training, in their standard deviations: makes copies of them worth less."""
    extra_latents: list[Path] | None = None
    """More latents to learn from: tables that `mnif encode` wrote, such as of mirrored instances (--mirror)."""

    train_batch_size: int = 256
    """Latents per step, over all processes together."""
    max_train_steps: int = 1000
    """Optimizer steps; given here, they win over the epochs of a preset."""
    num_train_epochs: int | None = None
    """Passes over the latents; takes the place of --max_train_steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Of AdamW."""
    ema_decay: float = 0.999
    """Largest decay of the weights' moving average, which is what is validated, kept and sampled from."""
    validation_steps: int = 100
    """Steps between validations."""
    keep: Literal["best", "last"] = "best"
    """The weights with the smallest loss on held-out latents, or those of the last step."""


def parse_prior_arguments(arguments: list[str]) -> PriorArguments:
    """Reads the flags over the defaults of a preset, if one is named.

    Raises:
        UserError: a flag or the preset cannot be understood.
    """
    named = given_flag(arguments, "preset")
    if named is None or {"-h", "--help"} & set(arguments):
        parsed = parse_arguments(PriorArguments, arguments, "mnif prior")
    else:
        settings = read_preset(named, PRESETS)["arguments"]
        if given_flag(arguments, "max_train_steps") is not None:
            settings.pop("num_train_epochs", None)
        defaults = preset_defaults(PriorArguments, settings, named, "mnif prior", ["run"], _NOT_OF_A_PRESET)
        parsed = parse_arguments(PriorArguments, arguments, "mnif prior", replace(defaults, run=tyro.MISSING))
    _check(parsed)
    return parsed


def _check(arguments: PriorArguments) -> None:
    for flag in ("width", "depth", "max_train_steps", "num_train_epochs", "train_batch_size", "validation_steps"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag} {value}: must be at least 1")
    for flag in ("latent_noise", "weight_decay"):
        if not getattr(arguments, flag) >= 0:
            raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least 0")
    if not arguments.snr_limit > 0:
        raise UserError(f"--snr_limit {arguments.snr_limit}: must be above 0")
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout {arguments.dropout}: must be at least 0 and below 1")
    if arguments.objective == "flow" and arguments.sampler == "ancestral":
        raise UserError("--sampler ancestral: a flow is sampled without noise; take --objective x0 or v")
    fits = arguments.width % GROUPS == 0 and arguments.width > GROUPS and arguments.depth % 2 == 0
    if arguments.denoiser == "paper" and not fits:
        raise UserError(
            f"--width {arguments.width} --depth {arguments.depth}: the paper's denoiser needs a width that is a "
            f"multiple of {GROUPS} and above it, and an even depth"
        )
