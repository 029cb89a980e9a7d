"""What runs a graph: TensorRT, ONNX Runtime or OpenVINO, the best that is there, and why the better ones are not.

This file stands by itself (Python 3.8, NumPy and one of the three) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from export.bundle_folder import BundleError, BundleFolder
from export.cuda import CudaError
from export.openvino_graph import OpenVinoGraph
from export.plans import PlanRefused

LOGGER = logging.getLogger("mnif.runtime")
BACKENDS = ("tensorrt", "onnxruntime", "openvino")  # the best first


class BackendMissing(BundleError):  # noqa: N818
    """A backend that cannot be had on this machine."""


class OnnxRuntimeGraph:
    """A graph in ONNX Runtime on the CPU. Its CPU kernels compute a mixed graph in float32: casts are removed.

    Args:
        model: the graph's file.
        threads: within an operator; 0 lets ONNX Runtime choose.

    Raises:
        ImportError: ONNX Runtime is not installed.
        BundleError: it cannot read the graph.
    """

    name = "onnxruntime"

    def __init__(self, model: bytes, threads: int = 0):
        import onnxruntime

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
        """The outputs in the graph's order."""
        return self._session.run(None, arrays)


def load_graph(folder: BundleFolder, name: str, backend: str = "auto", threads: int = 0) -> Any:
    """A graph of a bundle ready to run, a function from inputs by name to the outputs in order.

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
        from export.tensorrt_graph import load_tensorrt_graph

        return load_tensorrt_graph(folder, name)
    kind = {"onnxruntime": OnnxRuntimeGraph, "openvino": OpenVinoGraph}.get(backend)
    if kind is None:
        raise BundleError(f"no backend {backend}; there are {', '.join(BACKENDS)}")
    model = folder.onnx(name)
    try:
        return kind(model, threads)
    except ImportError:
        raise BackendMissing(f"{backend} is not installed") from None
    except BundleError as error:
        raise BundleError(f"{folder.path / folder.graph(name)['file']}: {error}") from None
