"""An ONNX file, looked at without onnx: whether it is a graph that exports write, before any engine sees it.

The numbers are those of the fields in ``onnx.proto``. What a graph says of itself (descriptions, metadata, the shapes
of what lies between) is passed over.
"""

from __future__ import annotations

import math
import struct
from typing import Any

# What exports are made of: nothing here loops, calls another graph, or makes a tensor of a size that is data.
_OPERATOR_NAMES = (
    "Abs Add Cast Clip Concat DequantizeLinear Div Erf Exp Gather Gemm Greater Less MatMul Max Min Mul Neg ReduceMax "
    "ReduceMean ReduceMin ReduceSum Reshape Sigmoid Sin Softmax Softplus Split Sqrt Squeeze Sub TopK Transpose "
    "Unsqueeze Where"
)
_OPERATORS = frozenset(_OPERATOR_NAMES.split())
_ITEM_BYTES = {1: 4, 2: 1, 3: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8}  # of ONNX's types, by their numbers


def check_graph_file(content: bytes, graph: dict) -> None:
    """Looks at an ONNX file without building anything of it.

    Args:
        content: the file.
        graph: what the manifest says of it.

    Raises:
        ValueError: it is damaged, has other inputs, outputs or operators than exports have, operators within
            operators, weights elsewhere, or a weight whose size is not that of its numbers.
        IndexError, struct.error: it ends too early.
    """
    model = _fields(memoryview(content))
    if 25 in model or 20 in model or len(model.get(7, [])) != 1:
        raise ValueError("it holds functions, or not one graph")
    opsets = [(bytes(each.get(1, [b""])[0]), each.get(2)) for each in map(_fields, model.get(8, []))]
    if opsets != [(b"", [graph["opset"]])]:
        raise ValueError(f"its operators are not those of opset {graph['opset']}")
    parts = _fields(model[7][0])
    if 15 in parts:
        raise ValueError("it holds sparse weights")
    weights = set()
    for weight in map(_fields, parts.get(5, [])):
        weights.add(bytes(weight.get(8, [b""])[0]).decode())
        _check_weight(weight)
    for number, side in ((11, "inputs"), (12, "outputs")):
        names = [bytes(_fields(each)[1][0]).decode() for each in parts.get(number, [])]
        if [name for name in names if name not in weights] != [each["name"] for each in graph[side]]:
            raise ValueError(f"its {side} are {', '.join(names)[:80]}")
    for node in map(_fields, parts.get(1, [])):
        operator = bytes(node.get(4, [b""])[0]).decode()
        if operator not in _OPERATORS or any(bytes(each) for each in node.get(7, [])):
            raise ValueError(f"no export has the operator {operator[:40]!r}")
        if any({5, 6, 10, 11, 22, 23} & _fields(each).keys() for each in node.get(5, [])):
            raise ValueError(f"a {operator} holds a graph or a tensor")


def _check_weight(weight: dict) -> None:
    dims = [size for each in weight.get(1, []) for size in ([each] if isinstance(each, int) else _varints(each))]
    item = _ITEM_BYTES.get(weight.get(2, [0])[0])
    numbers = sum(len(each) for each in weight.get(9, []))
    if item is None or 13 in weight or weight.get(14, [0]) != [0] or math.prod(dims) * item != numbers:
        raise ValueError(f"a weight {dims} of {numbers} bytes")


def _fields(content: Any) -> dict[int, list]:
    """Reads the fields of a protocol-buffer message: their values by number, bytes as views."""
    fields: dict[int, list] = {}
    at = 0
    while at < len(content):
        tag, at = _varint(content, at)
        kind = tag & 7
        value: Any
        if kind == 0:
            value, at = _varint(content, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            (value,) = struct.unpack("<Q" if kind == 1 else "<I", content[at : at + size])
            at += size
        elif kind == 2:
            length, at = _varint(content, at)
            if at + length > len(content):
                raise ValueError("it ends too early")
            value = content[at : at + length]
            at += length
        else:
            raise ValueError("it is damaged")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _varint(content: Any, at: int) -> tuple[int, int]:
    number = 0
    for shift in range(0, 70, 7):
        number |= (content[at] & 127) << shift
        at += 1
        if content[at - 1] < 128:
            return number, at
    raise ValueError("it is damaged")


def _varints(content: Any) -> list[int]:
    numbers, at = [], 0
    while at < len(content):
        number, at = _varint(content, at)
        numbers.append(number)
    return numbers
