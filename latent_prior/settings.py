"""What a prior may be set to, by the names that flags take and configurations hold; read without torch."""

from typing import Literal

Objective = Literal["x0", "v", "flow"]

PredictionType = Literal["sample", "v_prediction", "flow_prediction"]
"""Objectives by their names in diffusers' schedulers."""

Weighting = Literal["plain", "snr-plus-one", "min-snr"]

LossType = Literal["mse", "pseudo-huber"]

DenoiserName = Literal["modulated", "paper"]

PAPER_GROUPS = 16
"""Of the normalisation in the paper's denoiser: its width is a multiple of it."""

TRAIN_TIMESTEPS = 1000

INFERENCE_STEPS = 8
"""The default of sampling: samples of emoji are as near to the data with 8 steps as with 20 (docs/performance.md)."""
