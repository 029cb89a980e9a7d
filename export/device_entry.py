"""Runs the command this file is named after; it needs this folder, NumPy and a backend, and no installation."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    sys.exit(import_module("export.device." + Path(__file__).stem).main())
