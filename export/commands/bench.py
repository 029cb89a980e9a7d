"""`mnif bench`: times a bundle's graphs in every backend, as `python3 device/bench.py` does on a board."""

from export.device.bench import main, make_parser

__all__ = ["main", "make_parser"]
