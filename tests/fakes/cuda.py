"""A CUDA driver of host memory: the functions the runtime calls, with their C signatures, and nothing behind them.

Work put on a stream is done at once, or noted while the stream is captured, so that copies, engines and graphs can be
followed on a machine without a GPU. Every call is kept in ``calls``.
"""

import ctypes
from collections.abc import Callable
from typing import Any


class RecordedDriver:
    """Stands in for ``libcuda.so.1``.

    Args:
        name: of the GPU.
        capability: its compute capability.
        driver: such as 12060 for CUDA 12.6.
        captures: whether streams can be captured.
    """

    def __init__(
        self, name: str = "Orin", capability: tuple[int, int] = (8, 7), driver: int = 12060, captures: bool = True
    ):
        self.name, self.capability, self.driver, self.captures = name, capability, driver, captures
        self.calls: list[str] = []
        self.noted: list[Callable[[], object]] | None = None
        self.graphs: dict[int, list[Callable[[], object]]] = {}
        self.memory: dict[int, Any] = {}
        self.handles = 1000

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu"):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    def on_stream(self, stream: int, work: Callable[[], object]) -> None:
        """Does the work, or notes it."""
        if self.noted is not None:
            self.noted.append(work)
        else:
            work()

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuGetErrorString(self, status: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"operation not supported"
        return 0

    def cuDeviceGet(self, device: Any, ordinal: int) -> int:  # noqa: N802
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:  # noqa: N802
        return self._handle(context)

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = self.name.encode()
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self.driver
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:  # noqa: N802
        size._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:  # noqa: N802
        number._obj.value = self.capability[attribute - 75]
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = 7 << 30, 8 << 30
        return 0

    def cuMemAlloc_v2(self, pointer: Any, size: Any) -> int:  # noqa: N802
        room = ctypes.create_string_buffer(size.value)
        pointer._obj.value = ctypes.addressof(room)
        self.memory[pointer._obj.value] = room
        return 0

    def cuMemHostAlloc(self, pointer: Any, size: Any, flags: int) -> int:  # noqa: N802
        return self.cuMemAlloc_v2(pointer, size)

    def cuMemFree_v2(self, pointer: Any) -> int:  # noqa: N802
        del self.memory[pointer.value]
        return 0

    def cuMemFreeHost(self, pointer: Any) -> int:  # noqa: N802
        return self.cuMemFree_v2(pointer)

    def cuStreamCreate(self, stream: Any, flags: int) -> int:  # noqa: N802
        return self._handle(stream)

    def cuStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        return 901 if self.noted is not None else 0  # CUDA_ERROR_STREAM_CAPTURE_INVALIDATED

    def cuMemcpyHtoDAsync_v2(self, device: Any, host: Any, size: Any, stream: Any) -> int:  # noqa: N802
        to, source, count = device.value, host.value, size.value
        self.on_stream(stream.value, lambda: ctypes.memmove(to, source, count))
        return 0

    def cuMemcpyDtoHAsync_v2(self, host: Any, device: Any, size: Any, stream: Any) -> int:  # noqa: N802
        to, source, count = host.value, device.value, size.value
        self.on_stream(stream.value, lambda: ctypes.memmove(to, source, count))
        return 0

    def cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:  # noqa: N802
        self.noted = []
        return 0

    def cuStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        noted, self.noted = self.noted, None
        if not self.captures or noted is None:
            return 801  # CUDA_ERROR_NOT_SUPPORTED
        self._handle(graph)
        self.graphs[graph._obj.value] = noted
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        self._handle(executable)
        self.graphs[executable._obj.value] = self.graphs[graph.value]
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        self.graphs.pop(graph.value, None)
        return 0

    def cuGraphExecDestroy(self, graph: Any) -> int:  # noqa: N802
        del self.graphs[graph.value]
        return 0

    def cuGraphLaunch(self, graph: Any, stream: Any) -> int:  # noqa: N802
        for work in self.graphs[graph.value]:
            work()
        return 0

    def cuEventCreate(self, event: Any, flags: int) -> int:  # noqa: N802
        return self._handle(event)

    def cuEventRecord(self, event: Any, stream: Any) -> int:  # noqa: N802
        return 0

    def cuEventElapsedTime(self, milliseconds: Any, start: Any, end: Any) -> int:  # noqa: N802
        milliseconds._obj.value = 0.25
        return 0

    def _handle(self, place: Any) -> int:
        self.handles += 1
        place._obj.value = self.handles
        return 0
