import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from mnif.models import field_op
from mnif.models.field_op import field_errors, field_values
from mnif.models.siren import BakedField, LayerShape

SHAPES = {
    "cells of width 24": ((2, 24, 24, 24, 3), False, 8, 4, 140),
    "one field on one grid": ((2, 32, 32, 3), True, 3, 1, 37),
    "voxels, points of their own": ((3, 20, 20, 1), True, 4, 4, 500),
    "width 64, as in the paper": ((2, 64, 64, 64, 64, 64, 3), True, 2, 1, 333),
    "width 128, the large model": ((3, 128, 128, 1), True, 2, 1, 50),
    "a single point": ((2, 16, 16, 3), False, 1, 1, 1),
    "one layer with a sine": ((2, 5), True, 2, 1, 9),
    "odd sizes": ((1, 7, 13, 2), False, 3, 3, 65),
}


def random_rows(fields: int, sizes: tuple[int, ...]) -> torch.Tensor:
    layers = []
    for inputs, outputs in pairwise(sizes):
        layers += [torch.randn(fields, inputs * outputs) * (1.4 / inputs**0.5), torch.randn(fields, outputs)]
    return torch.cat(layers, dim=1)


@pytest.fixture(params=SHAPES)
def case(request: pytest.FixtureRequest) -> tuple:
    sizes, output_sine, fields, sets, points = SHAPES[request.param]
    torch.manual_seed(0)
    coordinates = torch.rand(sets, points, sizes[0]) * 2 - 1
    return sizes, output_sine, coordinates, random_rows(fields, sizes)


def plain_values(coordinates, rows, sizes, output_sine):
    return BakedField([LayerShape(*pair) for pair in pairwise(sizes)], rows, output_sine).evaluate_layers(coordinates)


compiled = pytest.mark.skipif(not field_op.is_compiled(), reason="no C++ compiler: plain PyTorch is used")


def with_gradients(function, case: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    """Values, their gradient, and the gradient of a product with that gradient by both things it depends on."""
    sizes, output_sine, coordinates, rows = case
    rows = rows.to(dtype).requires_grad_()
    values = function(coordinates.to(dtype), rows, sizes, output_sine)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(values.shape, generator=generator).to(dtype).requires_grad_()
    direction = torch.randn(rows.shape, generator=generator).to(dtype)
    (gradient,) = torch.autograd.grad((values * upstream).sum(), rows, create_graph=True)
    second = torch.autograd.grad((gradient * direction).sum(), (rows, upstream))
    return [tensor.double() for tensor in (values, gradient, *second)]


@compiled
def test_operator_and_both_its_gradients_equal_float64(case: tuple) -> None:
    ours = with_gradients(field_values, case, torch.float32)
    exact = with_gradients(plain_values, case, torch.float64)
    for a, b in zip(ours, exact, strict=True):
        assert (a - b).abs().max() <= 4e-6 * b.abs().max()


@compiled
def test_errors_and_both_their_gradients_equal_float64(case: tuple) -> None:
    sizes, output_sine, coordinates, rows = case
    targets = torch.randn(len(rows), coordinates.shape[1], sizes[-1])
    weights = torch.rand(len(coordinates), coordinates.shape[1])
    direction, weight = torch.randn_like(rows), torch.randn(len(rows))
    found = []
    for function, dtype in ((field_errors, torch.float32), (plain_errors, torch.float64)):
        parameters = rows.to(dtype).requires_grad_()
        errors = function(coordinates.to(dtype), parameters, targets.to(dtype), weights.to(dtype), sizes, output_sine)
        weighted = (errors * weight.to(dtype)).sum()
        (gradient,) = torch.autograd.grad(weighted, parameters, create_graph=True)
        # A product of errors and gradients, so that both outputs are differentiated at once.
        (second,) = torch.autograd.grad((gradient * direction.to(dtype)).sum() + weighted, parameters)
        found.append([tensor.double() for tensor in (errors, gradient, second)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 4e-6 * b.abs().max()


def plain_errors(coordinates, rows, targets, weights, sizes, output_sine):
    squares = (plain_values(coordinates, rows, sizes, output_sine) - targets).square().mean(dim=2)
    return (squares * weights.repeat(len(rows) // len(weights), 1)).sum(dim=1)


@compiled
def test_sine_is_accurate_far_from_zero() -> None:
    x = torch.cat([torch.linspace(-30, 30, 20_001), torch.linspace(-1e4, 1e4, 20_001), torch.tensor([0.0, 1e-20])])
    identity = torch.tensor([[1.0, 0.0]])
    values = field_values(x.view(1, -1, 1), identity, (1, 1), True).flatten()
    assert (values - torch.sin(x.double())).abs().max() < 3e-7


@compiled
def test_a_field_does_not_depend_on_the_others(case: tuple) -> None:
    sizes, output_sine, coordinates, rows = case
    together = field_values(coordinates, rows, sizes, output_sine)
    for index in range(len(rows)):
        own = coordinates[index % len(coordinates)][None]
        assert torch.equal(field_values(own, rows[index : index + 1], sizes, output_sine)[0], together[index])


@compiled
def test_not_a_number_is_passed_on() -> None:
    rows = random_rows(2, (2, 16, 3))
    rows[1, 0] = float("nan")
    values = field_values(torch.rand(1, 20, 2), rows, (2, 16, 3), False)
    assert values[0].isfinite().all()
    assert values[1].isnan().all()


@compiled
def test_operator_keeps_the_contract_of_pytorch() -> None:
    sizes = [2, 16, 16, 3]
    rows = random_rows(2, tuple(sizes)).requires_grad_()
    torch.library.opcheck(torch.ops.mnif.field_values, (torch.rand(1, 9, 2), rows, sizes, True))


@compiled
def test_what_calls_the_operator_is_one_graph() -> None:
    """Whether it is at hand is asked once, and not traced."""
    sizes, coordinates = [2, 16, 3], torch.rand(1, 9, 2)
    rows = random_rows(2, (2, 16, 3)).requires_grad_()

    def loss(rows: torch.Tensor) -> torch.Tensor:
        assert field_op.can_evaluate(sizes, coordinates, rows)
        assert isinstance(field_op._has_kernel(*sizes), bool)
        return field_values(coordinates, rows, sizes, False).square().mean()

    assert torch.equal(torch.compile(loss, backend="eager", fullgraph=True)(rows), loss(rows))


def test_plain_pytorch_serves_where_there_is_no_compiler() -> None:
    program = (
        "import torch; from mnif.models.field_op import is_compiled;"
        "from mnif.models.siren import BakedField, layer_shapes;"
        "assert not is_compiled();"
        "rows = torch.zeros(2, 7, requires_grad=True);"
        "BakedField(layer_shapes(2, 2, 1, 0), rows)(torch.zeros(1, 5, 2)).sum().backward();"
        "print(rows.grad.shape)"
    )
    for environment in ({"MNIF_NATIVE": "0"}, {"CXX": "no-such-compiler"}):
        environment = {"PATH": "/usr/bin:/bin", **environment}
        found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
        assert found.stdout.strip() == "torch.Size([2, 7])", found.stderr


def test_failing_compiler_is_told_and_not_fatal(tmp_path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho 'fatal: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    field_op._library.cache_clear()
    try:
        assert not field_op.is_compiled()
        assert "no such header" in caplog.text
        assert not list((tmp_path / "cache").glob("*"))
    finally:
        field_op._library.cache_clear()
