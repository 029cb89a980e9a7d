"""The little of CUDA a runtime needs, straight from the driver's library: buffers, a stream, graphs, events.

The driver (``libcuda.so.1``) is on every machine that can run an engine, JetPack or desktop, so nothing has to be
installed for it. Functions are those of the CUDA Driver API, 11.4 and later. Everything runs on device 0.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from .bundle import BundleError

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING

_CAPTURE_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class CudaError(BundleError):
    """The driver refused something."""


class Gpu(NamedTuple):
    """What the driver says of device 0.

    Attributes:
        name: as the driver has it, "Orin" for instance.
        compute_capability: such as "8.7".
        driver: the newest CUDA version the driver knows, such as "12.6".
        memory_bytes: in all; a Jetson's is the board's.
    """

    name: str
    compute_capability: str
    driver: str
    memory_bytes: int


class Cuda:
    """The driver, with the primary context of device 0 current, the one TensorRT uses too.

    Args:
        library: what has the driver's functions; by default ``libcuda.so.1``.

    Raises:
        CudaError: there is no driver or no device; the message says which.
    """

    def __init__(self, library: Any = None):
        if library is None:
            try:
                library = ctypes.CDLL("libcuda.so.1")
            except OSError:
                raise CudaError("no GPU: there is no CUDA driver (libcuda.so.1) on this machine") from None
        self._library = library
        status = library.cuInit(0)
        if status != 0:
            raise CudaError(f"no GPU: the CUDA driver finds none (cuInit gives {status})")
        self._device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self._call("cuCtxSetCurrent", context)

    def gpu(self) -> Gpu:
        """Asks the driver about device 0."""
        name, version, memory = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_size_t()
        self._call("cuDeviceGetName", name, 256, self._device)
        self._call("cuDriverGetVersion", ctypes.byref(version))
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._device)
        capability = []
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
            number = ctypes.c_int()
            self._call("cuDeviceGetAttribute", ctypes.byref(number), attribute, self._device)
            capability.append(number.value)
        return Gpu(
            name.value.decode(),
            "{}.{}".format(*capability),
            f"{version.value // 1000}.{version.value % 1000 // 10}",
            memory.value,
        )

    def memory_used_bytes(self) -> int:
        """Memory of the device that all processes together use."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def buffer(self, count: int) -> Buffer:
        """Makes room for ``count`` float32 numbers on the device and, pinned, on the host."""
        device, host = ctypes.c_uint64(), ctypes.c_void_p()
        self._call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(4 * count))
        self._call("cuMemHostAlloc", ctypes.byref(host), ctypes.c_size_t(4 * count), 0)
        pinned = np.ctypeslib.as_array(ctypes.cast(host, ctypes.POINTER(ctypes.c_float)), (count,))
        return Buffer(device.value, host.value or 0, pinned)

    def release(self, buffer: Buffer) -> None:
        """Gives a buffer back; its pinned array must not be used any more."""
        self._call("cuMemFree_v2", ctypes.c_uint64(buffer.device))
        self._call("cuMemFreeHost", ctypes.c_void_p(buffer.host))

    def stream(self) -> int:
        """Makes a stream beside the default one."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def to_device(self, buffer: Buffer, count: int, stream: int) -> None:
        """Starts copying the first ``count`` numbers of the pinned array."""
        device, host = ctypes.c_uint64(buffer.device), ctypes.c_void_p(buffer.host)
        self._call("cuMemcpyHtoDAsync_v2", device, host, ctypes.c_size_t(4 * count), ctypes.c_void_p(stream))

    def to_host(self, buffer: Buffer, count: int, stream: int) -> None:
        """Starts copying the first ``count`` numbers into the pinned array."""
        device, host = ctypes.c_uint64(buffer.device), ctypes.c_void_p(buffer.host)
        self._call("cuMemcpyDtoHAsync_v2", host, device, ctypes.c_size_t(4 * count), ctypes.c_void_p(stream))

    def wait(self, stream: int) -> None:
        """Returns when all work of the stream is done."""
        self._call("cuStreamSynchronize", ctypes.c_void_p(stream))

    def begin_capture(self, stream: int) -> None:
        """Has the stream's work noted instead of done from here on."""
        self._call("cuStreamBeginCapture_v2", ctypes.c_void_p(stream), _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """Ends the noting and returns the work as an executable graph."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
        try:
            flags = ctypes.c_uint64(0)
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, flags)
        finally:
            self._call("cuGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Starts an executable graph."""
        self._call("cuGraphLaunch", ctypes.c_void_p(graph), ctypes.c_void_p(stream))

    def forget(self, graph: int) -> None:
        """Destroys an executable graph."""
        self._call("cuGraphExecDestroy", ctypes.c_void_p(graph))

    def event(self) -> int:
        """Makes an event that keeps the time."""
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), 0)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Notes the time when the stream gets here."""
        self._call("cuEventRecord", ctypes.c_void_p(event), ctypes.c_void_p(stream))

    def milliseconds(self, start: int, end: int) -> float:
        """Measures the time between two events that have been passed."""
        elapsed = ctypes.c_float()
        self._call("cuEventElapsedTime", ctypes.byref(elapsed), ctypes.c_void_p(start), ctypes.c_void_p(end))
        return elapsed.value

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise CudaError(f"the CUDA driver refuses {function}: {self._reason(status)}")

    def _reason(self, status: int) -> str:
        text = ctypes.c_char_p()
        if self._library.cuGetErrorString(status, ctypes.byref(text)) != 0 or text.value is None:
            return f"error {status}"
        return text.value.decode()


class Buffer(NamedTuple):
    """Room for the same numbers on the device and on the host.

    Attributes:
        device: address on the device.
        host: address of the pinned array.
        pinned: [count] float32 on the host.
    """

    device: int
    host: int
    pinned: np.ndarray


def find_gpu() -> tuple[Cuda, Gpu]:
    """Opens the driver and asks it about device 0.

    Raises:
        CudaError: there is none.
    """
    cuda = Cuda()
    return cuda, cuda.gpu()
