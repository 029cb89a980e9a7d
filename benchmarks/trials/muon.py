"""Muon (Jordan et al., 2024): momentum whose every matrix is replaced by the nearest orthogonal one."""

import torch
from torch import Tensor, nn

from mnif.models.siren import LayerShape

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic Newton-Schulz iteration


class Muon(torch.optim.Optimizer):
    """For matrices [in, out], or for bases [M, parameters] whose weights are M matrices.

    Args:
        parameters: each with the shape of the layer its rows hold, or None for a plain matrix.
        lr: a step moves every entry by about this times sqrt(max(in, out)) / sqrt(in · out) · 0.2 · ... in root mean
            square 0.2 · lr (the scaling that matches Adam's; Liu et al., 2025).
        momentum: of the gradient's running mean, with Nesterov's look ahead.
    """

    def __init__(self, parameters: list[tuple[nn.Parameter, LayerShape | None]], lr: float, momentum: float = 0.95):
        self.shapes = {id(parameter): shape for parameter, shape in parameters}
        super().__init__([parameter for parameter, _ in parameters], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"])
                shape = self.shapes[id(parameter)]
                if shape is None:
                    parameter -= group["lr"] * _scaled(ahead[None])[0]
                else:
                    cut = shape.inputs * shape.outputs
                    weight = _scaled(ahead[:, :cut].reshape(-1, shape.inputs, shape.outputs)).flatten(1)
                    bias = ahead[:, cut:]
                    bias = bias / bias.square().mean().sqrt().clamp_min(1e-12) * 0.2
                    parameter -= group["lr"] * torch.cat([weight, bias], dim=1)
                parameter.grad = None  # nothing is left for another optimizer


def _scaled(matrices: Tensor) -> Tensor:
    """Orthogonalised [N, in, out], scaled to a root mean square of 0.2.

    A step of the iteration multiplies the matrix by a polynomial of its Gram matrix, and all of these commute. So the
    polynomials are multiplied up at the size of the shorter side, and the matrix is touched at the beginning and at
    the end alone.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    gram = matrices.mT @ matrices if tall else matrices @ matrices.mT
    square = gram.diagonal(dim1=1, dim2=2).sum(dim=1).clamp_min(1e-24)[:, None, None]
    gram = gram / square
    identity = torch.eye(gram.shape[1])
    product = identity.expand_as(gram)
    for _ in range(5):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    product = product / square.sqrt()
    orthogonal = matrices @ product if tall else product @ matrices
    return orthogonal * (0.2 * max(matrices.shape[1:]) ** 0.5)
