"""Walks between noises, and schedulers as tables of numbers."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SchedulerMixin, UniPCMultistepScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from latent_prior.diffusion import sampling_scheduler
from latent_prior.sampling import slerp
from latent_prior.scheduler_table import linear_scheduler_table

numbers = st.floats(-3, 3, width=32)
pairs = st.integers(2, 8).flatmap(lambda size: arrays.arrays(np.float32, (2, size), elements=numbers))


@given(pairs)
def test_slerp_begins_and_ends_where_it_should(pair: np.ndarray) -> None:
    start, end = pair
    lengths = np.linalg.norm(pair.astype(np.float64), axis=1)
    assume(lengths.min() > 0.1)
    assume(abs(float(start.astype(np.float64) @ end)) < 0.999 * lengths.prod())  # opposite ones have no shortest way
    np.testing.assert_allclose(slerp(start, end, np.array([0.0, 1.0])), pair, atol=1e-4)


@given(pairs, st.floats(0, 1))
def test_slerp_stays_on_the_unit_sphere(pair: np.ndarray, fraction: float) -> None:
    lengths = np.linalg.norm(pair, axis=1, keepdims=True)
    assume(lengths.min() > 0.1)
    start, end = pair / lengths
    assume(abs(float(start @ end)) < 0.999)
    (between,) = slerp(start, end, np.array([fraction]))
    assert np.linalg.norm(between) == pytest.approx(1, abs=1e-4)
    assert np.arccos(np.clip(start @ between, -1, 1)) == pytest.approx(fraction * np.arccos(start @ end), abs=2e-3)


@given(pairs, st.floats(0.2, 5), st.floats(0, 1))
def test_slerp_of_equal_directions_is_a_straight_way(pair: np.ndarray, factor: float, fraction: float) -> None:
    start = pair[0]
    assume(np.linalg.norm(start) > 0.1)
    end = (start * factor).astype(np.float32)
    (between,) = slerp(start, end, np.array([fraction]))
    np.testing.assert_allclose(between, start + fraction * (end - start), atol=1e-4)


COSINE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}
schedulers = st.sampled_from(
    [
        DDIMScheduler(**COSINE, clip_sample=False),
        DPMSolverMultistepScheduler(**COSINE),
        UniPCMultistepScheduler(**COSINE),
        sampling_scheduler("x0"),
        sampling_scheduler("v"),
        sampling_scheduler("flow"),
    ]
)


@settings(max_examples=20)
@given(schedulers, st.integers(1, 12), st.integers(0, 2**31))
def test_a_table_steps_as_its_scheduler_does(scheduler: SchedulerMixin, steps: int, seed: int) -> None:
    """Whatever the denoiser says: its predictions here are random."""
    table, scheduler = linear_scheduler_table(scheduler, steps), copy.deepcopy(scheduler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    samples, predictions = [torch.randn(1, 4, generator=generator, dtype=torch.float64)], []
    expected = samples[0]
    for step, timestep in enumerate(scheduler.timesteps):
        predictions.append(torch.randn(1, 4, generator=generator, dtype=torch.float64))
        expected = scheduler.step(predictions[-1], timestep, expected).prev_sample
        terms = table.terms(step, samples, predictions)
        samples.append(torch.stack([item * weight for item, weight in terms]).sum(dim=0))
        torch.testing.assert_close(samples[-1], expected, rtol=1e-4, atol=1e-4)
