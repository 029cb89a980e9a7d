"""Files that are either old and whole or new and whole, after a power cut too.

This file stands by itself (Python 3.8) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes, flush: bool = True) -> None:
    """Writes a file under a temporary name beside its own, then renames it; its folder is made if it is missing.

    Args:
        path: the file.
        content: of it.
        flush: it is on the disk before it has its name; False leaves that to the system, for many small files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON."""
    write_whole(path, (json.dumps(content, indent=2, sort_keys=True) + "\n").encode())
