"""The schedulers of diffusers that a denoiser can be sampled by: chosen by name, read from a folder, tried, driven.

Whether one fits is not looked up but tried (:func:`fitted`): it draws from a Gaussian whose denoiser is known in
closed form, and must reach the Gaussian. So no scheduler needs to be known by name.
"""

import copy
import inspect
import json
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import diffusers
import msgspec
import numpy as np
import torch
from diffusers import SchedulerMixin
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor

from latent_prior.diffusion import OBJECTIVES, objective_of, squared_cosine
from latent_prior.settings import TRAIN_TIMESTEPS, Objective
from mnif.utils.errors import UserError
from mnif.utils.json_files import read_json

_CLIPPING = ("clip_sample", "clip_denoised", "thresholding")  # latents are not bounded as pixels are

# Of the Gaussian that is tried: all of it lies outside of what clipping would leave.
_MEAN, _STD = 2.0, 0.4
_STEPS, _DRAWN = (100, 20), 512  # some cannot take many steps
_MEAN_TOLERANCE, _STD_TOLERANCE = 0.15, 0.04  # what 100 steps that begin late, of first order or with noise are off by


def scheduler_by_name(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler with the settings of ``current``, for the same denoiser.

    Solvers of diffusions that can solve flows too (``use_flow_sigmas``) are set to do so for a flow.

    Args:
        name: the class's name, such as ``DDIMScheduler``.
        current: the scheduler the denoiser came with.

    Raises:
        UserError: diffusers has no such scheduler, or it does not fit what the denoiser predicts.
    """
    kind = _scheduler_class(name)
    if kind is None:
        raise UserError(f"--scheduler {name}: diffusers has no such scheduler; try {type(current).__name__}")
    objective, taken = objective_of(current), inspect.signature(kind.__init__).parameters
    prediction = OBJECTIVES[objective]
    settings = {key: value for key, value in current.config.items() if key in taken and value is not None}
    if prediction.is_flow and "use_flow_sigmas" in taken:
        shift = current.config.get("shift", current.config.get("flow_shift", 1.0))
        settings |= {"prediction_type": prediction.prediction_type, "use_flow_sigmas": True, "flow_shift": shift}
    try:
        return fitted(kind(**settings), objective)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UserError(f"--scheduler {name} does not fit: {_first_line(error)}") from None
    except UserError as error:
        raise UserError(f"--scheduler {error}") from None


class SchedulerConfig(msgspec.Struct):
    """What is looked at in a ``scheduler_config.json`` before the scheduler is made; whatever else is there is small.

    Denoisers are trained on :data:`TRAIN_TIMESTEPS` timesteps, and their samples are not clipped.
    """

    class_name: str = msgspec.field(name="_class_name")
    num_train_timesteps: Literal[1000] = 1000
    beta_start: Annotated[float, Meta(gt=0, lt=1)] = 0.0001
    beta_end: Annotated[float, Meta(gt=0, lt=1)] = 0.02
    trained_betas: Annotated[list[float], Meta(max_length=TRAIN_TIMESTEPS)] | None = None
    solver_order: Annotated[int, Meta(ge=1, le=3)] = 2
    order: Annotated[int, Meta(ge=1, le=3)] = 1
    clip_sample: Literal[False] = False
    thresholding: Literal[False] = False


# Of any entry of a scheduler's configuration.
_Setting = bool | Annotated[int, Meta(ge=-(10**6), le=10**6)] | float | str | list[float | str] | None


def load_scheduler(folder: Path, distilled: bool = False) -> SchedulerMixin:
    """Reads the scheduler of a model folder: one that `mnif sample --scheduler` would take, with its settings.

    Args:
        folder: of the scheduler.
        distilled: it is a student's (:func:`fitted`).

    Raises:
        UserError: it is missing or damaged, or is none that a denoiser here was trained for.
    """
    path = folder / "scheduler_config.json"
    named = read_json(path, SchedulerConfig).class_name
    settings = read_json(path, dict[str, _Setting])
    kind = _scheduler_class(named)
    if kind is None:
        raise UserError(f"{path}: {named} is no scheduler of diffusers that draws samples")
    try:
        scheduler = kind(**_taken(kind, settings, path))
        if scheduler.config.get("clip_sample"):  # the default of some, if the file does not say
            raise UserError(f"{named} does not fit: it clips samples, and latents are not bounded")
        return fitted(scheduler, objective_of(scheduler), distilled)
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(str(path)) else f"{path}: {error}") from None
    except Exception as error:  # classes check their settings each in its own way, if at all
        raise UserError(f"{path}: {named} does not fit: {_first_line(error)}") from None


def _taken(kind: Any, settings: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings without diffusers' own, which begin with an underscore."""
    settings = {name: value for name, value in settings.items() if not name.startswith("_")}
    unknown = sorted(settings.keys() - inspect.signature(kind.__init__).parameters.keys())
    if unknown:
        raise UserError(f"{path}: {kind.__name__} takes no {unknown[0]!r}")
    return settings


def _scheduler_class(name: str) -> Any:
    """The class of diffusers that steps from noise to samples, or None if it has none of this name."""
    kind: Any = getattr(diffusers, name, None)
    return kind if SchedulerMixin in getattr(kind, "__mro__", ())[1:] and "Inverse" not in name else None


def fitted(scheduler: SchedulerMixin, objective: Objective, distilled: bool = False) -> SchedulerMixin:
    """The scheduler as a denoiser is sampled by it: a copy that does not clip, or itself if it does not.

    Args:
        scheduler: of diffusers, or one of the user's own.
        objective: what the denoiser predicts.
        distilled: the denoiser is a student, which names the sample that a noisy latent leads to and not the mean of
            all that it may come from; schedulers of consistency models are for those alone.

    Raises:
        UserError: it wants something else predicted or another schedule of noise, or its samples are not those that
            the denoiser describes.
    """
    clips = {name: False for name in _CLIPPING if scheduler.config.get(name)}
    if clips:
        scheduler = copy.deepcopy(scheduler)
        scheduler.register_to_config(**clips)
    name, prediction = type(scheduler).__name__, OBJECTIVES[objective]
    if not _is_for(scheduler, objective):
        raise UserError(
            f"{name} does not fit: it is for {_prediction_of(scheduler)}, and the denoiser predicts "
            f"{prediction.words}; take latent_prior.schedulers.scheduler_by_name(name, pipeline.scheduler)"
        )
    levels = getattr(scheduler, "alphas_cumprod", None)
    if not prediction.is_flow and (levels is None or not _on_schedule(levels)):
        raise UserError(f"{name} does not fit: denoisers learn on the squared-cosine schedule, its betas are others")
    reason = _misfit(scheduler, objective, distilled)
    if reason:
        raise UserError(f"{name} does not fit: {reason}")
    return scheduler


def set_timesteps(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    device: torch.device | str | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """Sets the steps of ``scheduler``, and returns the timesteps that the denoiser is told.

    Args:
        scheduler: what steps.
        num_inference_steps: steps, 1 to as many as there are timesteps; a scheduler of the second order takes more.
        device: of the timesteps.
        timesteps: take the place of the number of steps.
        sigmas: likewise.

    Raises:
        UserError: the scheduler cannot take these steps.
    """
    name = type(scheduler).__name__
    given = {key: value for key, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    if len(given) == 2:
        raise UserError("timesteps and sigmas: give one of them")
    for key in given:
        if key not in inspect.signature(scheduler.set_timesteps).parameters:
            raise UserError(f"{key}: {name} takes none of one's own")
    if not given:
        check_steps(scheduler, num_inference_steps)
    try:
        if given:
            scheduler.set_timesteps(**given, device=device)
        else:
            scheduler.set_timesteps(num_inference_steps, device=device)
    except Exception as error:  # each class checks them in its own way, if at all
        what = f"{next(iter(given))} {next(iter(given.values()))!s:.60}" if given else f"{num_inference_steps} steps"
        raise UserError(f"{name} cannot take {what}: {_first_line(error)}") from None
    return scheduler.timesteps


def check_steps(scheduler: SchedulerMixin, num_inference_steps: int) -> None:
    """Raises a UserError where ``scheduler`` cannot take so many steps."""
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise UserError(
            f"num_inference_steps {num_inference_steps}: {type(scheduler).__name__} takes 1 to {most} steps"
        )


def starting_sigma(scheduler: SchedulerMixin) -> float:
    """The standard deviation of the noise that ``scheduler`` begins with, once its steps are set."""
    return float(getattr(scheduler, "init_noise_sigma", 1.0))


def model_input(scheduler: SchedulerMixin, sample: Tensor, timestep: Tensor) -> Tensor:
    """What the denoiser is given for a sample of ``scheduler``: itself, or scaled to α x₀ + σ ε with α² + σ² = 1."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def scales_samples(scheduler: SchedulerMixin) -> bool:
    """Whether the denoiser is given something else than what ``scheduler`` steps."""
    scheduler = copy.deepcopy(scheduler)
    (first, *_) = set_timesteps(scheduler, 3)
    one = torch.ones(1, 1)
    return starting_sigma(scheduler) != 1 or not torch.equal(model_input(scheduler, one, first), one)


def adds_noise(scheduler: SchedulerMixin) -> bool:
    """Whether the steps of ``scheduler`` draw noise, so that a sample needs a generator."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    _stepped(scheduler, torch.ones(1, 1), 3, lambda sample, timestep: torch.zeros_like(sample), generator)
    return not torch.equal(before, generator.get_state())


def takes_generator(scheduler: SchedulerMixin) -> bool:
    """Whether a step can be given a generator."""
    return "generator" in inspect.signature(scheduler.step).parameters


def _stepped(
    scheduler: SchedulerMixin,
    sample: Tensor,
    steps: int,
    denoise: Callable[[Tensor, Tensor], Tensor],
    generator: torch.Generator,
) -> Tensor:
    """What a copy of ``scheduler`` makes of noise [B, 1] in so many steps."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    options = {"generator": generator} if takes_generator(scheduler) else {}
    sample = sample * starting_sigma(scheduler)
    for timestep in scheduler.timesteps:
        prediction = denoise(model_input(scheduler, sample, timestep), timestep)
        sample = scheduler.step(prediction, timestep, sample, **options).prev_sample
    return sample


_TRIED: dict[tuple[Any, ...], str | None] = {}


def _misfit(scheduler: SchedulerMixin, objective: Objective, distilled: bool) -> str | None:
    """Why a scheduler does not draw what a denoiser describes, or None if it does; found once for its settings."""
    settings = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    key = (type(scheduler), json.dumps(settings, sort_keys=True, default=str), objective, distilled)
    if key not in _TRIED:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is old in a scheduler's own code is nobody's business here
            _TRIED[key] = _tried(scheduler, objective, distilled)
    return _TRIED[key]


@torch.no_grad()
def _tried(scheduler: SchedulerMixin, objective: Objective, distilled: bool) -> str | None:
    """Draws from a Gaussian whose denoiser is known in closed form, in many steps, or for a student in one."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_DRAWN, 1, generator=generator)
    noise = (noise - noise.mean()) / noise.std()

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        return _exact_prediction(objective, sample.double(), float(timestep), distilled).to(sample.dtype)

    words, reason = OBJECTIVES[objective].words, ""
    for steps in (1,) if distilled else _STEPS:
        try:
            drawn = _stepped(scheduler, noise, steps, denoise, generator)
            mean, std = drawn.mean().item(), drawn.std().item()
        except Exception as error:  # that a class is for something else shows in its steps, each time by another error
            reason = f"it takes no denoiser that predicts {words} ({_first_line(error):.100})"
            continue
        if drawn.shape == noise.shape and abs(mean - _MEAN) <= _MEAN_TOLERANCE and abs(std - _STD) <= _STD_TOLERANCE:
            return None
        return (
            f"with a denoiser that predicts {words} of data with mean {_MEAN:g} and standard deviation {_STD:g} it "
            f"draws samples with {mean:.3g} and {std:.3g}"
        )
    return reason


def _exact_prediction(
    objective: Objective, sample: Float[Tensor, "batch 1"], timestep: float, distilled: bool
) -> Float[Tensor, "batch 1"]:
    """What is to be predicted of α x₀ + σ ε if x₀ is of the Gaussian; timesteps between two are of a σ/α between."""
    if OBJECTIVES[objective].is_flow:
        sigma = timestep / TRAIN_TIMESTEPS
        alpha = 1 - sigma
    else:
        product = squared_cosine().double()
        logarithms = ((1 - product) / product).log() / 2
        ratio = math.exp(np.interp(timestep, np.arange(TRAIN_TIMESTEPS), logarithms.numpy()))
        alpha = 1 / math.sqrt(1 + ratio**2)
        sigma = ratio * alpha
    deviation = math.sqrt((alpha * _STD) ** 2 + sigma**2)
    surprise = (sample - alpha * _MEAN) / deviation
    clean = _MEAN + surprise * (_STD if distilled else alpha * _STD**2 / deviation)
    noise = (sample - alpha * clean) / max(sigma, 1e-12)
    return OBJECTIVES[objective].target(clean, noise, torch.tensor(alpha), torch.tensor(sigma))


def _is_for(scheduler: SchedulerMixin, objective: Objective) -> bool:
    try:
        return objective_of(scheduler) == objective
    except UserError:
        return False


def _prediction_of(scheduler: SchedulerMixin) -> str:
    """What a scheduler wants predicted, in words."""
    try:
        return OBJECTIVES[objective_of(scheduler)].words
    except UserError:
        return f"the prediction_type {scheduler.config.get('prediction_type', 'epsilon')!r}"


def _on_schedule(levels: Tensor) -> bool:
    expected = squared_cosine()
    return levels.shape == expected.shape and torch.allclose(levels.to(expected), expected, atol=1e-4)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
