"""A TensorRT engine with everything that makes a tiny one fast: it is launch-bound, so nothing is done twice.

One execution context per optimisation profile lives as long as the graph; buffers on both sides are made once, the
host's pinned; copies and kernels are captured in one CUDA graph per shape and started with one call. A profile of
one shape keeps its graph for good; the profile for all shapes captures anew when the shape changes.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any, Dict, Sequence, Tuple

import numpy as np

from .bundle import ENGINES, BundleError, BundleFolder
from .cuda import Buffer, Cuda, CudaError
from .plans import PlanRefused, environment, read_plan, read_sidecar
from .tensorrt import builder_logger, find_builder

LOGGER = logging.getLogger("mnif.runtime")

Shapes = Dict[str, Tuple[int, ...]]


class TensorRTGraph:
    """An engine ready to run.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        cuda: the driver.
        plan: a plan that may be run (:func:`export.device.plans.read_plan`).
        inputs, outputs: names, in the graph's order.
        use_cuda_graph: whether work is captured; without, kernels are started one by one.

    Attributes:
        device_milliseconds: between the first copy and the last of the latest call, on the device's clock.

    Raises:
        BundleError: TensorRT refuses the plan.
    """

    name = "tensorrt"

    def __init__(
        self,
        module: Any,
        cuda: Cuda,
        plan: bytes,
        inputs: Sequence[str],
        outputs: Sequence[str],
        use_cuda_graph: bool = True,
    ):
        self.version = str(module.__version__)
        self._cuda, self._inputs, self._outputs, self.use_cuda_graph = cuda, inputs, outputs, use_cuda_graph
        logger = builder_logger(module)
        logger.complaints.clear()
        self._runtime = module.Runtime(logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            reason = logger.complaints[0] if logger.complaints else "it gives no reason"
            raise BundleError(f"TensorRT {self.version} refuses the plan: {reason}")
        self._stream = cuda.stream()
        self._start, self._end = cuda.event(), cuda.event()
        self._contexts: dict[int, _ProfileContext] = {}
        self.device_milliseconds = 0.0

    def __call__(self, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Runs the engine and returns the outputs in the graph's order."""
        shapes = {name: tuple(arrays[name].shape) for name in self._inputs}
        context = self._context_for(shapes)
        for name in self._inputs:
            context.buffers[name].pinned[: arrays[name].size] = arrays[name].ravel()
        self._cuda.record(self._start, self._stream)
        if self.use_cuda_graph and context.graph is not None:
            self._cuda.launch(context.graph, self._stream)
        else:
            context.enqueue(self._stream)
        self._cuda.record(self._end, self._stream)
        self._cuda.wait(self._stream)
        self.device_milliseconds = self._cuda.milliseconds(self._start, self._end)
        return [context.output(name) for name in self._outputs]

    def _context_for(self, shapes: Shapes) -> _ProfileContext:
        """Returns the context of the tightest profile that takes the shapes, ready for them."""
        index = self._profile(shapes)
        if index not in self._contexts:
            self._contexts[index] = _ProfileContext(
                self._engine, self._cuda, index, self._inputs, self._outputs, self._stream
            )
        context = self._contexts[index]
        if context.shapes != shapes:
            context.set_shapes(shapes, self._stream)
            if self.use_cuda_graph:
                context.capture(self._stream)
        return context

    def _profile(self, shapes: Shapes) -> int:
        candidates = []
        for index in range(self._engine.num_optimization_profiles):
            room = 0
            for name, shape in shapes.items():
                least, _, most = (tuple(each) for each in self._engine.get_tensor_profile_shape(name, index))
                if any(not low <= size <= high for low, size, high in zip(least, shape, most)):
                    break
                room += prod(most) - prod(least)
            else:
                candidates.append((room, index))
        if not candidates:
            wish = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise BundleError(f"no profile of the plan takes {wish}; build it with such --batch_sizes")
        return min(candidates)[1]


class _ProfileContext:
    """The execution context of one profile, with its buffers and the work for its present shapes."""

    def __init__(
        self, engine: Any, cuda: Cuda, profile: int, inputs: Sequence[str], outputs: Sequence[str], stream: int
    ):
        self._cuda, self._inputs, self._outputs = cuda, inputs, outputs
        self.context = engine.create_execution_context()
        if self.context is None:
            raise BundleError("TensorRT cannot make an execution context: is the device's memory full?")
        self.context.set_optimization_profile_async(profile, stream)
        cuda.wait(stream)
        self.shapes: Shapes | None = None
        self.graph: int | None = None
        self.buffers: dict[str, Buffer] = {}
        self._sizes: dict[str, tuple[int, ...]] = {}

    def set_shapes(self, shapes: Shapes, stream: int) -> None:
        """Prepares for inputs of these shapes; the first call of new shapes is made here, out of the way."""
        self.shapes = None
        if self.graph is not None:
            self._cuda.forget(self.graph)
            self.graph = None
        for name, shape in shapes.items():
            if not self.context.set_input_shape(name, shape):
                raise BundleError(f"TensorRT refuses {name} {list(shape)}")
        for name in (*self._inputs, *self._outputs):
            self._sizes[name] = tuple(self.context.get_tensor_shape(name))
            self._make_room(name, prod(self._sizes[name]))
            self.context.set_tensor_address(name, self.buffers[name].device)
        self.enqueue(stream)  # lazy work of TensorRT must not fall into the capture
        self._cuda.wait(stream)
        self.shapes = dict(shapes)

    def capture(self, stream: int) -> None:
        """Turns the work into one CUDA graph; an engine that cannot be captured runs without."""
        self._cuda.begin_capture(stream)
        try:
            self.enqueue(stream)
        finally:
            try:
                self.graph = self._cuda.end_capture(stream)
            except CudaError as reason:
                LOGGER.warning("no CUDA graph: %s; kernels are started one by one", reason)

    def enqueue(self, stream: int) -> None:
        """Queues the copies of inputs to the device, the engine, and the copies of outputs to the host."""
        for name in self._inputs:
            self._cuda.to_device(self.buffers[name], prod(self._sizes[name]), stream)
        if not self.context.execute_async_v3(stream):
            raise BundleError("TensorRT could not start the engine")
        for name in self._outputs:
            self._cuda.to_host(self.buffers[name], prod(self._sizes[name]), stream)

    def output(self, name: str) -> np.ndarray:
        """Copies an output of the latest work."""
        size = self._sizes[name]
        return self.buffers[name].pinned[: prod(size)].reshape(size).copy()

    def _make_room(self, name: str, count: int) -> None:
        if name in self.buffers and len(self.buffers[name].pinned) >= count:
            return
        if name in self.buffers:
            self._cuda.release(self.buffers.pop(name))
        self.buffers[name] = self._cuda.buffer(count)


def load_tensorrt_graph(folder: BundleFolder, name: str, use_cuda_graph: bool = True) -> TensorRTGraph:
    """Loads the engine of a graph, from a plan that was built here from what is here.

    Raises:
        CudaError: there is no GPU.
        PlanRefused: the plan is missing, foreign, stale or changed; TensorRT has not seen it.
        BackendMissing: TensorRT is not here, or cannot be imported.
        BundleError: TensorRT refuses it.
    """
    cuda = Cuda()
    gpu = cuda.gpu()
    path = folder.path / ENGINES / f"{name}.plan"
    sidecar = read_sidecar(path)
    module = find_builder(sidecar["facts"]["builder"])
    if gpu.compute_capability not in sidecar["facts"]["compute_capabilities"]:
        targets = ", ".join(sidecar["facts"]["compute_capabilities"])
        raise PlanRefused(path, f"it was built for compute capability {targets}, here it is {gpu.compute_capability}")
    plan = read_plan(path, {**environment(module, gpu), "onnx_sha256": folder.onnx_sha256(name)})
    inputs, outputs = ([each["name"] for each in folder.graph(name)[side]] for side in ("inputs", "outputs"))
    return TensorRTGraph(module, cuda, plan, inputs, outputs, use_cuda_graph)
