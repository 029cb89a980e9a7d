"""What a prior may be set to, by the names that flags take and configurations hold, and the hub's flags.

It is read without torch, and without what talks to the hub, by every command that has such flags.
"""

from dataclasses import dataclass
from typing import Literal

from mnif.utils.errors import UserError

Objective = Literal["x0", "v", "flow"]

PredictionType = Literal["sample", "v_prediction", "flow_prediction"]
"""Objectives by their names in diffusers' schedulers."""

Weighting = Literal["plain", "snr-plus-one", "min-snr"]

LossType = Literal["mse", "pseudo-huber"]

DenoiserName = Literal["modulated", "paper", "transformer"]

PAPER_GROUPS = 16
"""Of the normalisation in the paper's denoiser: its width is a multiple of it."""

HEAD_WIDTH = 32
"""Numbers in a token that one head of a transformer attends by."""

TRAIN_TIMESTEPS = 1000

INFERENCE_STEPS = 8
"""The default of sampling: samples of emoji are as near to the data with 8 steps as with 20 (docs/performance.md)."""

GUIDANCE_SCALE = 1.5
"""Of guidance by a weaker prior, the default: the nearest samples of emoji (docs/experiments.md)."""


def check_heads(width: int) -> None:
    """Makes sure that heads can share the width of a transformer; one that is narrower has a single head.

    Raises:
        UserError: they cannot.
    """
    if width > HEAD_WIDTH and width % HEAD_WIDTH:
        raise UserError(f"--width {width}: a transformer's is a multiple of {HEAD_WIDTH}, or below")


@dataclass(kw_only=True)
class HubFlags:
    """The model folder on the Hugging Face hub."""

    push_to_hub: bool = False
    """Upload the model folder with its card at the end; `hf auth login` or HF_TOKEN says who you are."""
    hub_model_id: str | None = None
    """The repository on the hub, name or user/name; default: the name of the run folder."""
