"""Other losses of stage one than the squared error, for trials of what makes reconstructions sharp."""

from collections.abc import Callable

import torch
from torch import Tensor

PointLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Values of the fields at their own points [B, cells, height, width, C], what they should be, and the shares
[1, cells, height, width] of all pixels that these make → one number for each picture, [B]."""


def absolute_too(weight: float) -> PointLoss:
    """The squared error, and ``weight`` times the absolute one."""
    return lambda values, targets, shares: _weighted(
        (values - targets).square() + weight * (values - targets).abs(), shares
    )


def charbonnier(scale: float) -> PointLoss:
    """√(error² + scale²) - scale: squares below the scale, absolute errors above (Charbonnier et al., 1994)."""
    return lambda values, targets, shares: _weighted(((values - targets).square() + scale**2).sqrt() - scale, shares)


def one_sided(values: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """The squared error, where what is white may be whiter and what is black blacker: shown, it is clipped."""
    errors = values - targets
    errors = torch.where(targets >= 1, errors.clamp(max=0), torch.where(targets <= -1, errors.clamp(min=0), errors))
    return _weighted(errors.square(), shares)


def _weighted(values: Tensor, shares: Tensor) -> Tensor:
    """The mean over channels of [B, cells, height, width, C], summed over points by their shares, [B]."""
    return (values.mean(dim=-1) * shares).flatten(1).sum(dim=1)


POINT_LOSSES = {
    "one-sided": one_sided,
    "absolute, 0.1": absolute_too(0.1),
    "Charbonnier, 0.1": charbonnier(0.1),
}
