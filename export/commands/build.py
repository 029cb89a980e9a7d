"""`mnif build`: builds TensorRT plans for a bundle's graphs, as `python3 device/build.py` does on a board."""

from export.device.build import main, make_parser

__all__ = ["main", "make_parser"]
