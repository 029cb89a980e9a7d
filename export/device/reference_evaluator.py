"""Graphs evaluated in the very types they name, by the ONNX reference evaluator.

ONNX Runtime on a CPU takes float16 casts out of a graph, so it cannot show what half precision costs; this can. It
needs the package onnx, and NumPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class DequantizeLinear(OpRun):
    """Multiplies int8 by scales along an axis, without a zero point; the evaluator lacks it below opset 19."""

    op_domain = ""

    def _run(self, integers: Any, scale: Any, axis: Any = None, **later: Any) -> tuple:
        return (
            integers.astype(np.float32) * scale.reshape([-1 if each == axis else 1 for each in range(integers.ndim)]),
        )


class MatMul(OpRun):
    """Multiplies with float32 sums, rounded to the inputs' type at the end; NumPy's own is the same but slower."""

    op_domain = ""

    def _run(self, left: Any, right: Any, **later: Any) -> tuple:
        return (_product(left, right),)


class Gemm(OpRun):
    """Computes alpha · (left @ right) + beta · bias in the same way."""

    op_domain = ""

    def _run(self, left: Any, right: Any, bias: Any = None, **attributes: Any) -> tuple:
        left = left.T if attributes.get("transA") else left
        right = right.T if attributes.get("transB") else right
        value = _product(left, right) * left.dtype.type(attributes.get("alpha", 1.0))
        return (value if bias is None else value + bias * left.dtype.type(attributes.get("beta", 1.0)),)


def evaluate(model: onnx.ModelProto, inputs: dict) -> dict:
    """Evaluates a graph and returns its outputs by name."""
    names = [output.name for output in model.graph.output]
    evaluator = ReferenceEvaluator(model, new_ops=[DequantizeLinear, MatMul, Gemm])
    return dict(zip(names, evaluator.run(None, dict(inputs))))


def _product(left: Any, right: Any) -> Any:
    return np.matmul(left.astype(np.float32), right.astype(np.float32)).astype(left.dtype)
