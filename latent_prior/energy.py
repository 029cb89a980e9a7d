"""How far samples lie from data: the energy distance between two sets of points."""

import torch
from torch import Tensor


@torch.no_grad()
def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X − Y| − E|X − X'| − E|Y − Y'|, over all pairs of different points (Székely and Rizzo, 2013).

    It is zero if both sets come from one distribution, and only then; for finite sets it is estimated without bias, so
    it may come out a little below zero.

    Args:
        x: points [N, D], at least 2.
        y: points [M, D], at least 2.
    """
    x, y = x.double(), y.double()
    return (2 * torch.cdist(x, y).mean() - _mean_within(x) - _mean_within(y)).item()


def _mean_within(points: Tensor) -> Tensor:
    """The mean distance of two different points."""
    count = len(points)
    return torch.nn.functional.pdist(points).sum() * 2 / (count * (count - 1))
