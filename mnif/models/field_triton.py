"""The batched field on a GPU, in Triton: what ``field_op.cpp`` does on CPUs, with activations that stay on the chip.

A program has one field and works through its points a block at a time: it evaluates all layers and, for gradients,
goes back through them, before anything but values, errors and gradients is written. Coordinates and the first layer
are in float32 whatever the precision of products; so are sums. Sines are the polynomials of ``field_op.cpp``.

Gradients are summed over chunks of points, as many as the number of points says, in a fixed order, so they depend
neither on the other fields of the batch nor on the card.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A Hopper's asynchronous products read shared memory that is not theirs in kernels like these (Triton 3.6 on an H100):
# illegal addresses or NaN, by the size of a block. Triton reads this when it compiles; what is set already is kept.
os.environ.setdefault("DISABLE_MMA_V3", "1")

_LEAST_CHUNK = 128  # points whose gradients one program sums up
_MOST_CHUNKS = 32  # of a field, each of which has sums of its own in memory

# fmt: off
# ---- what a program does with a block of points ----


@triton.jit
def _sine(x):
    """The sine and the cosine, both within 3e-7 for |x| up to 1e4."""
    n = tl.floor(x * 0.318309886 + 0.5)
    r = ((x - n * 3.140625) - n * 0.0009675025939941406) - n * 1.5099579909783764e-07
    q = r * r
    u = ((q * 2.63479182649462e-06 - 0.0001982275425689295) * q + 0.008333242498338223) * q - 0.1666666567325592
    v = (q * -2.629768403039634e-07 + 2.4774590201559477e-05) * q - 0.0013888651737943292
    v = (v * q + 0.0416666604578495) * q - 0.5
    sign = 1.0 - 2.0 * (n - 2.0 * tl.floor(n * 0.5))
    return (u * (q * r) + r) * sign, (v * q + 1.0) * sign


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):  # noqa: N803
    if PRECISION == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    else:
        product = tl.dot(a, b, input_precision=PRECISION)
    return product


@triton.jit
def _weight(layer, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, I: tl.constexpr, O: tl.constexpr):  # noqa: E741, N803
    """A layer's weight [I, O], zero where its own [INPUTS, OUTPUTS] ends.

    Volatile: else all layers are read before the loop over blocks, and take more shared memory than there is.
    """
    i, o = tl.arange(0, I)[:, None], tl.arange(0, O)[None, :]
    return tl.load(layer + i * OUTPUTS + o, mask=(i < INPUTS) & (o < OUTPUTS), other=0.0, volatile=True)


@triton.jit
def _row(numbers, COUNT: tl.constexpr, N: tl.constexpr):  # noqa: N803
    """[N] numbers, zero where they end."""
    n = tl.arange(0, N)
    return tl.load(numbers + n, mask=n < COUNT, other=0.0)


@triton.jit
def _hidden(row, LAYER: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803
    """Where a layer after the first begins."""
    return row + (D + 1) * WIDTH + (LAYER - 1) * (WIDTH + 1) * WIDTH


@triton.jit
def _first(coordinates, row, point, inside, D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr):  # noqa: N803
    """The first layer without its bias, [points, W]; products with so few numbers are no work for tensor cores."""
    z = tl.zeros((point.shape[0], W), tl.float32)
    for axis in tl.static_range(D):
        x = tl.load(coordinates + point * D + axis, mask=inside, other=0.0)
        z += x[:, None] * _row(row + axis * WIDTH, WIDTH, W)[None, :]
    return z


@triton.jit
def _forward(
    coordinates, row, point, inside,
    D: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr,  # noqa: N803
    W: tl.constexpr, CW: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
):
    """What goes into every layer's sine, LAYERS - 1 times [points, W], and the last layer's sums [points, CW]."""
    z = _first(coordinates, row, point, inside, D, WIDTH, W) + _row(row + D * WIDTH, WIDTH, W)[None, :]
    zs = (z,)
    for layer in tl.static_range(1, LAYERS - 1):
        h, _ = _sine(z)
        base = _hidden(row, layer, D, WIDTH)
        z = _dot(h, _weight(base, WIDTH, WIDTH, W, W), PRECISION)
        z += _row(base + WIDTH * WIDTH, WIDTH, W)[None, :]
        zs = zs + (z,)  # noqa: RUF005
    h, _ = _sine(z)
    last = _hidden(row, LAYERS - 1, D, WIDTH)
    y = _dot(h, _weight(last, WIDTH, C, W, CW), PRECISION) + _row(last + WIDTH * C, C, CW)[None, :]
    return zs, y


@triton.jit
def _tangents(
    coordinates, row, direction, zs, point, inside,
    D: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr,  # noqa: N803
    W: tl.constexpr, CW: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
):
    """By how much the numbers of :func:`_forward` change along a direction in the space of rows."""
    dz = _first(coordinates, direction, point, inside, D, WIDTH, W) + _row(direction + D * WIDTH, WIDTH, W)[None, :]
    dzs = (dz,)
    for layer in tl.static_range(1, LAYERS - 1):
        h, slope = _sine(zs[layer - 1])
        base, along = _hidden(row, layer, D, WIDTH), _hidden(direction, layer, D, WIDTH)
        dz = _dot(slope * dz, _weight(base, WIDTH, WIDTH, W, W), PRECISION)
        dz += _dot(h, _weight(along, WIDTH, WIDTH, W, W), PRECISION)
        dz += _row(along + WIDTH * WIDTH, WIDTH, W)[None, :]
        dzs = dzs + (dz,)  # noqa: RUF005
    h, slope = _sine(zs[LAYERS - 2])
    last, along = _hidden(row, LAYERS - 1, D, WIDTH), _hidden(direction, LAYERS - 1, D, WIDTH)
    dy = _dot(slope * dz, _weight(last, WIDTH, C, W, CW), PRECISION)
    dy += _dot(h, _weight(along, WIDTH, C, W, CW), PRECISION) + _row(along + WIDTH * C, C, CW)[None, :]
    return dzs, dy


# ---- sums over blocks of points ----


@triton.jit
def _no_gradient(D: tl.constexpr, LAYERS: tl.constexpr, W: tl.constexpr, CW: tl.constexpr, IN_MEMORY: tl.constexpr):  # noqa: N803
    """Zeros of the form of a field: D + 1 rows of the first layer, then each layer's weight and bias."""
    sums = ()
    for _ in tl.static_range(D + 1):
        sums = sums + (tl.zeros((W,), tl.float32),)  # noqa: RUF005
    for _ in tl.static_range(1, LAYERS - 1):
        square = tl.zeros((1, 1), tl.float32) if IN_MEMORY else tl.zeros((W, W), tl.float32)
        sums = sums + (square, tl.zeros((W,), tl.float32))  # noqa: RUF005
    return sums + (tl.zeros((W, CW), tl.float32), tl.zeros((CW,), tl.float32))  # noqa: RUF005


@triton.jit
def _plus_square(total, new, weight, begun, WIDTH: tl.constexpr, W: tl.constexpr, IN_MEMORY: tl.constexpr):  # noqa: N803
    """The sum of a hidden layer's weight [W, W], with what a block adds: in registers, or where it is written at last.

    Those of wide layers would take all registers. What a program adds to is its own, and stays in the card's cache.
    """
    if IN_MEMORY:
        w = tl.arange(0, W)
        at, within = weight + w[:, None] * WIDTH + w[None, :], (w[:, None] < WIDTH) & (w[None, :] < WIDTH)
        tl.store(at, tl.load(at, mask=within & begun, other=0.0) + new, mask=within)
    else:
        total += new
    return total


@triton.jit
def _plus_first(sums, coordinates, point, inside, g, D: tl.constexpr):  # noqa: N803
    """The sums of the first layer, with what g [points, W] adds to them."""
    new = ()
    for axis in tl.static_range(D):
        x = tl.load(coordinates + point * D + axis, mask=inside, other=0.0)
        new = new + (sums[axis] + tl.sum(x[:, None] * g, axis=0),)  # noqa: RUF005
    return new + (sums[D] + tl.sum(g, axis=0),)  # noqa: RUF005


@triton.jit
def _write_gradient(
    gradient, sums,
    D: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr, W: tl.constexpr, CW: tl.constexpr,  # noqa: N803
    IN_MEMORY: tl.constexpr,  # noqa: N803
):
    w, c = tl.arange(0, W), tl.arange(0, CW)
    for axis in tl.static_range(D + 1):
        tl.store(gradient + axis * WIDTH + w, sums[axis], mask=w < WIDTH)
    for layer in tl.static_range(1, LAYERS - 1):
        base = _hidden(gradient, layer, D, WIDTH)
        if not IN_MEMORY:
            square = (w[:, None] < WIDTH) & (w[None, :] < WIDTH)
            tl.store(base + w[:, None] * WIDTH + w[None, :], sums[D + 2 * layer - 1], mask=square)
        tl.store(base + WIDTH * WIDTH + w, sums[D + 2 * layer], mask=w < WIDTH)
    last = _hidden(gradient, LAYERS - 1, D, WIDTH)
    within = (w[:, None] < WIDTH) & (c[None, :] < C)
    tl.store(last + w[:, None] * C + c[None, :], sums[D + 2 * LAYERS - 3], mask=within)
    tl.store(last + WIDTH * C + c, sums[D + 2 * LAYERS - 2], mask=c < C)


# ---- the kernels: a program has a field and a chunk of its points ----


@triton.jit
def _place(fields):
    """Which field a program has, and which chunk; counted along one axis, as the others end at 65,535 programs."""
    program = tl.program_id(0)
    return (program % fields).to(tl.int64), program // fields


@triton.jit
def _values_kernel(
    coordinates, sets, rows, values, fields, points,
    D: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr, PARAMETERS: tl.constexpr,  # noqa: N803
    OUTPUT_SINE: tl.constexpr, W: tl.constexpr, CW: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
):
    field, block = _place(fields)
    c, point = tl.arange(0, CW), block * BLOCK + tl.arange(0, BLOCK)
    inside = point < points
    row, coordinates = rows + field * PARAMETERS, coordinates + (field % sets) * points * D
    _, y = _forward(coordinates, row, point, inside, D, WIDTH, C, LAYERS, W, CW, PRECISION)
    if OUTPUT_SINE:
        y, _ = _sine(y)
    at = values + (field * points + point[:, None]) * C + c[None, :]
    tl.store(at, y, mask=inside[:, None] & (c[None, :] < C))


@triton.jit
def _first_order_kernel(
    coordinates, sets, rows, given, weights, weight_sets, errors, gradient, fields, points, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr, PARAMETERS: tl.constexpr,  # noqa: N803
    OUTPUT_SINE: tl.constexpr, W: tl.constexpr, CW: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
    ERRORS: tl.constexpr, IN_MEMORY: tl.constexpr,  # noqa: N803
):
    """The gradient of <given, values>, or of the error against ``given``, which is written too."""
    field, part = _place(fields)
    c = tl.arange(0, CW)
    row, coordinates = rows + field * PARAMETERS, coordinates + (field % sets) * points * D
    gradient += (part * fields + field) * PARAMETERS
    begin = part * chunk
    end = tl.minimum(begin + chunk, points)
    sums, error = _no_gradient(D, LAYERS, W, CW, IN_MEMORY), tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        point = start + tl.arange(0, BLOCK)
        inside = point < end
        zs, y = _forward(coordinates, row, point, inside, D, WIDTH, C, LAYERS, W, CW, PRECISION)
        at = given + (field * points + point[:, None]) * C + c[None, :]
        u = tl.load(at, mask=inside[:, None] & (c[None, :] < C), other=0.0)
        value, slope = _sine(y)
        if ERRORS:
            weight = tl.load(weights + (field % weight_sets) * points + point, mask=inside, other=0.0) / C
            difference = (value if OUTPUT_SINE else y) - u
            difference = tl.where(c[None, :] < C, difference, 0.0)
            error += weight * tl.sum(difference * difference, axis=1)
            u = 2.0 * weight[:, None] * difference
        g = u * slope if OUTPUT_SINE else u
        h, slope = _sine(zs[LAYERS - 2])
        by_weight = _dot(tl.trans(h), g, PRECISION)
        new = (sums[D + 2 * LAYERS - 3] + by_weight, sums[D + 2 * LAYERS - 2] + tl.sum(g, axis=0))
        last = _hidden(row, LAYERS - 1, D, WIDTH)
        g = _dot(g, tl.trans(_weight(last, WIDTH, C, W, CW)), PRECISION) * slope
        for layer in tl.static_range(LAYERS - 2, 0, -1):
            h, slope = _sine(zs[layer - 1])
            by_weight, begun = _dot(tl.trans(h), g, PRECISION), start > begin
            place = _hidden(gradient, layer, D, WIDTH)
            square = _plus_square(sums[D + 2 * layer - 1], by_weight, place, begun, WIDTH, W, IN_MEMORY)
            new = (square, sums[D + 2 * layer] + tl.sum(g, axis=0)) + new  # noqa: RUF005
            base = _hidden(row, layer, D, WIDTH)
            g = _dot(g, tl.trans(_weight(base, WIDTH, WIDTH, W, W)), PRECISION) * slope
        sums = _plus_first(sums, coordinates, point, inside, g, D) + new
        if IN_MEMORY:
            tl.debug_barrier()  # the next block reads what this one has written
    _write_gradient(gradient, sums, D, WIDTH, C, LAYERS, W, CW, IN_MEMORY)
    if ERRORS:
        tl.store(errors + part * fields + field, tl.sum(error, axis=0))


@triton.jit
def _second_order_kernel(
    coordinates, sets, rows, given, weights, weight_sets, directions, tangent, gradient, fields, points, chunk,
    D: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, LAYERS: tl.constexpr, PARAMETERS: tl.constexpr,  # noqa: N803
    OUTPUT_SINE: tl.constexpr, W: tl.constexpr, CW: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,  # noqa: N803
    ERRORS: tl.constexpr, IN_MEMORY: tl.constexpr,  # noqa: N803
):
    """The gradient of <given, J direction>, and J direction itself; or the error's Hessian times the direction."""
    field, part = _place(fields)
    c = tl.arange(0, CW)
    row, direction = rows + field * PARAMETERS, directions + field * PARAMETERS
    coordinates += (field % sets) * points * D
    gradient += (part * fields + field) * PARAMETERS
    begin = part * chunk
    end = tl.minimum(begin + chunk, points)
    sums = _no_gradient(D, LAYERS, W, CW, IN_MEMORY)
    for start in range(begin, end, BLOCK):
        point = start + tl.arange(0, BLOCK)
        inside = point < end
        zs, y = _forward(coordinates, row, point, inside, D, WIDTH, C, LAYERS, W, CW, PRECISION)
        dzs, dy = _tangents(coordinates, row, direction, zs, point, inside, D, WIDTH, C, LAYERS, W, CW, PRECISION)
        at = (field * points + point[:, None]) * C + c[None, :]
        known = inside[:, None] & (c[None, :] < C)
        u = tl.load(given + at, mask=known, other=0.0)
        value, slope = _sine(y)
        # By the change of the output, p, and by the output, q; both are carried back through the layers.
        if ERRORS:
            weight = tl.load(weights + (field % weight_sets) * points + point, mask=inside, other=0.0) * (2.0 / C)
            p = weight[:, None] * tl.where(known, (value if OUTPUT_SINE else y) - u, 0.0)
            q = weight[:, None] * tl.where(known, dy * slope if OUTPUT_SINE else dy, 0.0)
        else:
            tl.store(tangent + at, dy * slope if OUTPUT_SINE else dy, mask=known)
            p, q = u, tl.zeros_like(u)
        if OUTPUT_SINE:
            p, q = p * slope, q * slope - p * value * dy
        h, slope = _sine(zs[LAYERS - 2])
        dh = slope * dzs[LAYERS - 2]
        by_weight = _dot(tl.trans(dh), p, PRECISION) + _dot(tl.trans(h), q, PRECISION)
        new = (sums[D + 2 * LAYERS - 3] + by_weight, sums[D + 2 * LAYERS - 2] + tl.sum(q, axis=0))
        weight_t = tl.trans(_weight(_hidden(row, LAYERS - 1, D, WIDTH), WIDTH, C, W, CW))
        along_t = tl.trans(_weight(_hidden(direction, LAYERS - 1, D, WIDTH), WIDTH, C, W, CW))
        by_dh, by_h = _dot(p, weight_t, PRECISION), _dot(q, weight_t, PRECISION) + _dot(p, along_t, PRECISION)
        p, q = by_dh * slope, by_h * slope - by_dh * h * dzs[LAYERS - 2]
        for layer in tl.static_range(LAYERS - 2, 0, -1):
            h, slope = _sine(zs[layer - 1])
            dh = slope * dzs[layer - 1]
            by_weight = _dot(tl.trans(dh), p, PRECISION) + _dot(tl.trans(h), q, PRECISION)
            place, begun = _hidden(gradient, layer, D, WIDTH), start > begin
            square = _plus_square(sums[D + 2 * layer - 1], by_weight, place, begun, WIDTH, W, IN_MEMORY)
            new = (square, sums[D + 2 * layer] + tl.sum(q, axis=0)) + new  # noqa: RUF005
            weight_t = tl.trans(_weight(_hidden(row, layer, D, WIDTH), WIDTH, WIDTH, W, W))
            along_t = tl.trans(_weight(_hidden(direction, layer, D, WIDTH), WIDTH, WIDTH, W, W))
            by_dh, by_h = _dot(p, weight_t, PRECISION), _dot(q, weight_t, PRECISION) + _dot(p, along_t, PRECISION)
            p, q = by_dh * slope, by_h * slope - by_dh * h * dzs[layer - 1]
        sums = _plus_first(sums, coordinates, point, inside, q, D) + new
        if IN_MEMORY:
            tl.debug_barrier()
    _write_gradient(gradient, sums, D, WIDTH, C, LAYERS, W, CW, IN_MEMORY)


# fmt: on
# ---- the operators ----


def has_kernel(sizes: Sequence[int]) -> bool:
    """Tells whether there are kernels for fields of these sizes: hidden layers of one width up to 64."""
    hidden = sizes[1:-1]
    return len(hidden) > 0 and len({*hidden}) == 1 and hidden[0] <= 64 and sizes[0] <= 4 and sizes[-1] <= 16


def values(coordinates: Tensor, rows: Tensor, sizes: Sequence[int], output_sine: bool) -> Tensor:
    """Evaluates fields, as :func:`mnif.models.field_op.field_values`."""
    result = rows.new_empty(len(rows), coordinates.shape[1], sizes[-1])
    options = _options(rows, sizes, output_sine)
    points = coordinates.shape[1]
    grid = (len(rows) * triton.cdiv(points, options["BLOCK"]),)
    _values_kernel[grid](
        coordinates.contiguous(), len(coordinates), rows.contiguous(), result, len(rows), points, **options
    )
    return result


def vjp(coordinates: Tensor, rows: Tensor, upstream: Tensor, sizes: Sequence[int], output_sine: bool) -> Tensor:
    """The gradient of <upstream, values> by ``rows``."""
    return _first_order(coordinates, rows, upstream, None, sizes, output_sine)[1]


def errors(
    coordinates: Tensor, rows: Tensor, targets: Tensor, weights: Tensor, sizes: Sequence[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    """The weighted squared errors, as :func:`mnif.models.field_op.field_errors`, and their gradient by ``rows``."""
    return _first_order(coordinates, rows, targets, weights, sizes, output_sine)


def second_order(
    coordinates: Tensor, rows: Tensor, upstream: Tensor, direction: Tensor, sizes: Sequence[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    """The gradient by ``rows`` of <upstream, J direction>, J being that of the values, and J direction itself."""
    return _second_order(coordinates, rows, upstream, None, direction, sizes, output_sine)


def errors_hvp(
    coordinates: Tensor,
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    direction: Tensor,
    sizes: Sequence[int],
    output_sine: bool,
) -> Tensor:
    """The Hessian by ``rows`` of the weighted squared errors times a direction."""
    return _second_order(coordinates, rows, targets, weights, direction, sizes, output_sine)[0]


def _first_order(
    coordinates: Tensor, rows: Tensor, given: Tensor, weights: Tensor | None, sizes: Sequence[int], output_sine: bool
) -> tuple[Tensor, Tensor]:
    points = coordinates.shape[1]
    chunk, chunks = _chunks_of(points)
    found = rows.new_empty(chunks, len(rows))
    gradient = rows.new_empty(chunks, *rows.shape)
    known = rows if weights is None else weights.contiguous()  # read with weights alone
    _first_order_kernel[(len(rows) * chunks,)](
        coordinates.contiguous(),
        len(coordinates),
        rows.contiguous(),
        given.contiguous(),
        known,
        len(known),
        found,
        gradient,
        len(rows),
        points,
        chunk,
        ERRORS=weights is not None,
        **_options(rows, sizes, output_sine, gradients=1),
    )
    return found.sum(dim=0), gradient.sum(dim=0)


def _second_order(
    coordinates: Tensor,
    rows: Tensor,
    given: Tensor,
    weights: Tensor | None,
    direction: Tensor,
    sizes: Sequence[int],
    output_sine: bool,
) -> tuple[Tensor, Tensor]:
    points = coordinates.shape[1]
    chunk, chunks = _chunks_of(points)
    gradient, tangent = rows.new_empty(chunks, *rows.shape), torch.empty_like(given.contiguous())
    known = rows if weights is None else weights.contiguous()
    _second_order_kernel[(len(rows) * chunks,)](
        coordinates.contiguous(),
        len(coordinates),
        rows.contiguous(),
        given.contiguous(),
        known,
        len(known),
        direction.contiguous(),
        tangent,
        gradient,
        len(rows),
        points,
        chunk,
        ERRORS=weights is not None,
        **_options(rows, sizes, output_sine, gradients=2),
    )
    return gradient.sum(dim=0), tangent


def _chunks_of(points: int) -> tuple[int, int]:
    """Of how many points a chunk is, and how many chunks there are."""
    chunk = max(_LEAST_CHUNK, triton.cdiv(points, _MOST_CHUNKS))
    return chunk, triton.cdiv(points, chunk)


def _options(rows: Tensor, sizes: Sequence[int], output_sine: bool, gradients: int = 0) -> dict[str, Any]:
    """What kernels are compiled for."""
    width = max(16, triton.next_power_of_2(sizes[1]))
    sums = {"IN_MEMORY": width * gradients > 64} if gradients else {}
    return sums | {
        "D": sizes[0],
        "WIDTH": sizes[1],
        "C": sizes[-1],
        "LAYERS": len(sizes) - 1,
        "PARAMETERS": rows.shape[1],
        "OUTPUT_SINE": output_sine,
        "W": width,
        "CW": 16,
        "BLOCK": (64, {16: 64, 32: 64, 64: 32}[width], 16)[gradients],
        "PRECISION": _precision(),
        "num_warps": 4 if width <= 32 else 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _precision() -> str:
    """Of products after the first layer: bfloat16 under autocast, else by ``torch.set_float32_matmul_precision``.

    For float32 a product is three of TF32, which is as exact to 1e-6: products of float32 itself, without tensor
    cores, keep so much in registers that a gradient of width 64 spills 49 KB a thread.
    """
    if torch.is_autocast_enabled("cuda"):
        return "bf16"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
