"""Tensors in safetensors files whose bytes depend on what is in them alone."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes contiguous tensors with ``metadata`` in the order of its names.

    safetensors itself writes metadata in an order that changes from call to call.
    """
    save_file(tensors, path, dict(metadata) if metadata else None)
    if not metadata:
        return
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) != length:
            raise RuntimeError(f"{path}: the header takes {len(text)} bytes where safetensors took {length}")
        file.seek(8)
        file.write(text)
