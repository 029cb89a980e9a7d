"""Schedulers against data whose denoiser is known in closed form, and how a misfit is refused."""

import copy

import diffusers
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)

from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import (
    DenoisingLoss,
    Objective,
    sampling_scheduler,
    student_scheduler,
    validation_loss,
)
from latent_prior.pipeline import MNIFPipeline
from latent_prior.schedulers import adds_noise, scheduler_by_name
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from tests.conftest import small_decoder


class ExactDenoiser(ResMLPDenoiser):
    """What is to be predicted, in closed form, for data N(mean, std²) in every dimension."""

    mean, std = 1.5, 0.4
    objective: Objective = "x0"

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float, *_: object) -> torch.Tensor:
        time = torch.as_tensor(timestep).reshape(-1, 1).double()
        if self.objective == "flow":
            signal, noise = 1 - time / 1000, time / 1000
        else:
            product = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()[time.long()]
            signal, noise = product.sqrt(), (1 - product).sqrt()
        variance = signal**2 * self.std**2 + noise**2
        clean = self.mean + signal * self.std**2 / variance * (sample - signal * self.mean)
        noise_in_it = (sample - signal * clean) / noise
        velocity = noise_in_it - clean if self.objective == "flow" else signal * noise_in_it - noise * clean
        return (clean if self.objective == "x0" else velocity).to(sample.dtype)


def exact_denoiser(objective: Objective, decoder: MNIFModel | None = None) -> ExactDenoiser:
    fingerprint = decoder.fingerprint() if decoder is not None else ""
    denoiser = ExactDenoiser(latent_dim=12, width=16, depth=1, decoder_fingerprint=fingerprint)
    denoiser.objective = objective
    return denoiser


def exact_pipeline(objective: Objective = "x0") -> MNIFPipeline:
    """One that must draw N(1.5, 0.4²), all of it outside of what clipping leaves."""
    decoder = small_decoder()
    pipeline = MNIFPipeline(decoder, exact_denoiser(objective, decoder), sampling_scheduler(objective))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_draws_the_gaussian(pipeline: MNIFPipeline, steps: int = 100) -> None:
    latents = pipeline(1000, torch.Generator().manual_seed(0), steps, output_type="latent").images
    assert latents.mean().item() == pytest.approx(ExactDenoiser.mean, abs=0.05)
    assert latents.std().item() == pytest.approx(ExactDenoiser.std, rel=0.06)


@pytest.mark.parametrize(
    ("objective", "name", "steps"),
    [
        ("x0", None, 20),
        ("x0", "DDPMScheduler", 100),
        ("x0", "DDIMScheduler", 100),
        ("x0", "UniPCMultistepScheduler", 20),
        ("v", None, 20),
        ("v", "DDIMScheduler", 100),
        ("flow", None, 100),
        ("flow", "FlowMatchHeunDiscreteScheduler", 20),
        ("flow", "DPMSolverMultistepScheduler", 20),
    ],
)
def test_samplers_reach_a_gaussian_whose_denoiser_is_known(
    decoder: MNIFModel, objective: Objective, name: str | None, steps: int
) -> None:
    """Whose values lie outside [-1, 1], where some schedulers clip unless they are told not to."""
    scheduler = sampling_scheduler(objective)
    if name is not None:
        scheduler = scheduler_by_name(name, scheduler)
        assert type(scheduler).__name__ == name
    pipeline = MNIFPipeline(decoder, exact_denoiser(objective, decoder), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline(2000, torch.Generator().manual_seed(0), steps, output_type="latent").images
    assert latents.mean().item() == pytest.approx(ExactDenoiser.mean, abs=0.02)
    assert latents.std().item() == pytest.approx(ExactDenoiser.std, rel=0.05)


@pytest.mark.parametrize("objective", ["x0", "v", "flow"])
def test_exact_denoiser_has_a_smaller_loss_than_its_neighbours(objective: Objective) -> None:
    torch.manual_seed(0)
    denoiser = exact_denoiser(objective)
    latents = ExactDenoiser.mean + ExactDenoiser.std * torch.randn(512, 12)
    losses = {}
    for std in (0.3, 0.4, 0.55):
        denoiser.std = std
        losses[std] = validation_loss(DenoisingLoss(denoiser, objective), latents)
    assert min(losses, key=losses.__getitem__) == 0.4


def test_default_scheduler_is_deterministic() -> None:
    scheduler = sampling_scheduler("x0")
    assert isinstance(scheduler, UniPCMultistepScheduler)
    assert not adds_noise(scheduler)
    assert not adds_noise(student_scheduler())
    assert not adds_noise(sampling_scheduler("flow"))
    assert adds_noise(sampling_scheduler("x0", ancestral=True))
    assert adds_noise(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))


def test_scheduler_by_name_keeps_what_the_denoiser_needs() -> None:
    current = sampling_scheduler("x0")
    before = copy.deepcopy(dict(current.config))
    swapped = scheduler_by_name("DDIMScheduler", current)
    assert isinstance(swapped, DDIMScheduler)
    assert swapped.config.prediction_type == "sample"
    assert swapped.config.beta_schedule == "squaredcos_cap_v2"
    assert not swapped.config.clip_sample
    assert dict(current.config) == before
    again = scheduler_by_name("DPMSolverMultistepScheduler", swapped)
    assert isinstance(again, DPMSolverMultistepScheduler)
    assert again.config.prediction_type == "sample"


@pytest.mark.parametrize(
    ("objective", "name", "words"),
    [
        ("x0", "PlanetScheduler", "no such scheduler; try UniPCMultistepScheduler"),
        ("x0", "ModelMixin", "no such scheduler"),
        ("x0", "FlowMatchEulerDiscreteScheduler", "the denoiser predicts the clean latent"),
        ("flow", "DDIMScheduler", "the denoiser predicts the velocity of a straight flow"),
        ("x0", "LCMScheduler", "draws samples with"),
        ("x0", "PNDMScheduler", "takes no denoiser that predicts the clean latent"),
        ("x0", "IPNDMScheduler", "does not fit"),
        ("v", "DDIMInverseScheduler", "no such scheduler"),
        ("x0", "CogVideoXDPMScheduler", "its betas are others"),
        ("v", "RePaintScheduler", "the denoiser predicts the velocity of a diffusion"),
    ],
)
def test_misfits_are_refused(objective: Objective, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        scheduler_by_name(name, sampling_scheduler(objective))
    assert "\n" not in str(error.value)


def test_pipeline_refuses_a_scheduler_that_does_not_fit(pipeline: MNIFPipeline) -> None:
    with pytest.raises(UserError, match="'epsilon'"):
        MNIFPipeline(pipeline.decoder, pipeline.denoiser, DDIMScheduler())
    for scheduler in (sampling_scheduler("flow"), sampling_scheduler("v"), DDIMScheduler()):
        with pytest.raises(UserError, match=f"{type(scheduler).__name__} does not fit"):
            pipeline.scheduler = scheduler


def all_schedulers() -> list[str]:
    kinds = {name: getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")}
    return sorted(
        name for name, kind in kinds.items() if isinstance(kind, type) and SchedulerMixin in kind.__mro__[1:]
    )


FITTING = {
    "x0": "DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep EulerDiscrete "
    "HeunDiscrete LMSDiscrete SASolver UniPCMultistep",
    "v": "DDIM DDIMParallel DDPM DDPMParallel DEISMultistep DPMSolverMultistep DPMSolverSinglestep "
    "EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete LMSDiscrete PNDM SASolver "
    "UniPCMultistep",
    "flow": "DEISMultistep DPMSolverMultistep DPMSolverSinglestep FlowMatchEulerDiscrete FlowMatchHeunDiscrete "
    "SASolver UniPCMultistep",
}
"""Of diffusers 0.42; all others are refused."""


@pytest.mark.parametrize("objective", ["x0", "v", "flow"])
@pytest.mark.parametrize("name", all_schedulers())
def test_every_scheduler_draws_right_or_says_why_not(name: str, objective: Objective) -> None:
    pipeline = exact_pipeline(objective)
    if name.removesuffix("Scheduler") not in FITTING[objective].split():
        with pytest.raises(UserError, match=name) as error:
            pipeline.scheduler = scheduler_by_name(name, pipeline.scheduler)
        assert "\n" not in str(error.value)
        return
    pipeline.scheduler = scheduler_by_name(name, pipeline.scheduler)
    assert type(pipeline.scheduler).__name__ == name
    assert_draws_the_gaussian(pipeline, 60 if name.startswith("LMS") else 100)


@pytest.mark.parametrize("name", all_schedulers())
def test_schedulers_set_as_in_the_documentation_of_diffusers(name: str, pipeline: MNIFPipeline) -> None:
    """``Scheduler.from_config(pipeline.scheduler.config)``: draws, or is refused where it is set, in one line."""
    pipeline.set_progress_bar_config(disable=True)
    try:
        scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    except (TypeError, ValueError, KeyError):  # its own: it wants what other schedulers do not have
        return
    refusal = None
    try:
        pipeline.scheduler = scheduler
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        latents = pipeline(3, torch.Generator().manual_seed(5), 4, output_type="latent").images
        assert latents.isfinite().all()
    else:
        assert name in refusal
        assert "\n" not in refusal


@pytest.mark.parametrize("schedule", ["use_karras_sigmas", "use_exponential_sigmas", "rescale_betas_zero_snr"])
def test_schedules_of_other_noise_levels(schedule: str) -> None:
    pipeline = exact_pipeline("v")
    scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **{schedule: True})
    pipeline.scheduler = scheduler
    latents = pipeline(1000, torch.Generator().manual_seed(0), 100, output_type="latent").images
    assert latents.std().item() == pytest.approx(ExactDenoiser.std, rel=0.1)
