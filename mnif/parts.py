"""Latents that are worked out batch by batch and wait on disk until all are there."""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mnif.files import read_json, write_json, written_atomically
from mnif.tensor_files import save_tensors


class Parts:
    """Batches of latents that have been found already, so that a stopped command loses one batch at most.

    Args:
        folder: where they wait; emptied if it is of another search.
        search: what the latents depend on.
    """

    def __init__(self, folder: Path, search: dict[str, Any]):
        self.folder = folder
        record = folder / "search.json"
        if folder.exists() and (not record.exists() or read_json(record) != search):
            shutil.rmtree(folder)
        write_json(record, search)

    def __contains__(self, begin: int) -> bool:
        return self._file(begin).exists()

    def save(self, begin: int, latents: Tensor) -> None:
        """Keeps the latents of the batch that begins at a row."""
        with written_atomically(self._file(begin)) as temporary:
            save_tensors({"latents": latents.cpu()}, temporary)

    def all(self) -> Tensor:
        """All latents in order, [N, D]."""
        return torch.cat([load_file(path)["latents"] for path in sorted(self.folder.glob("*.safetensors"))])

    def remove(self) -> None:
        """Forgets everything, once it has been written elsewhere."""
        shutil.rmtree(self.folder)

    def _file(self, begin: int) -> Path:
        return self.folder / f"{begin:09d}.safetensors"
