"""Fields compiled by torch.compile: traced on the CPU and, in one slow test, compiled there."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

from mnif.models import field_op, field_torch
from mnif.models.siren import BakedField, LayerShape
from tests.mnif.test_field_op import plain_values, random_rows, with_gradients

FORMS = {"of several widths": ((2, 40, 24, 3), False), "wider than the kernels": ((3, 256, 1), True)}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are traced as ever, and run as they are."""
    monkeypatch.setattr(field_torch, "_BACKEND", "eager")
    monkeypatch.setattr(field_torch, "_failed", [])
    field_torch._compiled.cache_clear()
    counters.clear()
    yield
    field_torch._compiled.cache_clear()


def fields_of(form: str, fields: int, sets: int, points: int) -> tuple:
    sizes, output_sine = FORMS[form]
    torch.manual_seed(0)
    return sizes, output_sine, torch.rand(sets, points, sizes[0]) * 2 - 1, random_rows(fields, sizes)


def assert_all_near_float64(case: tuple, bound: float = 1e-5) -> None:
    ours = with_gradients(field_torch.compiled_values, case, torch.float32)
    for found, exact in zip(ours, with_gradients(plain_values, case, torch.float64), strict=True):
        assert (found - exact).abs().max() <= bound * exact.abs().max()


def test_values_and_both_gradients_equal_float64(traced: None) -> None:
    assert_all_near_float64(fields_of("wider than the kernels", 4, 2, 30))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # in what inductor imports
def test_what_the_compiler_makes_equals_float64(traced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(field_torch, "_BACKEND", "inductor")
    for fields, sets, points in ((6, 2, 30), (4, 1, 50)):
        case = fields_of("of several widths", fields, sets, points)
        assert_all_near_float64(case)
        sizes, output_sine, coordinates, rows = case
        rows.requires_grad_()
        compiled, plain = (
            torch.autograd.grad(function(coordinates, rows, sizes, output_sine).square().sum(), rows)[0]
            for function in (field_torch.compiled_values, plain_values)
        )
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
    assert not field_torch._failed


def test_graphs_are_few_whatever_the_numbers_of_fields_and_points(traced: None) -> None:
    numbers = [(form, *given) for form in FORMS for given in ((4, 1, 30), (6, 2, 31), (1, 1, 50), (32, 1, 64))]
    for form, fields, sets, points in numbers[:5]:
        sizes, output_sine, coordinates, rows = fields_of(form, fields, sets, points)
        values = field_torch.compiled_values(coordinates, rows.requires_grad_(), sizes, output_sine)
        torch.autograd.grad(values.square().sum(), rows)
        torch.testing.assert_close(values, plain_values(coordinates, rows, sizes, output_sine), atol=1e-5, rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 4 + 2  # one field and many, values and gradients; forms are apart


def test_a_gradient_has_the_precision_of_its_values(traced: None) -> None:
    """Accelerate has backward passes outside autocast, where half precision and float32 would meet."""
    sizes, output_sine, coordinates, rows = fields_of("of several widths", 4, 1, 30)
    gradients = []
    for function in (field_torch.compiled_values, field_torch.values):
        parameters = rows.bfloat16().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            values = function(coordinates, parameters, sizes, output_sine)
        assert values.dtype == torch.bfloat16
        gradients += torch.autograd.grad(values.float().square().sum(), parameters)
    torch.testing.assert_close(*gradients, atol=0.02, rtol=0.02)


def test_what_cannot_be_compiled_is_told_and_not_fatal(
    traced: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(field_torch, "_BACKEND", broken)
    sizes, output_sine, coordinates, rows = fields_of("of several widths", 2, 1, 9)
    for _ in range(2):
        found = field_torch.compiled_values(coordinates, rows, sizes, output_sine)
        assert torch.equal(found, plain_values(coordinates, rows, sizes, output_sine))
    (told,) = [record.message for record in caplog.records if record.name == field_torch.__name__]
    assert told.endswith("raised: RuntimeError: no compiler")


@pytest.mark.parametrize(
    ("width", "device", "native", "called"),
    [
        (256, "cuda", "1", "compiled"),
        (256, "cuda", "0", "plain"),
        (256, "cpu", "1", "plain"),
        (16, "cuda", "1", "operator"),
        (16, "cuda", "0", "plain"),
    ],
)
def test_which_form_evaluates_a_field(
    width: int, device: str, native: str, called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="without Triton nothing is compiled for a GPU")
    monkeypatch.setenv("MNIF_NATIVE", native)
    monkeypatch.setattr(field_op, "_library", lambda: None)
    field_op._kernels.cache_clear()
    ways = {"compiled": "compiled_values", "plain": "values", "operator": "field_values"}
    calls: list[str] = []
    for way, name in ways.items():
        monkeypatch.setattr(
            f"mnif.models.siren.{name}", lambda coordinates, *_, way=way: calls.append(way) or coordinates
        )
    with FakeTensorMode():
        field = BakedField([LayerShape(2, width), LayerShape(width, 2)], torch.empty(1, 5 * width + 2, device=device))
        field(torch.empty(1, 7, 2, device=device))
    assert calls == [called]
    field_op._kernels.cache_clear()
