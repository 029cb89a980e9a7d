"""Latents that are worked out batch by batch and wait on disk until all are there."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mnif.utils.files import read_json, remove_leftovers, save_tensors, write_json, written_atomically


def chunks_of(rows: range, size: int) -> list[range]:
    """Cuts ``rows`` into ranges of ``size``; the last one may be shorter."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]


class Parts:
    """Batches of latents that have been found already, so that a stopped command loses one batch at most.

    Args:
        folder: where they wait; those of another search go.
        search: what the latents depend on.
    """

    def __init__(self, folder: Path, search: dict[str, Any]):
        self.folder = folder
        self._record = folder / "search.json"
        if not self._record.exists() or read_json(self._record) != search:
            self.remove()
        write_json(self._record, search)

    def __contains__(self, begin: int) -> bool:
        return self._file(begin).exists()

    def save(self, begin: int, latents: Tensor) -> None:
        """Keeps the latents of the batch that begins at a row."""
        with written_atomically(self._file(begin)) as temporary:
            save_tensors({"latents": latents.cpu()}, temporary)

    def all(self) -> Tensor:
        """All latents in order, [N, D]."""
        return torch.cat([load_file(path)["latents"] for path in self._files()])

    def remove(self) -> None:
        """Forgets everything, once it has been written elsewhere; the folder goes unless others have files there."""
        for path in (*self._files(), self._record):
            path.unlink(missing_ok=True)
        remove_leftovers(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]" * 9 + ".safetensors"))

    def _file(self, begin: int) -> Path:
        return self.folder / f"{begin:09d}.safetensors"
