"""The ONNX graphs of a model: their nodes, their exact answers, and what lower precision costs them."""

from typing import Literal

Precision = Literal["fp32", "mixed"]
"""Of the products of a graph (:mod:`export.graphs.precision`)."""

Storage = Literal["fp32", "fp16", "int8"]
"""Of a graph's large matrices."""
