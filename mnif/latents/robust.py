"""A loss for observations of which part is rubbish: outliers count little, and latents stay likely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnif.latents.profile import Profile
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, Signal

_WIDTH = 3.0  # of the loss, in robust standard deviations of an instance's residuals
_MEDIAN_OF_SQUARE = 0.4549  # of a standard normal number


@dataclass(frozen=True)
class RobustLoss:
    """A maximum a posteriori loss: Geman and McClure's of residuals, and a Gaussian prior over latents.

    A place whose mean squared error is e² costs c² e²/(c² + e²) (Geman and McClure, 1985), so that rubbish costs c² at
    most. Here c = 3σ, where σ² follows from the median of the instance's own squared errors in each step, and is no
    less than what held-out instances have: of shapes, most of which is empty, the median is next to nothing. The prior
    adds σ²/n ‖W(z − μ)‖² for n observed values.

    Args:
        least_variance: σ² at least, the mean squared error of held-out instances.
        mean: μ [D], of latents of held-out instances.
        whitening: W [D, D], or [D] where each number counts by itself.
        prior_weight: multiplies the prior.
    """

    least_variance: float
    mean: Tensor
    whitening: Tensor
    prior_weight: float = 1.0

    @classmethod
    def of(cls, profile: Profile, device: torch.device) -> RobustLoss:
        """Takes residual and Gaussian of a profile."""
        mean, whitening = (torch.from_numpy(profile.arrays[f"latent_{name}"]) for name in ("mean", "whitening"))
        least = float(profile.arrays["residual_mean"].mean())
        return cls(least, mean.to(device), whitening.to(device))

    def __call__(self, decoder: MNIFModel, signal: Signal, latents: Tensor, observation: Observation) -> Tensor:
        """Computes the loss of each instance, [B]."""
        predictions = signal.predict(decoder, decoder.coefficients(latents), observation)
        squares = (predictions - observation.values).square().mean(dim=-1).flatten(1)
        seen = torch.ones_like(squares) if observation.mask is None else observation.mask.flatten(1)
        known = squares.detach().masked_fill(seen == 0, torch.nan)
        variance = known.nanmedian(dim=1, keepdim=True).values / _MEDIAN_OF_SQUARE
        variance = variance.clamp_min(self.least_variance)
        bound = _WIDTH**2 * variance
        count = seen.sum(dim=1).clamp_min(1)
        residuals = (bound * squares / (bound + squares) * seen).sum(dim=1) / count
        apart = latents - self.mean
        white = apart @ self.whitening if self.whitening.ndim == 2 else apart * self.whitening
        values = count * observation.values.shape[-1]
        return residuals + self.prior_weight * variance[:, 0] / values * white.square().sum(dim=1)
