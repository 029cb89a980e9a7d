"""A graph in whatever is here: TensorRT, ONNX Runtime or OpenVINO.

In OpenVINO, sines are polynomials and each shape has a compilation of its own: OpenVINO calls the C library for every
sine, and that is where a field's time goes. Written as multiplications and additions, and with sizes known, it makes
one vectorised loop of them.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from typing import Any

import numpy as np

from .bundle import BackendMissing, BundleError, BundleFolder, import_backend
from .cuda import CudaError
from .plans import PlanRefused

_TERMS = 6  # t, t³, ... t¹¹: within 1e-7 of the sine

_LANES = 16  # the widest vectors' float32 numbers

_KEPT = 8  # compiled shapes


class OpenVinoGraph:
    """A graph, computed in float32 even where it is mixed.

    Args:
        model: the graph's file.
        threads: 0 lets OpenVINO choose.

    Raises:
        BackendMissing: OpenVINO is not installed, or cannot be imported.
        BundleError: it cannot read the graph.
    """

    name = "openvino"

    def __init__(self, model: bytes, threads: int = 0):
        openvino = import_backend("openvino")
        self.version = str(openvino.__version__).partition("-")[0]
        self._settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            # Where matrices are stored in int8, OpenVINO would round what they are multiplied by to int8 too.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
        if threads:
            self._settings["INFERENCE_NUM_THREADS"] = str(threads)
        try:
            self._core = openvino.Core()
        except Exception as error:  # such as a plugin that is missing
            raise BackendMissing(f"openvino cannot start: {' '.join(str(error).split())}") from None
        try:
            self._model = self._core.read_model(model)
        except RuntimeError as error:
            raise BundleError(f"not a usable graph ({str(error).strip().splitlines()[-1]})") from None
        self._requests: OrderedDict[tuple, Any] = OrderedDict()

    def __call__(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Runs the graph and returns its outputs in order."""
        request = self._request({name: list(array.shape) for name, array in arrays.items()})
        request.infer(arrays, share_inputs=True, share_outputs=True)
        return [request.get_output_tensor(index).data.copy() for index in range(len(self._model.outputs))]

    def _request(self, shapes: dict[str, list[int]]) -> Any:
        key = tuple((name, *shape) for name, shape in sorted(shapes.items()))
        if key not in self._requests:
            model = self._model.clone()
            model.reshape(shapes)
            replace_sines(model)
            if len(self._requests) == _KEPT:
                self._requests.popitem(last=False)
            self._requests[key] = self._core.compile_model(model, "CPU", self._settings).create_infer_request()
        self._requests.move_to_end(key)
        return self._requests[key]


def replace_sines(model: Any) -> None:
    """Writes every sine of an OpenVINO model, its shapes known, as a polynomial of the turn its argument is in.

    Counting in turns costs the argument what float32 had cost it already, 6e-8 of its size. OpenVINO's vectors go
    along the last axis; where that is shorter, as the channels of values are, the argument is read as rows of whole
    vectors.
    """
    from openvino import opset13 as operators

    def number(value: float) -> Any:
        return operators.constant(np.float32(value))

    def in_shape(values: Any, shape: list[int]) -> Any:
        return operators.reshape(values, operators.constant(np.array(shape)), special_zero=False).output(0)

    coefficients = sine_coefficients(_TERMS)
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Sin":
            continue
        argument = node.input_value(0)
        shape = list(argument.get_shape())
        rows, beyond = divmod(math.prod(shape), _LANES)
        is_short = rows > 0 and beyond == 0 and shape[-1] < _LANES
        if is_short:
            argument = in_shape(argument, [rows, _LANES])
        turns = operators.multiply(argument, number(0.5 / math.pi))
        rest = operators.subtract(turns, operators.round(turns, "half_to_even"))
        square = operators.multiply(rest, rest)
        sum_of_powers = number(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            sum_of_powers = operators.add(operators.multiply(sum_of_powers, square), number(coefficient))
        sine = operators.multiply(sum_of_powers, rest).output(0)
        if is_short:
            sine = in_shape(sine, shape)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(sine)
    model.validate_nodes_and_infer_types()


def sine_coefficients(terms: int) -> np.ndarray:
    """c of sin 2πt ≈ c[0] t + c[1] t³ + ... on [-½, ½], by least squares at Chebyshev's nodes."""
    nodes = np.cos(np.linspace(0, np.pi / 2, 400)[:-1])
    odd = np.arange(1, 2 * terms, 2)
    scaled, *_ = np.linalg.lstsq(nodes[:, None] ** odd, np.sin(np.pi * nodes), rcond=None)
    return scaled * 2.0**odd


LOGGER = logging.getLogger("mnif.runtime")

BACKENDS = ("tensorrt", "onnxruntime", "openvino")  # the best first


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime on the CPU. Its CPU kernels compute a mixed graph in float32: casts are removed.

    Args:
        model: the graph's file.
        threads: within an operator; 0 lets ONNX Runtime choose.

    Raises:
        BackendMissing: ONNX Runtime is not installed, or cannot be imported.
        BundleError: it cannot read the graph.
    """

    name = "onnxruntime"

    def __init__(self, model: bytes, threads: int = 0):
        onnxruntime = import_backend("onnxruntime")
        self.version = str(onnxruntime.__version__)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's errors have no common class
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BundleError(f"not a usable graph ({reason})") from None

    def __call__(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Runs the graph and returns its outputs in order."""
        return self._session.run(None, arrays)


def load_graph(folder: BundleFolder, name: str, backend: str = "auto", threads: int = 0) -> Any:
    """Loads a graph of a bundle: a function from inputs by name to the outputs in order.

    Args:
        folder: the bundle.
        name: of the graph.
        backend: one of :data:`BACKENDS`; ``"auto"`` takes the first that works and logs why the ones before do not.
        threads: on the CPU; 0 lets the backend choose.

    Raises:
        BundleError: the graph or the plan is unusable, or no backend is there.
    """
    reasons: list[str] = []
    for each in BACKENDS if backend == "auto" else (backend,):
        try:
            graph = _load(folder, name, each, threads)
        except (BackendMissing, CudaError, PlanRefused) as reason:
            if backend != "auto":
                raise
            reasons.append(f"not {each}: {reason}")
            continue
        if backend == "auto":
            why = f" ({'; '.join(reasons)})" if reasons else ""
            LOGGER.info("%s runs in %s %s%s", name, graph.name, graph.version, why)
        return graph
    raise BackendMissing(f"nothing here can run {name}: {'; '.join(reasons)}")


def _load(folder: BundleFolder, name: str, backend: str, threads: int) -> Any:
    if backend == "tensorrt":
        from .tensorrt_graph import load_tensorrt_graph

        return load_tensorrt_graph(folder, name)
    kind = {"onnxruntime": OnnxRuntimeGraph, "openvino": OpenVinoGraph}.get(backend)
    if kind is None:
        raise BundleError(f"no backend {backend}; there are {', '.join(BACKENDS)}")
    model = folder.onnx(name)
    try:
        return kind(model, threads)
    except BackendMissing:
        raise
    except BundleError as error:
        raise BundleError(f"{folder.path / folder.graph(name)['file']}: {error}") from None
