"""What a call of the pipeline is given: whatever cannot be meant is refused in one line, before any work is done."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.utils.pixels import as_axes

CALLBACK_TENSORS = ["latents"]
"""What a callback may be given, by name."""

StepCallback: TypeAlias = (
    Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]
    | PipelineCallback
    | MultiPipelineCallbacks
)


def check_truncation(truncation: float) -> None:
    """Raises a ValueError unless ψ lies in [0, 1]."""
    if not 0 <= truncation <= 1:
        raise ValueError(f"truncation {truncation}: must lie between 0 and 1")


def check_whole(least: int, **numbers: Any) -> None:
    """Raises a ValueError unless each is a whole number, at least ``least``."""
    for name, value in numbers.items():
        try:
            fits = not isinstance(value, bool) and operator.index(value) >= least
        except TypeError:
            fits = False
        if not fits:
            raise ValueError(f"{name} {value!r}: a whole number is needed, at least {least}")


def grid_size(
    signal: Signal, decoder: MNIFModel, resolution: int | None, height: int | None, width: int | None
) -> Any:
    """The resolution to decode at, or height and width of pictures.

    Raises:
        ValueError: one is no whole number above 0, or they do not go together or with the signal.
    """
    given = {"resolution": resolution, "height": height, "width": width}
    check_whole(1, **{name: value for name, value in given.items() if value is not None})
    if height is None and width is None:
        return resolution
    if resolution is not None:
        raise ValueError("resolution: give it, or height and width")
    if signal.dimensions != 2:
        raise ValueError(f"height, width: not for the signal {signal.name}; give resolution")
    own = as_axes(decoder.config.resolution, 2)
    return [own[0] if height is None else height, own[1] if width is None else width]


def callback_inputs(callback: StepCallback | None, names: Sequence[str]) -> Sequence[str]:
    """The tensors that a callback is given, by name."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        names = callback.tensor_inputs
    for name in names:
        if name not in CALLBACK_TENSORS:
            raise ValueError(f'callback_on_step_end_tensor_inputs "{name}": there is "latents" alone')
    return names


def check_noise(latents: Tensor, latent_dim: int) -> int:
    """Raises a ValueError unless ``latents`` are finite numbers [B, ``latent_dim``]; returns B."""
    if not isinstance(latents, Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(f"latents of {kind}: a tensor of floating-point numbers is needed")
    if latents.ndim != 2 or latents.shape[1] != latent_dim or not len(latents):
        raise ValueError(f"latents of shape {list(latents.shape)}: noise [B, {latent_dim}] is needed")
    if not latents.isfinite().all():
        raise ValueError("latents: the noise holds NaN or infinity")
    return len(latents)


def check_own_steps(**given: Any) -> None:
    """Raises a ValueError unless timesteps or sigmas, where they are given, are some finite numbers that fall."""
    for name, steps in given.items():
        if steps is None:
            continue
        try:
            numbers = np.asarray(steps, dtype=np.float64)
        except (TypeError, ValueError):
            numbers = np.array(np.nan)
        if numbers.ndim != 1 or not numbers.size or not np.isfinite(numbers).all() or (np.diff(numbers) >= 0).any():
            raise ValueError(f"{name} {steps!s:.60}: a list of numbers is needed, from the largest down")


def check_generators(generator: Any, count: int) -> None:
    """Raises a ValueError unless there is one generator, none, or a list of one for each sample."""
    each = generator if isinstance(generator, list) else [] if generator is None else [generator]
    for one in each:
        if not isinstance(one, torch.Generator):
            raise ValueError(f"generator: a torch.Generator or a list of them is needed, not {type(one).__name__}")
    if isinstance(generator, list) and len(generator) != count:
        raise ValueError(f"generator: a list of {len(generator)} for {count} samples; give one, or one for each")
