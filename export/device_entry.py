"""Runs the command this file is named after; it needs this folder, NumPy and a backend, and no installation."""

import sys
from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    try:
        import numpy  # noqa: F401
    except Exception as error:  # whatever a broken installation raises
        reason = " ".join(str(error).split())
        print(f"{Path(__file__).name}: numpy cannot be imported: {reason}; install python3-numpy", file=sys.stderr)
        sys.exit(2)
    sys.exit(import_module("export.device." + Path(__file__).stem).main())
