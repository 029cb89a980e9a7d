"""The sampler of fixed numbers draws what the pipeline draws, and says nothing to the CPU on its way."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler

from latent_prior.diffusion import student_scheduler
from latent_prior.fixed_sampler import FixedSampler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.schedulers import scheduler_by_name
from mnif.utils.errors import UserError

NOISE = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_it_draws_the_very_pictures_of_the_pipeline(pipeline: MNIFPipeline, name: str) -> None:
    pipeline.scheduler = scheduler_by_name(name, pipeline.scheduler)
    draw = FixedSampler(pipeline, batch_size=3, num_inference_steps=4, truncation=0.7)
    for noise in (NOISE, NOISE.flip(0), NOISE):
        expected = pipeline(latents=noise, num_inference_steps=4, truncation=0.7, output_type="pt").images
        assert torch.equal(draw(noise), expected)
    small = FixedSampler(pipeline, batch_size=3, num_inference_steps=4, resolution=7)(NOISE)
    assert torch.equal(small, pipeline(latents=NOISE, num_inference_steps=4, resolution=7, output_type="pt").images)


def test_the_student_draws_where_it_would(pipeline: MNIFPipeline) -> None:
    student = type(pipeline.denoiser).from_config({**pipeline.denoiser.config, "distilled_steps": (1,)})
    with_student = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, student_scheduler())
    with_student.set_progress_bar_config(disable=True)
    for use_student in (None, False):
        draw = FixedSampler(with_student, 3, 1, output_type="latent", use_student=use_student)
        options = {"num_inference_steps": 1, "use_student": use_student, "output_type": "latent"}
        assert torch.equal(draw(NOISE), with_student(latents=NOISE, **options).images)
        assert (draw.denoiser is student) is (use_student is None)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_nothing_goes_to_the_cpu_between_noise_and_pictures(pipeline: MNIFPipeline, name: str) -> None:
    """On the device meta any way to another one, and any number that is asked for, would end in an error."""
    pipeline.scheduler = scheduler_by_name(name, pipeline.scheduler)
    draw = FixedSampler(pipeline.to("meta"), 3, 3)
    drawn = draw.drawn(NOISE.to("meta"))
    assert (drawn.device.type, drawn.shape) == ("meta", (3, 3, 16, 16))


def recording(calls: list[int]) -> Callable:
    """As PyTorch does it: some calls, one that is recorded, and then the same memory again and again."""

    def make(function: Callable, samples: tuple[torch.Tensor, ...]) -> Callable:
        for _ in range(3):
            function(*samples)
        held = function(*samples)
        calls.append(4)

        def replayed(noise: torch.Tensor) -> torch.Tensor:
            samples[0].copy_(noise)
            return held.copy_(function(*samples))

        return replayed

    return make


def test_what_is_drawn_outlives_the_next_call_of_the_graph(
    pipeline: MNIFPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recording(calls))
    draw = FixedSampler(pipeline, 3, 2)
    draw._graph = draw._recorded()
    first = draw(NOISE)
    kept = first.clone()
    draw(NOISE.flip(0))
    assert calls == [4]
    assert torch.equal(first, kept)


def test_what_cannot_be_recorded_is_one_line(pipeline: MNIFPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.raises(UserError, match=r"a CUDA graph of 2 steps of DDIMScheduler .*capturing\); take another"):
        FixedSampler(pipeline, 3, 2)._recorded()


def test_what_cannot_be_fixed_is_refused(pipeline: MNIFPipeline) -> None:
    with pytest.raises(ValueError, match="noise for 2 samples: this sampler draws 3 at a time"):
        FixedSampler(pipeline, 3, 2)(NOISE[:2])
    with pytest.raises(ValueError, match='output_type "pil": choose pt or latent'):
        FixedSampler(pipeline, 3, 2, output_type="pil")
    with pytest.raises(ValueError, match="batch_size 0"):
        FixedSampler(pipeline, 0, 2)
    pipeline.decoder.to("meta")
    with pytest.raises(UserError, match="the denoiser is on cpu, the decoder on meta; move the whole pipeline to one"):
        FixedSampler(pipeline, 3, 2)


def test_a_scheduler_that_draws_noise_is_refused(pipeline: MNIFPipeline) -> None:
    pipeline.scheduler = scheduler_by_name(DDPMScheduler.__name__, pipeline.scheduler)
    with pytest.raises(UserError, match="DDPMScheduler draws noise in every step"):
        FixedSampler(pipeline, 3, 2)
