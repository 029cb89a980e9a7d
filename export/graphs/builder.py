"""Building one ONNX graph: nodes and initialisers under names that stay the same from export to export."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from mnif import __version__

OPSET = 17  # the last one that TensorRT 8.6 (JetPack 6.0) parses

IR_VERSION = 8

Shape = Sequence[int | str]


class GraphBuilder:
    """The nodes and initialisers of a graph in the making; every method returns the name of the tensor it makes."""

    def __init__(self) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._initialisers: dict[str, TensorProto] = {}

    def constant(self, name: str, value: np.ndarray | Tensor) -> str:
        """Stores ``value`` under ``name``; asking again for a name gives the tensor that is there already."""
        if name not in self._initialisers:
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            self._initialisers[name] = numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def add(self, operator: str, inputs: list[str], output: str, **attributes: int | float | list[int]) -> str:
        """Adds a node with one output; the node bears the name of that output."""
        self._nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def reshape(self, tensor: str, shape: Sequence[int], output: str) -> str:
        """Reshapes; 0 keeps an axis and -1 stands for what is left."""
        return self.add("Reshape", [tensor, self._shape(f"{output}/shape", shape)], output)

    def split(self, tensor: str, sizes: Sequence[int], outputs: list[str]) -> list[str]:
        """Cuts the last axis into parts of the given sizes."""
        inputs = [tensor, self._shape(f"{outputs[0]}/split", sizes)]
        self._nodes.append(helper.make_node("Split", inputs, outputs, name=f"{outputs[0]}/cut", axis=-1))
        return outputs

    def largest(self, tensor: str, count: int, output: str) -> str:
        """The ``count`` largest numbers along the last axis, the largest first."""
        inputs, places = [tensor, self._shape(f"{output}/count", [count])], f"{output}/places"
        self._nodes.append(helper.make_node("TopK", inputs, [output, places], name=output, axis=-1))
        return output

    def linear(self, tensor: str, weight: str, bias: str | None, output: str, scale: float = 1.0) -> str:
        """(tensor @ weightᵀ + bias) · scale, with the weight [out, in] as torch keeps it; a bias may be missing."""
        if bias is None:
            return self.add("Gemm", [tensor, weight], output, transB=1, alpha=scale)
        return self.add("Gemm", [tensor, weight, bias], output, transB=1, alpha=scale, beta=scale)

    def weighted_sum(self, terms: list[tuple[str, float]], output: str) -> str:
        """The sum of the tensors, each times its number; there must be one term at least."""
        scaled = []
        for index, (tensor, weight) in enumerate(terms):
            factor = self.constant(f"{output}/weight_{index}", np.array([weight], dtype=np.float32))
            scaled.append(self.add("Mul", [tensor, factor], f"{output}/term_{index}"))
        total = scaled[0]
        for index, term in enumerate(scaled[1:], start=1):
            total = self.add("Add", [total, term], f"{output}/sum_{index}")
        return total

    def unsqueeze(self, tensor: str, axes: Sequence[int], output: str) -> str:
        """Puts axes of length one at the places ``axes`` of the result."""
        return self.add("Unsqueeze", [tensor, self._shape(f"{output}/axes", axes)], output)

    def squeeze(self, tensor: str, axes: Sequence[int], output: str) -> str:
        """Takes away axes of length one."""
        return self.add("Squeeze", [tensor, self._shape(f"{output}/axes", axes)], output)

    def reduce_sum(self, tensor: str, axis: int, output: str, keep: bool) -> str:
        """The sum over an axis, which stays with length one if it is to be kept."""
        return self.add("ReduceSum", [tensor, self._shape(f"{output}/axes", [axis])], output, keepdims=int(keep))

    def number(self, value: float) -> str:
        """A float32 number that broadcasts against any tensor."""
        return self.constant(f"number_{value:.9g}", np.array([value], dtype=np.float32))

    def scalar(self, value: float) -> str:
        """A float32 number without axes, as the limits of Clip must be."""
        return self.constant(f"scalar_{value:.9g}", np.array(value, dtype=np.float32))

    def model(
        self, name: str, sources: Mapping[str, Shape], results: Mapping[str, tuple[str, Shape]]
    ) -> onnx.ModelProto:
        """Closes the graph.

        Args:
            name: of the graph.
            sources: the inputs and their shapes, float32; a word in a shape is a dynamic axis.
            results: for each output what the nodes call it so far, and its shape, float32.

        Returns:
            The model, all weights inside, opset 17 and IR 8.
        """
        final = {tensor: output for output, (tensor, _) in results.items()}
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [final.get(each, each) for each in names]

        def described(shapes: Mapping[str, Shape]) -> list[onnx.ValueInfoProto]:
            return [helper.make_tensor_value_info(key, TensorProto.FLOAT, shape) for key, shape in shapes.items()]

        graph = helper.make_graph(
            self._nodes,
            name,
            described(sources),
            described({output: shape for output, (_, shape) in results.items()}),
            list(self._initialisers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="mnif",
            producer_version=__version__,
        )

    def _shape(self, name: str, sizes: Sequence[int]) -> str:
        return self.constant(name, np.array(sizes, dtype=np.int64))
