"""Other schedulers for a denoiser: by name, and refused where they do not fit what it predicts."""

import copy
import inspect
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin

from latent_prior.objective import objective_of
from mnif.errors import UserError

_PREDICTS = {"x0": "the clean latent", "v": "the velocity of a diffusion", "flow": "the velocity of a straight flow"}


def predicted_by(scheduler: SchedulerMixin) -> str:
    """What a denoiser predicts that is sampled by ``scheduler``: ``"x0"``, ``"v"`` or ``"flow"``.

    Raises:
        UserError: something that no denoiser here predicts.
    """
    return "flow" if scheduler.config.get("use_flow_sigmas") else objective_of(scheduler)


def scheduler_by_name(name: str, current: SchedulerMixin) -> SchedulerMixin:
    """A diffusers scheduler with the settings of ``current``, for the same denoiser.

    Solvers of diffusions that can solve flows too (``use_flow_sigmas``) are set to do so for a flow.

    Args:
        name: the class's name, such as ``DDIMScheduler``.
        current: the scheduler the denoiser came with.

    Raises:
        UserError: diffusers has no such scheduler, or it does not fit what the denoiser predicts.
    """
    kind: Any = getattr(diffusers, name, None)
    if SchedulerMixin not in getattr(kind, "__mro__", ()) or "Inverse" in name:  # those run from samples to noise
        raise UserError(f"--scheduler {name}: diffusers has no such scheduler; try {type(current).__name__}")
    predicts, taken = predicted_by(current), inspect.signature(kind.__init__).parameters
    settings = {key: value for key, value in current.config.items() if key in taken and value is not None}
    settings |= {key: value for key, value in {"clip_sample": False}.items() if key in taken}
    if predicts == "flow" and "use_flow_sigmas" in taken:
        shift = current.config.get("shift", current.config.get("flow_shift", 1.0))
        settings |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    elif (predicts == "flow") != name.startswith("FlowMatch") or not taken.keys() & {"shift", "beta_schedule"}:
        raise UserError(f"--scheduler {name} does not fit: the denoiser predicts {_PREDICTS[predicts]}")
    try:
        scheduler = kind(**settings)
        _try(scheduler)
    except (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError):
        raise UserError(
            f"--scheduler {name} does not fit: it takes no denoiser that predicts {_PREDICTS[predicts]}"
        ) from None
    if float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0:
        raise UserError(
            f"--scheduler {name} does not fit: it scales its samples, which the denoiser was not trained on"
        )
    return scheduler


def adds_noise(scheduler: SchedulerMixin) -> bool:
    """Whether the steps of ``scheduler`` draw noise, so that a sample needs a generator."""
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    _try(scheduler, generator)
    return not torch.equal(before, generator.get_state())


def takes_generator(scheduler: SchedulerMixin) -> bool:
    """Whether a step can be given a generator."""
    return "generator" in inspect.signature(scheduler.step).parameters


def _try(scheduler: SchedulerMixin, generator: torch.Generator | None = None) -> None:
    """Three steps of a copy, from one number."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(3)
    options = {"generator": generator} if takes_generator(scheduler) else {}
    sample = torch.ones(1, 1)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(torch.zeros(1, 1), timestep, sample, **options).prev_sample
    if sample.shape != (1, 1) or not sample.isfinite().all():
        raise ValueError("what is stepped must keep its shape and stay finite")
