"""The device's side of a bundle: files of this package, byte for byte, that run without it being installed.

``device/`` holds one small file per command (``python3 device/build.py``) and under ``device/export/`` the modules
they need. Those import the standard library, NumPy and each other; TensorRT, ONNX Runtime, OpenVINO and onnx where
they are used. They keep to Python 3.8 and NumPy 1.x, which is what JetPack 5 has.
"""

import shutil
from pathlib import Path

COMMANDS = ("build", "sample", "verify", "bench")
MODULES = (
    "__init__",
    "backends",
    "bench",
    "build",
    "bundle_folder",
    "command",
    "cuda",
    "engine",
    "kernels",
    "machine",
    "manifest",
    "openvino_graph",
    "pixels",
    "plans",
    "runtime",
    "quality",
    "reference_evaluator",
    "sample",
    "tensorrt_graph",
    "verify",
    "views",
    "whole_files",
)


def write_device_files(bundle: Path) -> None:
    """Writes ``device/`` into a bundle's folder."""
    here, device = Path(__file__).parent, bundle / "device"
    (device / "export").mkdir(parents=True)
    for name in MODULES:
        shutil.copyfile(here.parent / f"{name}.py", device / "export" / f"{name}.py")
    for name in COMMANDS:
        shutil.copyfile(here / "device_entry.py", device / f"{name}.py")
