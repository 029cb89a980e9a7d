"""The sampler of fixed numbers draws what the pipeline draws, and says nothing to the CPU on its way."""

from collections.abc import Callable

import pytest
import torch

from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import student_scheduler
from latent_prior.fixed_sampler import FixedSampler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.schedulers import scheduler_by_name
from mnif.utils.errors import UserError

NOISE = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_it_draws_the_pictures_of_the_pipeline(pipeline: MNIFPipeline, name: str) -> None:
    pipeline.scheduler = scheduler_by_name(name, pipeline.scheduler)
    draw = FixedSampler(pipeline, batch_size=3, num_inference_steps=4, truncation=0.7)
    for noise in (NOISE, NOISE.flip(0), NOISE):
        expected = pipeline(latents=noise, num_inference_steps=4, truncation=0.7, output_type="pt").images
        torch.testing.assert_close(draw(noise), expected, atol=1e-5, rtol=0)
        assert torch.equal(draw(noise), draw(noise))
    small = FixedSampler(pipeline, batch_size=3, num_inference_steps=4, resolution=7)(NOISE)
    expected = pipeline(latents=NOISE, num_inference_steps=4, resolution=7, output_type="pt").images
    torch.testing.assert_close(small, expected, atol=1e-5, rtol=0)


def test_the_student_draws_where_it_would(pipeline: MNIFPipeline) -> None:
    torch.manual_seed(3)
    known = {"decoder_fingerprint": pipeline.decoder.fingerprint(), "distilled_steps": (1,)}
    student = ResMLPDenoiser(latent_dim=12, width=16, depth=2, **known)
    torch.nn.init.normal_(student.write.weight)
    with_student = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, student_scheduler())
    with_student.set_progress_bar_config(disable=True)
    drawn = []
    for use_student in (None, False):
        options = {"num_inference_steps": 1, "use_student": use_student, "output_type": "latent"}
        drawn.append(FixedSampler(with_student, 3, **options)(NOISE))
        torch.testing.assert_close(drawn[-1], with_student(latents=NOISE, **options).images, atol=1e-4, rtol=1e-5)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1


def test_nothing_goes_to_the_cpu_between_noise_and_pictures(pipeline: MNIFPipeline) -> None:
    """On the device meta any way to another one, and any number that is asked for, would end in an error."""
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
    with pytest.raises(UserError, match=r"cannot be recorded as a CUDA graph \(CUDA error: .*capturing\); draw with"):
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
    pipeline.scheduler = scheduler_by_name("DDPMScheduler", pipeline.scheduler)
    with pytest.raises(UserError, match="DDPMScheduler cannot be exported or recorded: step 0 draws noise"):
        FixedSampler(pipeline, 3, 2)
