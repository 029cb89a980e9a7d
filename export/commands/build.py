"""`mnif build`: builds TensorRT plans for a bundle's graphs, as `python3 device/build.py` does on a board."""

from export.device.build import main

__all__ = ["main"]
