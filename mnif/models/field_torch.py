"""The batched field in PyTorch's own operators: as they are, on any device, and compiled by ``torch.compile``.

The compiled form is for fields on a GPU that :mod:`mnif.models.field_triton` has no kernels for. It keeps no
activations: the gradient evaluates the field again. Gradients of gradients are worked out by PyTorch as it stands, as
``torch.compile`` makes nothing that can be differentiated twice. A form of field has four graphs at most in each
precision, values and gradients of one field and of many, whatever the numbers of fields and points are.
"""

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_BACKEND = "inductor"

logger = logging.getLogger(__name__)


def values(coordinates: Tensor, rows: Tensor, sizes: Sequence[int], output_sine: bool) -> Tensor:
    """Evaluates fields, as :func:`mnif.models.field_op.field_values`, in any precision and any mode of autograd."""
    fields, last = len(rows), len(sizes) - 2
    hidden = coordinates.repeat(fields // len(coordinates), 1, 1) if len(coordinates) > 1 else coordinates
    for index, (weight, bias) in enumerate(split_layers(rows, sizes)):
        hidden = torch.baddbmm(bias, hidden.expand(fields, -1, -1), weight)
        if index < last or output_sine:
            hidden = torch.sin(hidden)
    return hidden


def split_layers(rows: Tensor, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Splits rows [fields, parameters] into every layer's weights [fields, in, out] and biases [fields, 1, out]."""
    parts = rows.split([(inputs + 1) * outputs for inputs, outputs in pairwise(sizes)], dim=1)
    return [
        (part[:, : inputs * outputs].reshape(-1, inputs, outputs), part[:, None, inputs * outputs :])
        for part, (inputs, outputs) in zip(parts, pairwise(sizes), strict=True)
    ]


def can_compile(coordinates: Tensor, rows: Tensor) -> bool:
    """Tells whether :func:`compiled_values` takes these: on a GPU, differentiated by ``rows`` alone.

    What is traced already is left to whoever traces it. ``MNIF_NATIVE=0`` says no, and so do machines without Triton,
    which ``torch.compile`` needs there.
    """
    wanted = rows.device.type == "cuda" and os.environ.get("MNIF_NATIVE") != "0" and find_spec("triton") is not None
    empty = not (len(rows) and coordinates.shape[1])
    return wanted and not (empty or coordinates.requires_grad or torch.compiler.is_compiling() or _failed)


def compiled_values(coordinates: Tensor, rows: Tensor, sizes: Sequence[int], output_sine: bool) -> Tensor:
    """Evaluates fields, as :func:`values`, by compiled graphs where :func:`can_compile` allows it."""
    by_field = coordinates.repeat(len(rows) // len(coordinates), 1, 1)  # one layout, so that graphs fit all batches
    return _CompiledField.apply(by_field, rows, tuple(sizes), output_sine)


class _CompiledField(torch.autograd.Function):
    """Values and first gradients by graphs of their own; what they are asked for twice, PyTorch does."""

    @staticmethod
    def forward(ctx: Any, coordinates: Tensor, rows: Tensor, sizes: tuple[int, ...], output_sine: bool) -> Tensor:
        ctx.save_for_backward(coordinates, rows)
        ctx.form = sizes, output_sine
        device = rows.device.type  # a backward pass stands outside the autocast of its forward pass
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        return _compiled(sizes, output_sine)[0](coordinates, rows)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple:
        coordinates, rows = ctx.saved_tensors
        with torch.autocast(*ctx.autocast):
            if torch.is_grad_enabled():  # this gradient is to be differentiated
                found = values(coordinates, rows, *ctx.form)
                (gradient,) = torch.autograd.grad(found, rows, upstream, create_graph=True)
            else:
                gradient = _compiled(*ctx.form)[1](coordinates, rows, upstream)
        return None, gradient, None, None


@lru_cache(maxsize=32)
def _compiled(sizes: tuple[int, ...], output_sine: bool) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Makes the compiled values of a form of field and their gradient by rows; nothing is compiled before a call."""

    def evaluate(coordinates: Tensor, rows: Tensor) -> Tensor:
        return values(coordinates, rows, sizes, output_sine)

    def gradient(coordinates: Tensor, rows: Tensor, upstream: Tensor) -> Tensor:
        pulled = torch.func.vjp(lambda given: evaluate(coordinates, given), rows)[1]
        return pulled(upstream)[0]

    options: dict[str, Any] = {"backend": _BACKEND, "dynamic": True, "fullgraph": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # else all forms share a small cache
        options["isolate_recompiles"] = True
    evaluated, pulled = (torch.compile(function, **options) for function in (evaluate, gradient))
    return _or_as_it_stands(evaluated, evaluate), _or_as_it_stands(pulled, gradient)


_failed: list[str] = []  # why nothing can be compiled on this machine


def _or_as_it_stands(compiled: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Has a function do, from now on, what its compiled form cannot be made for; says so once."""

    def called(*tensors: Tensor) -> Tensor:
        if not _failed:
            try:
                return compiled(*tensors)
            except torch._dynamo.exc.TorchDynamoException as error:
                _failed.append(" ".join(str(error).split("\n\n")[0].split()))
                logger.warning("fields cannot be compiled, PyTorch's own operators are used: %s", _failed[0])
        return plain(*tensors)

    return called
