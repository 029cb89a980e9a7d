"""Meta-learning: a few gradient steps from a common start name the latent (CAVIA; Zintgraf et al., ICML 2019)."""

from typing import Annotated

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from msgspec import Meta
from torch import Tensor, nn

from mnif.models.io import OwnMemory
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, Signal
from mnif.utils.errors import UserError
from mnif.utils.json_files import Size


class InnerLoop(OwnMemory, ModelMixin, ConfigMixin):
    """Gradient steps on the latents alone, with a learned rate for every dimension (Meta-SGD; Li et al., 2017).

    z ← z - learning_rate · rates ⊙ ∇z L, where L is the error of one instance: a sum over the batch is
    differentiated, not a mean, so an instance's latent does not depend on which others are in its batch.

    Args:
        latent_dim: D, numbers in a latent.
        steps: n, gradient steps.
        learning_rate: multiplies the learned rates. The authors' 1 on the mean of a batch of 32 is about M here: 1/32
            for the batch, and 100/3 · M because our coefficients start smaller and carry 1/sqrt(M).
        rates_from, rates_to: the rates start uniformly between the two, and are kept in [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: Size = 128,
        steps: Annotated[int, Meta(ge=0, le=1000)] = 3,
        learning_rate: float = 1.0,
        rates_from: float = 0.005,
        rates_to: float = 0.1,
    ):
        super().__init__()
        self.rates = nn.Parameter(torch.empty(latent_dim).uniform_(rates_from, rates_to))
        self._diverged: Tensor | None = None  # 0, or the number of the first step after which a latent was not finite

    def forward(
        self,
        decoder: MNIFModel,
        signal: Signal,
        observation: Observation,
        start: Tensor | None = None,
        second_order: bool = False,
    ) -> Tensor:
        """Infers the latents [B, D] of a batch.

        Args:
            decoder: the bases.
            signal: how the observation is predicted.
            observation: what is known of the instances.
            start: latents to start from, [B, D]; default zeros.
            second_order: keep the graph of every step, for gradients through all of them. Otherwise a step's
                gradient is a constant, and only the last step's rates learn.

        Returns:
            [B, D], not finite if the inner learning rate is too high; :meth:`check` says so, for to look here would
            have the host wait for an accelerator at every step.
        """
        second_order = second_order and torch.is_grad_enabled()
        rates = self.config.learning_rate * self.rates.clamp(0, 1)
        latents = observation.values.new_zeros(len(observation.values), len(rates)) if start is None else start
        diverged = torch.zeros((), device=latents.device) if self._diverged is None else self._diverged.to(latents)
        for step in range(self.config.steps):
            with torch.enable_grad():
                latents = latents if second_order and step else latents.detach().requires_grad_()
                error = signal.per_instance_loss(decoder, latents, observation).sum()
                (gradient,) = torch.autograd.grad(error, latents, create_graph=second_order)
            latents = latents - rates * gradient
            diverged = torch.where((diverged == 0) & ~latents.isfinite().all(), step + 1.0, diverged)
        self._diverged = diverged
        return latents

    def check(self) -> None:
        """Looks back at all calls since the last check.

        Raises:
            UserError: latents were not finite after a step: the inner learning rate is too high.
        """
        step, self._diverged = 0 if self._diverged is None else int(self._diverged), None
        if step:
            raise UserError(
                f"the inner loop diverged at step {step} of {self.config.steps}; lower --inner_learning_rate "
                f"(now {self.config.learning_rate:g})"
            )
