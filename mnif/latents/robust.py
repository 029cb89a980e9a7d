"""A loss for observations of which part is rubbish: outliers count little, and latents stay likely."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnif.latents.profile import Profile
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, Signal

_WIDTH = 3.0  # of the loss, in robust standard deviations of an instance's residuals
_LEAST_SCALE = 0.01  # of residuals of values in [-1, 1]
_MEDIAN_OF_SQUARE = 0.4549  # of a standard normal number


@dataclass(frozen=True)
class RobustLoss:
    """A maximum a posteriori loss: Geman and McClure's of residuals, and a Gaussian prior over latents.

    A place whose mean squared error is e² costs c² e²/(c² + e²) (Geman and McClure, 1985), so that rubbish costs c² at
    most. The scale c follows from the median of the instance's own squared errors in each step. The prior adds
    σ²/n ‖W(z − μ)‖², where σ² is that median's variance and n the number of observed values.

    Args:
        mean: μ [D], of latents of held-out instances.
        whitening: W [D, D], or [D] where each number counts by itself.
        prior_weight: multiplies the prior.
    """

    mean: Tensor
    whitening: Tensor
    prior_weight: float = 1.0

    @classmethod
    def of(cls, profile: Profile, device: torch.device) -> RobustLoss:
        """Takes the Gaussian of a profile."""
        mean, whitening = (torch.from_numpy(profile.arrays[f"latent_{name}"]) for name in ("mean", "whitening"))
        return cls(mean.to(device), whitening.to(device))

    def __call__(self, decoder: MNIFModel, signal: Signal, latents: Tensor, observation: Observation) -> Tensor:
        """Computes the loss of each instance, [B]."""
        predictions = signal.predict(decoder, decoder.coefficients(latents), observation)
        squares = (predictions - observation.values).square().mean(dim=-1).flatten(1)
        seen = torch.ones_like(squares) if observation.mask is None else observation.mask.flatten(1)
        known = squares.detach().masked_fill(seen == 0, torch.nan)
        variance = known.nanmedian(dim=1, keepdim=True).values / _MEDIAN_OF_SQUARE
        variance = variance.clamp_min(_LEAST_SCALE**2)
        bound = _WIDTH**2 * variance
        count = seen.sum(dim=1).clamp_min(1)
        residuals = (bound * squares / (bound + squares) * seen).sum(dim=1) / count
        apart = latents - self.mean
        white = apart @ self.whitening if self.whitening.ndim == 2 else apart * self.whitening
        values = count * observation.values.shape[-1]
        return residuals + self.prior_weight * variance[:, 0] / values * white.square().sum(dim=1)
