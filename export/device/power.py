"""Energy of a piece of work, where the machine tells it: tegrastats on a Jetson, NVML on a desktop.

A Jetson's sensors are read ten times a second and are those of the whole module; NVML counts what the GPU took since
the driver was loaded. Neither knows a single call, so work is repeated for some seconds.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import threading
import time
from typing import Any, Callable, NamedTuple

# What tegrastats prints of a module's inputs, the first that is there whole: one sensor for all, or all its parts. On
# an AGX Orin, VDDQ_VDD2_1V8AO is fed by VIN_SYS_5V0 and would count twice.
_INPUTS = (
    ("VIN",),  # Thor
    ("VDD_IN",),  # Orin NX and Nano, Xavier NX
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),  # AGX Orin
    ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"),  # AGX Xavier
)

_SENSOR = re.compile(r"(?<!\S)([A-Z][A-Z0-9_]*) (-?\d+)(?:mW)?(?:/-?\d+(?:mW)?)?(?!\S)")

_INTERVAL = 100  # milliseconds between readings


class NotMeasured(Exception):  # noqa: N818
    """Why nothing here tells energy, in a few words."""


class Energy(NamedTuple):
    """What a piece of work took.

    Attributes:
        joules: of all calls.
        calls: how often the work was done.
        seconds: for how long.
    """

    joules: float
    calls: int
    seconds: float


def module_watts(line: str) -> float | None:
    """Reads the power of a whole Jetson module from a line of tegrastats; None where it names no sensor we know."""
    found = {name: int(milliwatts) for name, milliwatts in _SENSOR.findall(line)}
    for inputs in _INPUTS:
        if all(name in found for name in inputs):
            return sum(found[name] for name in inputs) / 1e3
    return None


class TegrastatsMeter:
    """The sensors of a Jetson's module, CPU, GPU and memory together.

    Args:
        command: the program, by its path or name.

    Raises:
        NotMeasured: it is not there, does not start, or tells no power.
    """

    name, whole_board = "tegrastats", True

    def __init__(self, command: str = "tegrastats"):
        path = shutil.which(command)
        if path is None:
            raise NotMeasured("there is no tegrastats")
        self._command = [path, "--interval", str(_INTERVAL)]
        self.joules_of(lambda: time.sleep(_INTERVAL / 1e3), 5 * _INTERVAL / 1e3)  # power may need other rights

    def joules_of(self, work: Callable[[], object], seconds: float) -> Energy:
        """Repeats work for so long and measures what the module takes meanwhile."""
        watts: list[float] = []
        try:
            process = subprocess.Popen(self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError as error:
            raise NotMeasured(f"tegrastats does not start ({error.strerror})") from None
        assert process.stdout is not None
        reader = threading.Thread(target=_collect, args=(process.stdout, watts), daemon=True)
        reader.start()
        try:
            calls, took = _repeat(work, seconds)
        finally:
            process.terminate()
            process.wait()
            reader.join()
            process.stdout.close()
        if not watts:
            raise NotMeasured("tegrastats tells no power here")
        return Energy(sum(watts) / len(watts) * took, calls, took)


def _collect(lines: Any, watts: list[float]) -> None:
    for line in lines:
        value = module_watts(line)
        if value is not None:
            watts.append(value)


class NvmlMeter:
    """The counter of a GPU's energy, since Volta; of device 0 and of nothing beside the GPU's board.

    Args:
        library: what has NVML's functions; by default ``libnvidia-ml.so.1``, which comes with the driver.

    Raises:
        NotMeasured: there is no NVML, no GPU, or no counter.
    """

    name, whole_board = "NVML", False

    def __init__(self, library: Any = None):
        if library is None:
            try:
                library = ctypes.CDLL("libnvidia-ml.so.1")
            except OSError:
                raise NotMeasured("there is no NVML") from None
        self._library, self._device = library, ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(0), ctypes.byref(self._device))
        self._millijoules()

    def joules_of(self, work: Callable[[], object], seconds: float) -> Energy:
        """Repeats work for so long and measures what the GPU takes meanwhile."""
        before = self._millijoules()
        calls, took = _repeat(work, seconds)
        return Energy((self._millijoules() - before) / 1e3, calls, took)

    def _millijoules(self) -> int:
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", self._device, ctypes.byref(value))
        return value.value

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status != 0:
            raise NotMeasured(f"NVML tells no energy here ({function}: {status})")


def _repeat(work: Callable[[], object], seconds: float) -> tuple[int, float]:
    """Does work again and again for so long; returns how often, and how long it really was."""
    started, calls = time.perf_counter(), 0
    while True:
        work()
        calls += 1
        took = time.perf_counter() - started
        if took >= seconds:
            return calls, took


def find_meter() -> TegrastatsMeter | NvmlMeter:
    """Finds what tells energy here.

    Raises:
        NotMeasured: nothing does, and why.
    """
    reasons = []
    for meter in (TegrastatsMeter, NvmlMeter):
        try:
            return meter()
        except NotMeasured as reason:
            reasons.append(str(reason))
    raise NotMeasured("; ".join(reasons))
