"""A latent table as `mnif encode` writes it, a safetensors file, for `mnif decode` and whatever reads latents."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Sequence

import numpy as np

from .files import write_atomically

_FORMAT = "mnif-latents/1"

_TYPES = {"int64": "I64", "float32": "F32", "uint8": "U8"}


def write_latents(path: Path, latents: np.ndarray, ids: Sequence[str], fingerprint: str, data: str) -> None:
    """Writes latents.

    Args:
        path: the file.
        latents: [N, D] float32.
        ids: N names, all different.
        fingerprint: of the decoder.
        data: what the instances came from.
    """
    text = [name.encode("utf-8", "backslashreplace") for name in ids]
    numbers = latents.astype(np.float64)
    arrays = {
        "id_offsets": np.cumsum([0, *map(len, text)]).astype(np.int64),
        "latents": latents.astype(np.float32),
        "mean": numbers.mean(axis=0).astype(np.float32),
        "std": np.maximum(numbers.std(axis=0), 1e-6).astype(np.float32),
        "held_out": np.zeros(len(ids), np.uint8),
        "id_bytes": np.frombuffer(b"".join(text) or b"\0", np.uint8),
    }
    header: dict = {"__metadata__": {"data": data, "fingerprint": fingerprint, "format": _FORMAT}}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": _TYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": [begin, end]}
    described = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    described += b" " * (-len(described) % 8)
    body = b"".join(array.tobytes() for array in arrays.values())
    write_atomically(path, struct.pack("<Q", len(described)) + described + body)
