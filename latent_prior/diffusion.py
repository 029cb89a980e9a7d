"""What the denoiser learns to predict, its loss, and the schedulers that it comes with."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from jaxtyping import Float, Int64, Shaped
from torch import Tensor, nn

from latent_prior.denoisers import Denoiser
from latent_prior.settings import TRAIN_TIMESTEPS, LossType, Objective, Weighting
from mnif.data.batches import InstanceGenerator
from mnif.utils.errors import UserError

_SQUARED_COSINE = {"num_train_timesteps": TRAIN_TIMESTEPS, "beta_schedule": "squaredcos_cap_v2"}


def _diffusion_scheduler(prediction_type: str, ancestral: bool) -> SchedulerMixin:
    settings = {**_SQUARED_COSINE, "prediction_type": prediction_type, "timestep_spacing": "trailing"}
    if ancestral:
        return DDPMScheduler(**settings, variance_type="fixed_large", clip_sample=False)
    return UniPCMultistepScheduler(**settings, solver_order=2, final_sigmas_type="zero")


def _flow_scheduler(prediction_type: str, ancestral: bool) -> SchedulerMixin:
    if ancestral:
        raise UserError("--sampler ancestral: a flow is sampled without noise; take --objective x0 or v")
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAIN_TIMESTEPS)


@dataclass(frozen=True)
class Prediction:
    """What a denoiser learns to predict from α x₀ + σ ε.

    Attributes:
        words: name it in a message.
        prediction_type: the name it has in the configs of diffusers' schedulers.
        target: gives it, [B, D], for x₀ [B, D], ε [B, D], α [B, 1] and σ [B, 1].
        scheduler: makes the scheduler that samples the denoiser, for the prediction type and whether it is ancestral.
        is_flow: α = 1 − σ, with σ = timestep / 1000 for any number of them; else α² + σ² = 1 on the squared-cosine
            schedule (Nichol and Dhariwal, 2021), whose timesteps are whole numbers.
    """

    words: str
    prediction_type: str
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    scheduler: Callable[[str, bool], SchedulerMixin] = _diffusion_scheduler
    is_flow: bool = False


OBJECTIVES: dict[Objective, Prediction] = {
    "x0": Prediction("the clean latent", "sample", lambda clean, noise, alpha, sigma: clean),
    "v": Prediction(
        "the velocity of a diffusion", "v_prediction", lambda clean, noise, alpha, sigma: alpha * noise - sigma * clean
    ),
    "flow": Prediction(
        "the velocity of a straight flow",
        "flow_prediction",
        lambda clean, noise, alpha, sigma: noise - clean,
        _flow_scheduler,
        is_flow=True,
    ),
}
"""What `mnif prior --objective` names; a new one is added here and to :data:`Objective`."""


def sampling_scheduler(objective: Objective, ancestral: bool = False) -> SchedulerMixin:
    """The scheduler that samples a denoiser trained with ``objective``.

    ``"x0"`` and ``"v"`` are sampled by UniPC (Zhao et al., 2023), ``"flow"`` by Euler steps of the flow (Lipman et
    al., 2023).

    Args:
        objective: what the denoiser predicts.
        ancestral: sample as the paper does: DDPM (Ho et al., 2020), whose steps add noise of the larger variance.

    Raises:
        UserError: a flow has no ancestral sampling.
    """
    prediction = OBJECTIVES[objective]
    return prediction.scheduler(prediction.prediction_type, ancestral)


def student_scheduler() -> SchedulerMixin:
    """The scheduler of distilled students, which predict the clean latent: DDIM (Song et al., 2021)."""
    return DDIMScheduler(**_SQUARED_COSINE, prediction_type="sample", clip_sample=False, timestep_spacing="trailing")


def objective_of(scheduler: SchedulerMixin) -> Objective:
    """What a denoiser predicts that is sampled by ``scheduler``.

    Raises:
        UserError: the scheduler wants something that no denoiser here predicts, such as the noise.
    """
    if "FlowMatch" in type(scheduler).__name__ or scheduler.config.get("use_flow_sigmas"):
        return "flow"
    wanted = scheduler.config.get("prediction_type", "epsilon")
    for objective, prediction in OBJECTIVES.items():
        if wanted == prediction.prediction_type:
            return objective
    name = type(scheduler).__name__
    raise UserError(f"{name} does not fit: denoisers here do not predict what prediction_type {wanted!r} is for")


def noise_levels(
    objective: Objective, timestep: Shaped[Tensor, "*batch"], schedule: Float[Tensor, " timesteps"] | None = None
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Shares α of the clean latent and σ of noise in a noisy one, at the scheduler's timesteps [B], 0 to 1000.

    ``schedule`` is :func:`squared_cosine` where the timesteps are, if it is at hand there.
    """
    if OBJECTIVES[objective].is_flow:
        noise = timestep / TRAIN_TIMESTEPS
        return 1 - noise, noise
    product = (squared_cosine().to(timestep.device) if schedule is None else schedule)[timestep.long()]
    return product.sqrt(), (1 - product).sqrt()


def penalty(
    error: Float[Tensor, "batch latent_dim"], loss_type: LossType, scale: float = 0.03
) -> Float[Tensor, " batch"]:
    """The size of errors [B, D], one number each [B].

    Args:
        error: of standardised latents.
        loss_type: ``"mse"``, the mean square, or ``"pseudo-huber"``, √(mean square + scale²) − scale (Song and
            Dhariwal, 2024), which grows with the error and not with its square, so that outliers weigh less.
        scale: where pseudo-Huber turns from square to linear, in standard deviations of a latent.
    """
    square = error.square().mean(dim=1)
    return square if loss_type == "mse" else (square + scale**2).sqrt() - scale


UNCHANGED = 0.3
"""The share of a batch that is learned as it is, where instances are also changed."""

_APART = 0.4  # standard deviation of what is told at first


class DenoisingLoss(nn.Module):
    """The training loss of a denoiser, called on the decoder's latents.

    The denoiser sees α x₀ + σ ε and predicts, by ``objective`` (:data:`OBJECTIVES`),

    - ``"x0"``: x₀, on the squared-cosine schedule;
    - ``"v"``: the velocity α ε − σ x₀ on the same schedule (Salimans and Ho, 2022);
    - ``"flow"``: the velocity ε − x₀ of the straight path between the two (α = 1 − σ).

    With SNR = α²/σ², the error is weighted, by ``weighting``, as if it were the squared error of x₀ times

    - ``"plain"``: 1 for x₀, 1/σ² for the velocities: the error of what is predicted, as it is;
    - ``"snr-plus-one"``: min(SNR + 1, ``snr_limit``): an error of the velocity, bounded for nearly clean inputs;
    - ``"min-snr"``: min(SNR, ``snr_limit``) (Hang et al., 2023).

    Args:
        denoiser: what learns.
        objective: what it predicts.
        weighting: of errors at different times.
        snr_limit: bounds the weight of nearly clean inputs.
        loss_type: what is made of an error (:func:`penalty`).
        latent_noise: standard deviation of the noise added to standardised latents while training: no two steps see
            the same latent, so that copying one does not pay.
        num_changes: in how many ways instances are changed. The denoiser is told in which, by numbers that are learned
            here, so nothing of it leaks into samples, where it is told nothing (Karras et al., 2022, after whom
            augmentation is non-leaking).
    """

    change_embedding: nn.Parameter | None
    schedule: Tensor

    def __init__(
        self,
        denoiser: Denoiser,
        objective: Objective,
        weighting: Weighting = "snr-plus-one",
        snr_limit: float = 5.0,
        loss_type: LossType = "mse",
        latent_noise: float = 0.0,
        num_changes: int = 0,
    ):
        super().__init__()
        self.denoiser, self.objective, self.weighting, self.snr_limit = denoiser, objective, weighting, snr_limit
        self.loss_type, self.latent_noise = loss_type, latent_noise
        self.register_buffer("schedule", squared_cosine().clone(), persistent=False)
        # Far apart from the beginning: from zero they stay so near that samples are changed ones too.
        told = _APART * torch.randn(num_changes, denoiser.config.time_width) if num_changes else None
        self.register_parameter("change_embedding", None if told is None else nn.Parameter(told))

    def forward(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        key: Int64[Tensor, " batch"],
        row: Int64[Tensor, " batch"] | None = None,
        changed: Float[Tensor, "batch changes latent_dim"] | None = None,
    ) -> Float[Tensor, ""]:
        """Mean loss of latents [B, D], with noise, times and dropout from their keys [B]; ``row`` is not looked at.

        Where there are latents of the instances changed, [B, changes, D], most of the batch learns one of these.
        """
        generator = InstanceGenerator(key)
        told = None
        if changed is not None:
            latents, told = self._one_of_each(latents, changed, generator)
        noise, time = generator.normal(latents.shape[1]), generator.uniform()
        if self.latent_noise:
            noise_of_latents = self.latent_noise * self.denoiser.latent_std
            latents = latents + noise_of_latents * generator.normal(latents.shape[1])
        return self.at(latents, noise, time, generator, told).mean()

    def _one_of_each(self, latents: Tensor, changed: Tensor, generator: InstanceGenerator) -> tuple[Tensor, Tensor]:
        """Draws which latent of each instance is learned, [B, D], and what the denoiser is told of it [B, time_width].

        The number of the instance as it is is −1, the last; it is told zeros.
        """
        assert self.change_embedding is not None
        count = changed.shape[1]
        share = (generator.uniform() - UNCHANGED) / (1 - UNCHANGED)
        number = (share * count).floor().long().clamp(-1, count - 1)
        each = torch.arange(len(latents), device=latents.device)
        embedding = torch.cat([self.change_embedding, torch.zeros_like(self.change_embedding[:1])])
        return torch.cat([changed, latents[:, None]], dim=1)[each, number], embedding[number]

    def at(
        self,
        latents: Float[Tensor, "batch latent_dim"],
        noise: Float[Tensor, "batch latent_dim"],
        time: Float[Tensor, " batch"],
        generator: InstanceGenerator | None = None,
        told: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, " batch"]:
        """The loss of each latent [B] for given noise [B, D] and times [B] in [0, 1); a generator is for dropout, and
        what is told goes to the denoiser."""
        prediction, clean = OBJECTIVES[self.objective], self.denoiser.standardised(latents)
        timestep = time * TRAIN_TIMESTEPS
        timestep = timestep if prediction.is_flow else timestep.long()
        alpha, sigma = noise_levels(self.objective, timestep, self.schedule)
        noisy = alpha[:, None] * clean + sigma[:, None] * noise
        target = prediction.target(clean, noise, alpha[:, None], sigma[:, None])
        error = penalty(self.denoiser(noisy, timestep, generator, told) - target, self.loss_type)
        return self._weight(alpha, sigma) * error

    def _weight(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The weight [B] of each latent's error."""
        if self.weighting == "plain":
            return torch.ones_like(sigma)
        snr = (alpha / sigma).square()
        weight = (snr + (self.weighting == "snr-plus-one")).clamp(max=self.snr_limit)
        return weight if self.objective == "x0" else weight * sigma.square()  # x₀'s error is σ times the velocity's


@torch.no_grad()
def validation_loss(loss: DenoisingLoss, latents: Float[Tensor, "batch latent_dim"], repeats: int = 8) -> float:
    """The mean loss of latents [N, D] with noise that is the same at every call, times spread evenly."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(repeats):
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        time = (torch.randperm(len(latents), generator=generator) + 0.5) / len(latents)
        found.append(loss.at(latents, noise, time.to(latents)).mean())
    return sum(torch.stack(found).tolist()) / repeats


@cache
def squared_cosine() -> Float[Tensor, " timesteps"]:
    """The schedule of diffusions, ᾱ = α² at each of the timesteps [1000] (Nichol and Dhariwal, 2021)."""
    return DDPMScheduler(**_SQUARED_COSINE).alphas_cumprod
