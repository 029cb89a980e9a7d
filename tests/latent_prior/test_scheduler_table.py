import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor

from latent_prior.diffusion import sampling_scheduler
from latent_prior.scheduler_table import linear_scheduler_table
from mnif.utils.errors import UserError

COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}


def prediction(sample: Tensor, timestep: float) -> Tensor:
    """A denoiser that is neither linear nor the same at every step."""
    return torch.tanh(sample * 0.7 + torch.arange(6) / 6 - timestep / 1000)


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(**COSINE, clip_sample=False),
        DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False),
        DPMSolverMultistepScheduler(**COSINE, algorithm_type="dpmsolver++"),
        DPMSolverMultistepScheduler(**COSINE, solver_order=3),
        DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
        UniPCMultistepScheduler(**COSINE),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchHeunDiscreteScheduler(),
        sampling_scheduler("x0"),
        sampling_scheduler("flow"),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_the_table_walks_as_the_scheduler_does(scheduler: SchedulerMixin, count: int) -> None:
    steps = linear_scheduler_table(scheduler, count)
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(count)
    expected = noise
    for timestep in scheduler.timesteps:
        expected = scheduler.step(prediction(expected, float(timestep)), timestep, expected).prev_sample

    samples, predictions = [noise], []
    for step, timestep in enumerate(steps.timesteps):
        predictions.append(prediction(samples[-1], float(timestep)))
        samples.append(sum(item * weight for item, weight in steps.terms(step, samples, predictions)))
    torch.testing.assert_close(samples[-1], expected, rtol=1e-5, atol=1e-5)


def test_a_step_uses_no_more_than_it_must() -> None:
    euler = linear_scheduler_table(sampling_scheduler("flow"), 5)
    assert (euler.sample_weights[:, 1:] == 0).all()
    assert (euler.prediction_weights[:, 1:] == 0).all()
    second_order = linear_scheduler_table(DPMSolverMultistepScheduler(**COSINE, final_sigmas_type="zero"), 5)
    assert (second_order.sample_weights[:, 1:] == 0).all()
    assert (second_order.prediction_weights[1:-1, 1] != 0).all()
    assert (second_order.prediction_weights[:, 2] == 0).all()
    corrected = linear_scheduler_table(sampling_scheduler("x0"), 5)
    assert corrected.sample_weights[2, 1] != 0  # the corrector goes back to the sample before
    assert (corrected.sample_weights[-1] == 0).all()  # the last step is the prediction itself


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(**COSINE, clip_sample=False),
        DDIMScheduler(**COSINE, clip_sample=True),
        DDIMScheduler(**COSINE, clip_sample=True, clip_sample_range=10.0),
        DPMSolverMultistepScheduler(**COSINE, thresholding=True),
        DPMSolverMultistepScheduler(**COSINE, algorithm_type="sde-dpmsolver++"),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_noise_and_clipping_are_refused(scheduler: SchedulerMixin) -> None:
    with pytest.raises(UserError, match=rf"{type(scheduler).__name__} cannot be exported.*DDIMScheduler"):
        linear_scheduler_table(scheduler, 4)


def test_an_impossible_number_of_steps_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1 step"):
        linear_scheduler_table(sampling_scheduler("x0"), 0)
    with pytest.raises(UserError, match="DDIMScheduler, 2000 steps"):
        linear_scheduler_table(DDIMScheduler(**COSINE, clip_sample=False), 2000)


def test_scheduler_and_random_state_stay_as_they_are() -> None:
    scheduler = sampling_scheduler("x0")
    scheduler.set_timesteps(7)
    timesteps = scheduler.timesteps.clone()
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    linear_scheduler_table(scheduler, 4)
    with pytest.raises(UserError):
        linear_scheduler_table(DDPMScheduler(**COSINE), 4)
    torch.testing.assert_close(scheduler.timesteps, timesteps)
    torch.testing.assert_close(torch.random.get_rng_state(), before)
    np.testing.assert_array_equal(
        linear_scheduler_table(scheduler, 4).timesteps, linear_scheduler_table(scheduler, 4).timesteps
    )
