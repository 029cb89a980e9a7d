"""What every exported graph must be, and ONNX Runtime in one call."""

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
from onnx import helper

# All that graphs are made of; each is known to ONNX since opset 17 or before, and to TensorRT's parser since 8.5.
FIELDS = {"Add", "Concat", "Gather", "Gemm", "MatMul", "Mul", "Reshape", "Sin", "Split", "Sub", "Transpose"}
DENOISER = {"Div", "ReduceMean", "Sigmoid", "Softmax", "Sqrt"}
RENDERING = {
    "Abs",
    "Clip",
    "Div",
    "Exp",
    "Greater",
    "Less",
    "Max",
    "Min",
    "Neg",
    "ReduceMax",
    "ReduceMin",
    "ReduceSum",
}
RENDERING |= {"Softplus", "Squeeze", "Unsqueeze", "Where"}
ENCODER = {"Erf", "Max", "ReduceMax", "ReduceSum", "Softmax", "Unsqueeze"}
SPARSE = {"Abs", "Clip", "Div", "Max", "TopK"}
PRECISION = {"Cast", "DequantizeLinear"}


def check_output_type(model: onnx.ModelProto, operators: set[str] = FIELDS | DENOISER) -> None:
    """Opset 17, IR 8, weights inside, no operators but the given, no name twice, the checker content."""
    onnx.checker.check_model(model, full_check=True)
    assert model.ir_version == 8
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert not model.functions
    assert {node.op_type for node in model.graph.node} <= operators
    assert all(onnx.defs.get_schema(node.op_type, 17).since_version <= 17 for node in model.graph.node)
    for tensor in model.graph.initializer:
        assert not tensor.external_data
        assert tensor.data_location == onnx.TensorProto.DEFAULT
    labels = [node.name for node in model.graph.node]
    assert len(labels) == len(set(labels))
    names = [name for node in model.graph.node for name in node.output]
    names += [tensor.name for tensor in (*model.graph.initializer, *model.graph.input)]
    assert len(names) == len(set(names))
    for tensor in (*model.graph.input, *model.graph.output):
        assert helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type) == np.float32


def run(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """All outputs, by ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))
