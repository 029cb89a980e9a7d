"""Other noise on the latents of stage one than the same for every number all the time, for trials at as many bits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnif.training.methods import EncoderMethod

_LEAST_BITS = 0.02  # of a number; with less its noise has no bound


class _LearnedShares(EncoderMethod):
    """Every number of a latent learns its share of the bits that the given noise leaves them all together.

    A number of r bits has noise of variance 1 / (4^r - 1) (Shannon, 1949): what matters more is told more precisely.
    """

    shares: nn.Parameter
    total: float

    def forward(self, row: Tensor, key: Tensor, **batch: Tensor) -> Tensor:
        bits = (self.total * self.shares.softmax(0)).clamp(min=_LEAST_BITS)
        self.latent_noise = (4**bits - 1).rsqrt()  # type: ignore[assignment]
        return super().forward(row, key, **batch)


class _Scheduled(EncoderMethod):
    """Noise that goes straight from one multiple of what was given to it, or to no more than it, as training goes."""

    begin: float
    given: float

    def forward(self, row: Tensor, key: Tensor, **batch: Tensor) -> Tensor:
        progress: float = self.decoder.progress  # type: ignore[assignment]
        self.latent_noise = self.given * (self.begin + (1 - self.begin) * min(2 * progress, 1.0))
        return super().forward(row, key, **batch)


def learned_shares(method: EncoderMethod) -> None:
    method.__class__ = _LearnedShares
    assert isinstance(method, _LearnedShares)
    dim = method.decoder.config.latent_dim
    method.total = dim / 2 * math.log2(1 + method.latent_noise**-2)
    method.shares = nn.Parameter(torch.zeros(dim))


def scheduled(begin: float) -> Callable[[EncoderMethod], None]:
    """Noise that begins with so many times the given one, and has come to it when half of the steps are done."""

    def change(method: EncoderMethod) -> None:
        method.__class__ = _Scheduled
        assert isinstance(method, _Scheduled)
        method.begin, method.given = begin, method.latent_noise

    return change


NOISES: dict[str, Callable[[EncoderMethod], None]] = {
    "learned shares of the bits": learned_shares,
    "noise rising from nothing": scheduled(0.0),
    "noise falling from twice": scheduled(2.0),
}
