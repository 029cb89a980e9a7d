"""Files that are either old and whole or new and whole.

This file stands by itself (Python 3.8) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name beside its own, then renames it; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    write_whole(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
