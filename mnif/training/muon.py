"""Muon: momentum whose every matrix is replaced by an orthogonal one near it (Jordan et al., 2024).

A gradient of a matrix is dominated by a few directions; orthogonalised, a step moves all of them alike. This is
:class:`torch.optim.Muon` with its ``adjust_lr_fn="match_rms_adamw"``, but in float32 and at the size of a matrix's
shorter side: on CPUs torch's, in bfloat16, was measured to take 20 to 70 times as long.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, by Jordan et al.

_STEPS = 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices; everything else is left to another optimizer.

    Args:
        parameters: matrices [rows, columns]. An iteration costs the cube of the shorter side.
        lr: learning rate, on the scale of Adam's: a step has a root mean square of about 0.2 · lr (Liu et al., 2025).
        momentum: of the gradients' running mean, with Nesterov's look ahead.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves the matrices that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"])
                scale = 0.2 * max(parameter.shape) ** 0.5
                parameter.sub_(orthogonalised(ahead), alpha=group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix [rows, columns] with the same singular vectors and singular values between about 0.7 and 1.2.

    Five steps of Newton and Schulz's iteration. A step multiplies the matrix by a polynomial of its Gram matrix, and
    all of these commute, so they are multiplied up at the size of the shorter side; the matrix itself is touched at
    the beginning and at the end alone. Singular values below about a thousandth of the largest come out smaller.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    gram = matrix.mT @ matrix if tall else matrix @ matrix.mT
    square = gram.trace().clamp_min(1e-24)
    gram = gram / square
    identity = torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    product = identity
    for _ in range(_STEPS):
        factor = a * identity + b * gram + c * gram @ gram
        product = factor @ product
        gram = factor @ gram @ factor
    product = product / square.sqrt()
    return matrix @ product if tall else product @ matrix
