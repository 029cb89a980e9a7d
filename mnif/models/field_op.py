"""The batched field as one operator of PyTorch: values, their gradient, and the gradient's gradient.

``field_op.cpp`` is compiled once per machine with the C++ compiler at hand (about five seconds) and kept in the
cache folder; on a GPU the kernels of :mod:`mnif.models.field_triton` do the same, if Triton is installed. Where there
is neither, :class:`mnif.models.siren.BakedField` does it with PyTorch's own operators, slower. ``MNIF_NATIVE=0`` turns
both off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mnif.utils.files import cache_folder, written_atomically

_SOURCE = Path(__file__).with_suffix(".cpp")

_FLAGS = [
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fopenmp",
    "-shared",
    "-fPIC",
    "-std=c++20",
]

logger = logging.getLogger(__name__)


@torch.compiler.assume_constant_result  # torch.compile would trace how the operator is found
def is_compiled() -> bool:
    """Whether the compiled operator is at hand on this machine; compiles it at the first call."""
    return _library() is not None


def field_values(coordinates: Tensor, rows: Tensor, sizes: Sequence[int], output_sine: bool) -> Tensor:
    """Evaluates a batch of fields, twice differentiable by ``rows``, where :func:`can_evaluate` allows it.

    Args:
        coordinates: [sets, points, sizes[0]]; field i is asked at set i modulo ``sets``.
        rows: [fields, parameters], one field's layers one after the other, each weight [in, out] then bias [out].
        sizes: numbers between the layers: coordinates, hidden units ..., channels.
        output_sine: a sine follows the last layer too.

    Returns:
        [fields, points, sizes[-1]], within 1e-6 of PyTorch's sines and products.
    """
    return torch.ops.mnif.field_values(coordinates, rows.float(), list(sizes), output_sine)


def field_errors(
    coordinates: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, sizes: Sequence[int], output_sine: bool
) -> Tensor:
    """Computes the weighted squared error of each field, [fields], twice differentiable by ``rows``.

    The same as squaring the difference of :func:`field_values` and ``targets`` [fields, points, channels], in one
    pass over the points where two would be.

    Args:
        coordinates, rows, sizes, output_sine: as for :func:`field_values`.
        targets: [fields, points, channels].
        weights: [sets, points], by which a point's squared error, a mean over the channels, is multiplied; those of
            field i are set i modulo ``sets``.
    """
    return torch.ops.mnif.field_errors(coordinates, rows.float(), targets, weights, list(sizes), output_sine)[0]


def can_evaluate(sizes: Sequence[int], coordinates: Tensor, rows: Tensor, *targets: Tensor) -> bool:
    """Tells whether the operator takes these: float32, differentiated by ``rows`` alone.

    On a GPU it takes rows in half precision too, as autocast mixes them, and only sizes that there are kernels for.
    """
    fixed, device = (coordinates, *targets), rows.device.type
    if any(tensor.dtype != torch.float32 or tensor.requires_grad for tensor in fixed):
        return False
    if device == "cpu":
        return rows.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and is_compiled()
    return device == "cuda" and _has_kernel(*sizes)


@torch.compiler.assume_constant_result
def _has_kernel(*sizes: int) -> bool:
    """Tells whether there is a kernel for GPUs that takes fields of these sizes."""
    return (kernels := _kernels()) is not None and kernels.has_kernel(sizes)


@torch.library.custom_op("mnif::field_values", mutates_args=(), device_types="cpu")
def _values(coordinates: Tensor, rows: Tensor, sizes: list[int], output_sine: bool) -> Tensor:
    values = rows.new_empty(len(rows), coordinates.shape[1], sizes[-1])
    _call("mnif_field_values", coordinates, rows, sizes, output_sine, [rows.contiguous(), values])
    return values


@torch.library.custom_op("mnif::field_vjp", mutates_args=(), device_types="cpu")
def _vjp(coordinates: Tensor, rows: Tensor, upstream: Tensor, sizes: list[int], output_sine: bool) -> Tensor:
    gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
    tensors = [rows.contiguous(), upstream.contiguous(), gradient]
    _call("mnif_field_vjp", coordinates, rows, sizes, output_sine, tensors)
    return gradient


@torch.library.custom_op("mnif::field_second_order", mutates_args=(), device_types="cpu")
def _second_order(
    coordinates: Tensor, rows: Tensor, upstream: Tensor, direction: Tensor, sizes: list[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
    tangent = torch.empty_like(upstream, memory_format=torch.contiguous_format)
    tensors = [rows.contiguous(), upstream.contiguous(), direction.contiguous(), gradient, tangent]
    _call("mnif_field_second_order", coordinates, rows, sizes, output_sine, tensors)
    return gradient, tangent


@torch.library.custom_op("mnif::field_errors", mutates_args=(), device_types="cpu")
def _errors(
    coordinates: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, sizes: list[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    errors, gradient = rows.new_zeros(len(rows)), torch.empty_like(rows, memory_format=torch.contiguous_format)
    rest: list[Tensor | int] = [rows.contiguous(), targets.contiguous(), weights.contiguous(), len(weights)]
    _call("mnif_field_errors", coordinates, rows, sizes, output_sine, [*rest, errors, gradient])
    return errors, gradient


@torch.library.custom_op("mnif::field_errors_hvp", mutates_args=(), device_types="cpu")
def _errors_hvp(
    coordinates: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    direction: Tensor,
    sizes: list[int],
    output_sine: bool,
) -> Tensor:
    gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
    rest: list[Tensor | int] = [rows.contiguous(), targets.contiguous(), weights.contiguous(), len(weights)]
    _call("mnif_field_errors_hvp", coordinates, rows, sizes, output_sine, [*rest, direction.contiguous(), gradient])
    return gradient


def _register_on_gpu(operator: Any, name: str) -> None:
    """Has an operator call the function of this name in :mod:`mnif.models.field_triton` where tensors are on a GPU."""

    @operator.register_kernel("cuda")
    def called(coordinates: Tensor, *others: Any) -> Any:
        with torch.cuda.device_of(coordinates):  # Triton starts kernels on the current one of several cards
            return getattr(_kernels(), name)(coordinates, *others)


for _operator, _name in (
    (_values, "values"),
    (_vjp, "vjp"),
    (_second_order, "second_order"),
    (_errors, "errors"),
    (_errors_hvp, "errors_hvp"),
):
    _register_on_gpu(_operator, _name)


@_errors.register_fake
def _(
    coordinates: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, sizes: list[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape[0]), torch.empty_like(rows, memory_format=torch.contiguous_format)


@_errors_hvp.register_fake
def _(
    coordinates: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    direction: Tensor,
    sizes: list[int],
    output_sine: bool,
) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@_values.register_fake
def _(coordinates: Tensor, rows: Tensor, sizes: list[int], output_sine: bool) -> Tensor:
    return rows.new_empty(rows.shape[0], coordinates.shape[1], sizes[-1])


@_vjp.register_fake
def _(coordinates: Tensor, rows: Tensor, upstream: Tensor, sizes: list[int], output_sine: bool) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@_second_order.register_fake
def _(
    coordinates: Tensor, rows: Tensor, upstream: Tensor, direction: Tensor, sizes: list[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(rows, memory_format=contiguous), torch.empty_like(upstream, memory_format=contiguous)


def _keep_values(ctx: Any, inputs: tuple, output: Tensor) -> None:
    coordinates, rows, ctx.sizes, ctx.output_sine = inputs
    ctx.save_for_backward(coordinates, rows)


def _values_backward(ctx: Any, upstream: Tensor) -> tuple:
    coordinates, rows = ctx.saved_tensors
    return None, torch.ops.mnif.field_vjp(coordinates, rows, upstream, ctx.sizes, ctx.output_sine), None, None


def _keep_vjp(ctx: Any, inputs: tuple, output: Tensor) -> None:
    coordinates, rows, upstream, ctx.sizes, ctx.output_sine = inputs
    ctx.save_for_backward(coordinates, rows, upstream)


def _vjp_backward(ctx: Any, direction: Tensor) -> tuple:
    coordinates, rows, upstream = ctx.saved_tensors
    gradient, tangent = torch.ops.mnif.field_second_order(
        coordinates, rows, upstream, direction, ctx.sizes, ctx.output_sine
    )
    return None, gradient, tangent, None, None


def _keep_errors(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    coordinates, rows, targets, weights, ctx.sizes, ctx.output_sine = inputs
    ctx.save_for_backward(coordinates, rows, targets, weights, output[1])
    ctx.set_materialize_grads(False)


def _errors_backward(ctx: Any, upstream: Tensor | None, direction: Tensor | None) -> tuple:
    """Differentiates the errors, whose gradient is an output, and that gradient: Hessian times ``direction``."""
    coordinates, rows, targets, weights, gradient = ctx.saved_tensors
    total = None if upstream is None else upstream[:, None] * gradient
    if direction is not None:
        second = torch.ops.mnif.field_errors_hvp(
            coordinates, rows, targets, weights, direction, ctx.sizes, ctx.output_sine
        )
        total = second if total is None else total + second
    return None, total, None, None, None, None


_errors.register_autograd(_errors_backward, setup_context=_keep_errors)
_values.register_autograd(_values_backward, setup_context=_keep_values)
_vjp.register_autograd(_vjp_backward, setup_context=_keep_vjp)


def _call(
    name: str, coordinates: Tensor, rows: Tensor, sizes: list[int], output_sine: bool, rest: Sequence[Tensor | int]
) -> None:
    """Calls the library: layers, sizes, output sine, fields, points, coordinates, sets, the rest, threads."""
    coordinates = coordinates.contiguous()
    function = getattr(_library(), name)
    function(
        ctypes.c_int(len(sizes) - 1),
        (ctypes.c_int * len(sizes))(*sizes),
        ctypes.c_int(output_sine),
        ctypes.c_long(len(rows)),
        ctypes.c_long(coordinates.shape[1]),
        ctypes.c_void_p(coordinates.data_ptr()),
        ctypes.c_long(len(coordinates)),
        *[ctypes.c_long(given) if isinstance(given, int) else ctypes.c_void_p(given.data_ptr()) for given in rest],
        ctypes.c_int(torch.get_num_threads()),
    )


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    """Imports the kernels for GPUs, or gives None where there is no Triton."""
    if os.environ.get("MNIF_NATIVE") == "0" or find_spec("triton") is None:
        return None
    return import_module("mnif.models.field_triton")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """Loads the compiled operator, or gives None where it cannot be had."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if os.environ.get("MNIF_NATIVE") == "0" or sys.platform == "win32" or shutil.which(compiler[0]) is None:
        return None
    key = hashlib.sha256(_SOURCE.read_bytes())
    key.update(" ".join([*compiler, *_FLAGS, platform.machine(), _processor()]).encode())
    path = cache_folder() / f"field-{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            with written_atomically(path) as temporary:
                subprocess.run(
                    [*compiler, *_FLAGS, str(_SOURCE), "-o", str(temporary)], check=True, capture_output=True
                )
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = _complaint(error.stderr) if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("the compiled field operator is not available, PyTorch's own operators are used: %s", reason)
        return None


def _complaint(printed: bytes) -> str:
    """Finds the first error in what a compiler printed."""
    lines = printed.decode(errors="replace").splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "it gives no reason")


def _processor() -> str:
    """Names what -march=native depends on, so that a cache shared by different machines stays right."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
