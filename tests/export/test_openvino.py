"""OpenVINO with sines of our own."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.device.backends import OpenVinoGraph, sine_coefficients
from export.device.bundle import BundleError
from export.graphs.precision import quantize_matrix, quantize_weights

pytest.importorskip("openvino")


def sines() -> bytes:
    """x [rows, columns] → sin(x)."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", "columns"]) for name in ("x", "y")]
    made = helper.make_graph([helper.make_node("Sin", ["x"], ["y"])], "g", ends[:1], ends[1:])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def test_sines_of_any_argument() -> None:
    graph = OpenVinoGraph(sines())
    for reach in (0.1, 4.0, 40.0, 1000.0):
        x = np.linspace(-reach, reach, 20001, dtype=np.float32).reshape(3, -1)
        (y,) = graph({"x": x})
        argument_bit = 1.2e-7 * reach
        np.testing.assert_allclose(y, np.sin(x.astype(np.float64)), atol=6e-7 + argument_bit)


def test_shapes_may_change_from_call_to_call() -> None:
    graph = OpenVinoGraph(sines(), threads=1)
    for rows in (*range(1, 12), 1):
        x = np.random.default_rng(rows).standard_normal((rows, 5)).astype(np.float32)
        first = graph({"x": x})[0]
        graph({"x": x + 1})
        np.testing.assert_allclose(first, np.sin(x), atol=1e-6)  # an answer is the caller's own


def test_the_polynomial_is_a_sine() -> None:
    turns = np.linspace(-0.5, 0.5, 10001)
    c = sine_coefficients(6)
    assert np.abs(sum(c[k] * turns ** (2 * k + 1) for k in range(6)) - np.sin(2 * np.pi * turns)).max() < 1e-7


@pytest.mark.parametrize("columns", [1, 3, 5, 16, 24])
def test_sines_of_short_rows(columns: int) -> None:
    """Whole vectors lie across rows where there are enough of them."""
    for rows in (1, 16, 32, 33):
        x = np.random.default_rng(columns).standard_normal((rows, columns)).astype(np.float32)
        (y,) = OpenVinoGraph(sines(), threads=1)({"x": x})
        np.testing.assert_allclose(y, np.sin(x), atol=6e-7)


def test_what_is_no_graph_is_one_line() -> None:
    with pytest.raises(BundleError, match="not a usable graph") as refusal:
        OpenVinoGraph(sines()[:-20])
    assert "\n" not in str(refusal.value)


def test_matrices_in_int8_do_not_round_what_they_multiply() -> None:
    generator = np.random.default_rng(0)
    matrix, x = (generator.standard_normal(shape).astype(np.float32) for shape in ((256, 128), (1, 128)))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
        for name, size in (("x", 128), ("y", 256))
    ]
    weight = numpy_helper.from_array(matrix, "denoiser.blocks.0.weight")
    product = helper.make_node("Gemm", ["x", weight.name], ["y"], transB=1)
    made = helper.make_graph([product], "g", ends[:1], ends[1:], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    integers, scale = quantize_matrix(matrix)
    (y,) = OpenVinoGraph(quantize_weights(model, "int8").SerializeToString())({"x": x})
    np.testing.assert_allclose(y, x @ (integers * scale[:, None]).T, atol=1e-4)
