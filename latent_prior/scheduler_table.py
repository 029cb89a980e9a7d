"""A deterministic scheduler as a table of numbers, for graphs that hold no scheduler.

Deterministic diffusers schedulers (DDIM, UniPC, DPM-Solver++, flow matching with Euler or Heun steps, ...) make the
next sample as a weighted sum of recent samples and predictions, with weights that depend on the step alone. The
weights are found by watching the scheduler at work: it is stepped through random samples and predictions, and each
step is explained by least squares from what it may have used. A step with noise of its own, or with clipping, leaves a
residual and is refused, so no scheduler needs to be known by name.
"""

import copy
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from diffusers import SchedulerMixin

from latent_prior.schedulers import scales_samples
from mnif.utils.errors import UserError

T = TypeVar("T")

_LAGS = 3


# What a step may use, the likeliest first: (0 for samples or 1 for predictions, lag).
_PLACES = [(0, 0), (1, 0), (1, 1), (0, 1), (1, 2), (0, 2)]

_ELEMENTS = 512

_LOUDNESS = 100.0  # far beyond any range a scheduler clips to

_TOLERANCE = 1e-5  # schedulers count in float32

_NOTHING = 1e-9  # what rounding leaves of a weight that is zero


@dataclass(frozen=True)
class LinearSchedulerTable:
    """Denoising as x[i+1] = Σ sample_weights[i, k] · x[i-k] + Σ prediction_weights[i, k] · m[i-k].

    Attributes:
        timesteps: [steps] float64, what the denoiser is told at each step, 0 to 1000.
        sample_weights: [steps, 3] float64, of the current sample x[i] and the two before it.
        prediction_weights: [steps, 3] float64, of the denoiser's current prediction m[i] and the two before it.
    """

    timesteps: np.ndarray
    sample_weights: np.ndarray
    prediction_weights: np.ndarray

    def terms(self, step: int, samples: list[T], predictions: list[T]) -> list[tuple[T, float]]:
        """Lists what the next sample is the sum of: (item, weight) pairs, those with weight zero left out.

        Args:
            step: i, from 0.
            samples: x[0] ... x[i], of any kind.
            predictions: m[0] ... m[i], of the same kind.
        """
        return [
            (history[-1 - lag], float(weight))
            for history, weights in ((samples, self.sample_weights), (predictions, self.prediction_weights))
            for lag, weight in enumerate(weights[step])
            if weight != 0
        ]


def linear_scheduler_table(scheduler: SchedulerMixin, num_inference_steps: int) -> LinearSchedulerTable:
    """Reads off a scheduler's weights; the scheduler itself and torch's random state stay as they are.

    Args:
        scheduler: of diffusers.
        num_inference_steps: at least 1. A second-order scheduler may take more steps than that.

    Raises:
        UserError: the scheduler refuses the number of steps, draws noise, clips, or looks back further than two steps.
    """
    name = type(scheduler).__name__
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps {num_inference_steps}: at least 1 step is needed")
    if scales_samples(scheduler):
        raise UserError(
            f"scheduler {name} cannot be exported or recorded: it scales what the denoiser is given; use "
            "DDIMScheduler or UniPCMultistepScheduler"
        )
    scheduler = copy.deepcopy(scheduler)
    with torch.random.fork_rng(devices=[]):
        try:
            scheduler.set_timesteps(num_inference_steps)
            samples, predictions = _trajectory(scheduler)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"scheduler {name}, {num_inference_steps} steps: {str(error).splitlines()[0]}") from None

    steps = len(predictions)
    weights = np.zeros((2, steps, _LAGS))
    for step in range(steps):
        for order in range(2, len(_PLACES) + 1):
            used = [place for place in _PLACES[:order] if place[1] <= step]
            columns = np.stack([(samples, predictions)[kind][step - lag] for kind, lag in used], axis=1)
            solution, *_ = np.linalg.lstsq(columns, samples[step + 1], rcond=None)
            residual = np.abs(columns @ solution - samples[step + 1]).max()
            if residual <= _TOLERANCE * np.abs(columns).max():
                break
        else:
            raise UserError(
                f"scheduler {name} cannot be exported or recorded: step {step} draws noise, clips, or looks too "
                "far back; use DDIMScheduler or UniPCMultistepScheduler, with clip_sample and thresholding off"
            )
        for (kind, lag), weight in zip(used, solution, strict=True):
            weights[kind, step, lag] = weight if abs(weight) > _NOTHING else 0.0
    return LinearSchedulerTable(
        timesteps=scheduler.timesteps.double().numpy(),
        sample_weights=weights[0],
        prediction_weights=weights[1],
    )


def _trajectory(scheduler: SchedulerMixin) -> tuple[np.ndarray, np.ndarray]:
    """Runs on random predictions: samples [steps + 1, elements] and predictions [steps, elements]."""
    random = np.random.default_rng(0)
    timesteps = scheduler.timesteps
    predictions = random.standard_normal((len(timesteps), _ELEMENTS)) * _LOUDNESS
    samples = [random.standard_normal(_ELEMENTS) * _LOUDNESS]
    for timestep, prediction in zip(timesteps, predictions, strict=True):
        sample, output = (torch.from_numpy(row).view(1, -1, 1) for row in (samples[-1], prediction))
        samples.append(scheduler.step(output, timestep, sample).prev_sample.double().flatten().numpy())
    return np.stack(samples), predictions
