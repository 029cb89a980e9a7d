"""The kernels for GPUs: interpreted on the CPU against float64, and compiled for cards that are not here."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="no Triton on this machine: its kernels are not tested")

from torch._subclasses.fake_tensor import FakeTensorMode

from mnif.models import field_op
from tests.mnif.test_field_op import plain_errors, plain_values, random_rows

ROOT = Path(__file__).parents[2]

if torch.cuda.is_available():
    pytest.skip("a CUDA device is there: tests/end_to_end/test_gpu.py runs them", allow_module_level=True)


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    return import_module("mnif.models.field_triton")  # interpreted, by tests/conftest.py


# Sizes, output sine, fields, sets, points; the interpreter is slow.
SHAPES = {
    "cells of width 24": ((2, 24, 24, 24, 3), False, 4, 2, 40),
    "voxels, one hidden layer": ((3, 20, 1), True, 2, 2, 100),
    "width 64, as in the paper": ((2, 64, 64, 64, 3), True, 2, 1, 40),
    "a single point": ((2, 16, 16, 3), False, 1, 1, 1),
}


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> tuple:
    sizes, output_sine, fields, sets, points = SHAPES[request.param]
    torch.manual_seed(0)
    return sizes, output_sine, torch.rand(sets, points, sizes[0]) * 2 - 1, random_rows(fields, sizes)


def assert_near(found: torch.Tensor, exact: torch.Tensor, bound: float = 4e-6) -> None:
    assert (found.double() - exact).abs().max() <= bound * exact.abs().max()


def test_values_and_both_gradients_equal_float64(kernels: ModuleType, case: tuple) -> None:
    sizes, output_sine, coordinates, rows = case
    exact_rows = rows.double().requires_grad_()
    exact = plain_values(coordinates.double(), exact_rows, sizes, output_sine)
    upstream, direction = torch.randn(exact.shape), torch.randn(rows.shape)
    exact_upstream = upstream.double().requires_grad_()
    (gradient,) = torch.autograd.grad((exact * exact_upstream).sum(), exact_rows, create_graph=True)
    second = torch.autograd.grad((gradient * direction.double()).sum(), (exact_rows, exact_upstream))

    assert_near(kernels.values(coordinates, rows, sizes, output_sine), exact)
    assert_near(kernels.vjp(coordinates, rows, upstream, sizes, output_sine), gradient)
    found = kernels.second_order(coordinates, rows, upstream, direction, sizes, output_sine)
    for ours, theirs in zip(found, second, strict=True):
        assert_near(ours, theirs)


def test_errors_their_gradient_and_hessian_products_equal_float64(kernels: ModuleType, case: tuple) -> None:
    sizes, output_sine, coordinates, rows = case
    targets = torch.randn(len(rows), coordinates.shape[1], sizes[-1])
    weights, direction = torch.rand(len(coordinates), coordinates.shape[1]), torch.randn(rows.shape)
    exact_rows = rows.double().requires_grad_()
    exact = plain_errors(coordinates.double(), exact_rows, targets.double(), weights.double(), sizes, output_sine)
    (gradient,) = torch.autograd.grad(exact.sum(), exact_rows, create_graph=True)
    (product,) = torch.autograd.grad((gradient * direction.double()).sum(), exact_rows)

    errors, found = kernels.errors(coordinates, rows, targets, weights, sizes, output_sine)
    assert_near(errors, exact)
    assert_near(found, gradient)
    assert_near(kernels.errors_hvp(coordinates, rows, targets, weights, direction, sizes, output_sine), product)


@pytest.mark.parametrize("width", [16, 50])
def test_chunks_add_up_and_a_field_does_not_depend_on_the_others(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    sizes, weights = (2, width, width, 3), torch.ones(1, 150)
    coordinates, rows, targets = torch.rand(1, 150, 2), random_rows(3, sizes), torch.randn(3, 150, 3)
    monkeypatch.setattr(kernels, "_LEAST_CHUNK", 256)
    whole = kernels.errors(coordinates, rows, targets, weights, sizes, False)
    monkeypatch.setattr(kernels, "_LEAST_CHUNK", 64)
    together = kernels.errors(coordinates, rows, targets, weights, sizes, False)
    alone = kernels.errors(coordinates, rows[1:2], targets[1:2], weights, sizes, False)
    for one, of_chunks, of_all in zip(alone, together, whole, strict=True):
        assert torch.equal(one[0], of_chunks[1])
        assert_near(of_chunks, of_all.double())


@pytest.mark.parametrize(
    ("sizes", "has"),
    [
        ((2, 24, 24, 3), True),
        ((3, 64, 1), True),
        ((2, 7, 13, 2), False),
        ((2, 3), False),
        ((2, 48, 48, 3), True),
        ((2, 65, 3), False),
    ],
)
def test_which_fields_there_are_kernels_for(kernels: ModuleType, sizes: tuple[int, ...], has: bool) -> None:
    assert kernels.has_kernel(sizes) is has


def test_the_operators_know_the_kernels() -> None:
    """Without a card nothing can be run there; that they would be called can be seen."""
    for name in ("field_values", "field_vjp", "field_second_order", "field_errors", "field_errors_hvp"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mnif::{name}", "CUDA")
    assert field_op._kernels() is not None


def test_kernels_start_on_the_card_that_their_tensors_are_on(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake tensors of a second card, and the operator's own entry for cards."""
    current, sizes = [0], [2, 16, 3]
    seen: list[int] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        current.append(tensor.get_device())
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(kernels, "values", lambda *_: seen.append(current[-1]))
    registered = field_op._values._backend_fns["cuda"]
    with FakeTensorMode():
        coordinates, rows = torch.empty(1, 5, 2, device="cuda:1"), torch.empty(1, 99, device="cuda:1")
        registered(coordinates, rows, sizes, False)
    assert (seen, current) == ([1], [0])


@pytest.mark.parametrize(("fields", "points"), [(0, 5), (2, 0)])
def test_nothing_asked_is_nothing_found(kernels: ModuleType, fields: int, points: int) -> None:
    sizes, rows = (2, 16, 3), random_rows(fields, (2, 16, 3))
    coordinates, targets = torch.rand(1, points, 2), torch.rand(fields, points, 3)
    assert kernels.values(coordinates, rows, sizes, False).shape == (fields, points, 3)
    errors, gradient = kernels.errors(coordinates, rows, targets, torch.rand(1, points), sizes, False)
    assert torch.equal(errors, torch.zeros(fields))
    assert torch.equal(gradient, torch.zeros_like(rows))


def test_tensors_may_lie_anyhow_in_memory(kernels: ModuleType) -> None:
    sizes, rows = (2, 16, 3), random_rows(3, (2, 16, 3))
    coordinates, upstream = torch.rand(3, 20, 2), torch.randn(3, 20, 3)
    plain = kernels.vjp(coordinates, rows, upstream, sizes, False)
    wide = torch.zeros(rows.shape[1] + 1, 3).t()[:, 1:].copy_(rows)
    turned = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (coordinates, upstream)]
    assert torch.equal(kernels.vjp(turned[0], wide, turned[1], sizes, False), plain)


def test_kernels_are_given_what_they_take(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter passes over constants that a kernel does not know; a card's launcher refuses them."""
    sizes, compiler = (2, 16, 3), {"num_warps", "num_stages", "enable_fp_fusion"}
    coordinates, rows, given = torch.empty(1, 40, 2), torch.empty(2, 99), torch.empty(2, 40, 3)
    asked = []

    class Asked:
        def __init__(self, names: list[str]):
            self.names = names

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*given: object, **named: object) -> None:
                assert [*self.names[: len(given)], *named] == [*dict.fromkeys([*self.names[: len(given)], *named])]
                assert {*self.names} == {*self.names[: len(given)], *named} - compiler
                asked.append(grid)

            return launch

    for name in ("_values_kernel", "_first_order_kernel", "_second_order_kernel"):
        monkeypatch.setattr(kernels, name, Asked(getattr(kernels, name).arg_names))
    kernels.values(coordinates, rows, sizes, False)
    kernels.vjp(coordinates, rows, given, sizes, False)
    kernels.errors(coordinates, rows, given, torch.ones(1, 40), sizes, False)
    kernels.second_order(coordinates, rows, given, rows, sizes, False)
    kernels.errors_hvp(coordinates, rows, given, torch.ones(1, 40), rows, sizes, False)
    assert asked == [(2,)] * 5


def test_more_programs_than_a_second_axis_has(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA starts at most 65,535 programs along any axis but the first; a volume of 256³ points has more blocks."""
    grids: list[tuple[int, ...]] = []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *_, **__: None

    monkeypatch.setattr(kernels, "_values_kernel", Recorded())
    with FakeTensorMode():
        coordinates, rows = torch.empty(1, 256**3, 3), torch.empty(2, 97)
        kernels.values(coordinates, rows, (3, 16, 1), False)
    assert grids == [(2 * 256**3 // 64,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "precision", "width", "alone"),
    [(80, "tf32", 24, False), (90, "tf32x3", 24, True), (90, "bf16", 64, False)],
)
def test_kernels_compile_for_a_card(capability: int, precision: str, width: int, alone: bool, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    form = ["--width", str(width), "--depth", "1", "--alone" if alone else "--no_alone"]
    card = ["--capability", str(capability), "--precision", precision]
    program = [sys.executable, str(ROOT / "benchmarks/kernels.py"), *form, *card]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, *rows = [line.split() for line in done.stdout.splitlines()]
    assert [name for name, *_ in rows] == ["values", "first_order", "second_order"]
    for _, registers, spilled, shared, asynchronous in rows:
        assert int(asynchronous) == 0  # which went wrong on an H100
        assert 0 < int(registers) <= 255
        assert int(spilled) < 8_000
        assert int(shared) < 160_000  # of 163 to 227 KiB
