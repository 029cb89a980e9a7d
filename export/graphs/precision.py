"""Where a graph multiplies in half precision, how it stores its large matrices, and what either costs.

- **fp32**: everything in float32 (on a GPU with TF32 off).
- **mixed**: the hidden products in float16, put between Cast nodes; the first layer, biases, every sine, and the
  products that mix the bases stay in float32. The first layer decides: its argument is multiplied by w0, so half
  precision there is a phase error of every sine that follows.

The large matrices (denoiser, encoder, coefficient map, bases) can be stored in fewer bits than they are computed in:

- **fp16**: float16 numbers and a Cast.
- **int8**: one scale per output channel and DequantizeLinear, for the hidden layers of denoiser and encoder and for
  the coefficient map; what reads and writes latents stays in float16, which is worth 6 dB and more. Fields are not
  stored so: a SIREN of 55 dB comes down to 45.

What either costs is measured by :mod:`export.device.reference_evaluator`, which counts in the types a graph names.
ONNX Runtime on a CPU takes float16 casts out and would show no loss at all.
"""

import re

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.graphs import Precision, Storage

# For the manifest: the type of each part of a graph.
PARTS: dict[Precision, dict[str, str]] = {
    "fp32": {"products": "float32", "first_layer": "float32", "biases": "float32", "sines": "float32"},
    "mixed": {"products": "float16", "first_layer": "float32", "biases": "float32", "sines": "float32"},
}

_HIDDEN = re.compile(r"layer_[1-9]\d*/product|step_\d+/.+|encoder/(?!read$).+")

_LARGE = 4096  # numbers; smaller matrices are not worth a node

# What int8 holds; all else is float16 then.
_INT8_WEIGHTS = re.compile(
    r"denoiser\.blocks\.|decoder\.(later\.\d+\.)?coefficient_map\.|encoder\.(blocks\.|mix_in\.|mix_residual\.)"
)


def hidden_products(model: onnx.ModelProto) -> list[str]:
    """Names the products that *mixed* takes in float16: hidden layers of fields and encoder, and the denoiser's."""
    return [
        node.name for node in model.graph.node if node.op_type in ("MatMul", "Gemm") and _HIDDEN.fullmatch(node.name)
    ]


def convert(model: onnx.ModelProto, precision: Precision, storage: Storage) -> onnx.ModelProto:
    """Converts a float32 graph to another precision, its large matrices to another storage."""
    if precision == "fp32":
        return quantize_weights(model, storage)
    if storage == "int8":  # it goes first, as it narrows constants further than mixed precision does
        return to_mixed_precision(quantize_weights(model, storage))
    return quantize_weights(to_mixed_precision(model), storage)  # constants in float16 already need no widening


def to_mixed_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copies a float32 graph with its hidden products in float16.

    Constants that only such products read are stored in float16; it loses nothing more.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    half = set(hidden_products(model))
    readers: dict[str, set[bool]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            readers.setdefault(name, set()).add(node.name in half and place < 2)
    constants = {tensor.name: tensor for tensor in result.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    halves: dict[str, str] = {}

    def in_half(name: str) -> str:
        if name not in halves:
            if name in constants and readers[name] == {True}:
                halves[name] = name
                _replace(constants[name], numpy_helper.to_array(constants[name]).astype(np.float16))
            else:
                halves[name] = f"{name}/float16"
                nodes.append(_cast_node(name, halves[name], TensorProto.FLOAT16))
        return halves[name]

    for node in model.graph.node:
        if node.name not in half:
            nodes.append(node)
            continue
        output, raw = node.output[0], f"{node.output[0]}/product_float16"
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.input[:] = [in_half(name) for name in node.input[:2]]
        product.output[:] = [raw]
        bias = node.input[2] if len(node.input) > 2 else None
        nodes.append(product)
        nodes.append(_cast_node(raw, output if bias is None else f"{output}/product", TensorProto.FLOAT))
        if bias is not None:
            nodes.append(helper.make_node("Add", [f"{output}/product", bias], [output], name=f"{output}/biased"))
    _set_nodes(result, nodes)
    return result


def quantize_weights(model: onnx.ModelProto, storage: Storage) -> onnx.ModelProto:
    """Copies a float32 graph with its large matrices kept in fewer bits, each widened by a node of its own.

    The first layer's bases are left as they are.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    if storage == "fp32":
        return result
    first = {name for node in model.graph.node if node.name.startswith("layer_0/") for name in node.input}
    widened: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for tensor in list(result.graph.initializer):
        array = numpy_helper.to_array(tensor)
        name = tensor.name
        if array.dtype != np.float32 or array.ndim != 2 or array.size < _LARGE or name in first:
            continue
        widened[name] = f"{name}/float32"
        if storage == "int8" and _INT8_WEIGHTS.match(name):
            integers, scale = quantize_matrix(array)
            _replace(tensor, integers)
            result.graph.initializer.append(numpy_helper.from_array(scale, f"{name}/scale"))
            inputs = [name, f"{name}/scale"]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [widened[name]], name=widened[name], axis=0))
        else:
            _replace(tensor, array.astype(np.float16))
            nodes.append(_cast_node(name, widened[name], TensorProto.FLOAT))
    for node in result.graph.node:
        node.input[:] = [widened.get(name, name) for name in node.input]
    _set_nodes(result, [*nodes, *result.graph.node])
    return result


def quantize_matrix(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix [out, in] to int8 with scales [out] float32: matrix ≈ int8 · scale, row by row."""
    scale = np.maximum(np.abs(matrix).max(axis=1), 1e-12).astype(np.float32) / np.float32(127)
    return np.clip(np.round(matrix / scale[:, None]), -127, 127).astype(np.int8), scale


def _cast_node(source: str, output: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [output], name=f"{source}/cast", to=kind)


def _replace(tensor: TensorProto, array: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def _set_nodes(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> None:
    del model.graph.node[:]
    model.graph.node.extend(nodes)
