"""What a measurement was made on: device, JetPack, power mode, processor, versions, memory.

This file stands by itself (Python 3.8, NumPy) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from export.cuda import CudaError, find_gpu


def describe_machine() -> dict[str, Any]:
    """Facts that belong beside every measured number; what cannot be found out is None."""
    try:
        _, gpu = find_gpu()
        graphics, no_gpu = gpu._asdict(), None
    except CudaError as error:
        graphics, no_gpu = None, str(error)
    return {
        "device": _text(Path("/proc/device-tree/model")) or platform.node(),
        "gpu": graphics,
        "no_gpu": no_gpu,
        "jetson_linux": _text(Path("/etc/nv_tegra_release")),
        "jetpack": _output(["dpkg-query", "--showformat=${Version}", "--show", "nvidia-jetpack"]),
        "power_mode": _output(["nvpmodel", "-q"]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in ("numpy", "onnxruntime", "openvino", "tensorrt")},
    }


def package_version(name: str) -> str | None:
    """Of an installed module, which is imported for it; None where there is none."""
    if name == "numpy":
        return np.__version__
    try:
        return str(import_module(name).__version__)
    except (ImportError, AttributeError):
        return None


def peak_memory_megabytes() -> float:
    """The most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _processor() -> str:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _output(command: list[str]) -> str | None:
    """What a command of the system prints, on one line."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return " ".join(done.stdout.decode(errors="replace").split()) or None
