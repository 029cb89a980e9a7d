"""`mnif verify`: checks a bundle's graphs in every backend, as `python3 device/verify.py` does on a board."""

from export.device.verify import main, make_parser

__all__ = ["main", "make_parser"]
