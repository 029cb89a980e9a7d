"""The latent table: the latents of a data set, with the ids they stand for and the decoder they belong to."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mnif.models.lineage import fingerprints, widened
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from mnif.utils.files import save_tensors, written_atomically

_FORMAT = "mnif-latents/1"
_CHUNK = 8192  # rows in float64 at a time

_TYPES = {"latents": "F32", "held_out": "U8", "id_bytes": "U8", "id_offsets": "I64"}


@dataclass
class LatentTable:
    """Latents of a data set; without the decoder of ``fingerprint`` they mean nothing.

    Attributes:
        latents: [N, D] float32.
        ids: N instance ids, in the order of the rows.
        held_out: [N] bool, rows kept out of training.
        fingerprint: of the decoder (:meth:`mnif.models.mnif_model.MNIFModel.fingerprint`).
        data: what the instances came from, as the user named it.
        ancestors: fingerprints of the generations that the decoder was grown from, the first one first.
    """

    latents: Tensor
    ids: list[str]
    held_out: Tensor
    fingerprint: str
    data: str
    ancestors: tuple[str, ...] = ()

    @property
    def train(self) -> Tensor:
        """The rows trained on, [N_train, D]."""
        return self.latents[~self.held_out] if self.held_out.any() else self.latents

    def mean_and_std(self) -> tuple[Tensor, Tensor]:
        """Computes mean and standard deviation of each dimension over the training rows, [D] and [D]."""
        total = square = torch.zeros(self.latents.shape[1], dtype=torch.float64)
        for rows in self._train_chunks():
            total = total + rows.sum(dim=0)
        count = int((~self.held_out).sum())
        mean = total / count
        for rows in self._train_chunks():
            square = square + (rows - mean).square().sum(dim=0)
        return mean.float(), (square / count).sqrt().clamp_min(1e-6).float()

    def _train_chunks(self) -> Iterator[Tensor]:
        """Yields the training rows in float64, a few at a time: a table may be half of what memory holds."""
        for latents, held_out in zip(self.latents.split(_CHUNK), self.held_out.split(_CHUNK), strict=True):
            yield latents[~held_out].double()

    def rows_of(self, ids: Iterable[str], path: Path) -> list[int]:
        """Finds the rows of ``ids``, in their order; ``path`` is where the table was read from.

        Raises:
            UserError: an id of ``--ids`` is not in the table.
        """
        place = {id: row for row, id in enumerate(self.ids)}
        for id in (ids := list(ids)):
            if id not in place:
                raise UserError(f"--ids {id}: not in {path}, which begins with {', '.join(self.ids[:3])}")
        return [place[id] for id in ids]

    def save(self, path: Path) -> None:
        """Writes the table as safetensors, atomically. Ids are UTF-8 bytes with offsets, so any number fits."""
        text = [id.encode() for id in self.ids]
        mean, std = self.mean_and_std()
        tensors = {
            "latents": self.latents.contiguous(),
            "held_out": self.held_out.to(torch.uint8),
            "id_bytes": torch.from_numpy(np.frombuffer(b"".join(text) or b"\0", dtype=np.uint8).copy()),
            "id_offsets": torch.tensor([0, *(len(id) for id in text)]).cumsum(0),
            "mean": mean,
            "std": std,
        }
        metadata = {"format": _FORMAT, "fingerprint": self.fingerprint, "data": self.data}
        if self.ancestors:
            metadata["ancestors"] = " ".join(self.ancestors)
        with written_atomically(path) as temporary:
            save_tensors(tensors, temporary, metadata)

    @classmethod
    def of(cls, decoder: MNIFModel, latents: Tensor, ids: list[str], held_out: Tensor, data: str) -> "LatentTable":
        """Makes the table of latents that were found for ``decoder``, which names it and what it was grown from."""
        *ancestors, own = fingerprints(decoder)
        return cls(latents, ids, held_out, own, data, tuple(ancestors))

    @classmethod
    def load_for(cls, decoder: MNIFModel, path: Path | str) -> "LatentTable":
        """Reads a table of this decoder, or of a generation that it was grown from.

        Latents of an earlier generation get zeros for the numbers that they lack, and decode to what they did.

        Raises:
            UserError: as :meth:`load`; or the table is of a model that was grown from this decoder.
        """
        table, known = cls.load(path), fingerprints(decoder)
        own, latent_dim = known[-1], decoder.config.latent_dim
        if own in table.ancestors:
            raise UserError(
                f"{path}: these latents belong to decoder {table.fingerprint[:12]}, which was grown from the one at "
                f"hand ({own[:12]}); take the model that was grown"
            )
        table.check(path, own if table.fingerprint not in known else table.fingerprint)
        later = decoder.config.growths[known.index(table.fingerprint) :]
        table.check(path, latent_dim=latent_dim - sum(growth["latent_dim"] for growth in later))
        if later:
            table.latents = widened(decoder, table.latents)
            table.fingerprint, table.ancestors = own, tuple(known[:-1])
        return table

    @classmethod
    def load(cls, path: Path | str, fingerprint: str | None = None, latent_dim: int | None = None) -> "LatentTable":
        """Reads a table.

        Args:
            path: the safetensors file.
            fingerprint: of the decoder at hand; None skips the check.
            latent_dim: D of that decoder; None skips the check.

        Raises:
            UserError: the file is missing, is no latent table, is damaged, or belongs to another
                decoder.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no latent table; `mnif fit` or `mnif encode` writes one")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise UserError(f"{path}: not a latent table (format {metadata.get('format')!r})")
                _check_header(file)
                # Copied out of the file: products round by where their numbers lie (:mod:`mnif.models.io`).
                tensors = {key: file.get_tensor(key).clone() for key in _TYPES}
            ids = _checked_ids(tensors)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{path}: damaged latent table ({error})") from None
        table = cls(
            latents=tensors["latents"],
            ids=ids,
            held_out=tensors["held_out"].bool(),
            fingerprint=metadata["fingerprint"],
            data=metadata["data"],
            ancestors=tuple(metadata.get("ancestors", "").split()),
        )
        table.check(path, fingerprint, latent_dim)
        return table

    def check(self, path: Path | str, fingerprint: str | None = None, latent_dim: int | None = None) -> None:
        """Makes sure that the table, read from ``path``, is of a decoder; None skips a check.

        Raises:
            UserError: it belongs to another decoder, or its latents have another length.
        """
        if fingerprint not in (None, self.fingerprint):
            raise UserError(
                f"{path}: these latents belong to decoder {self.fingerprint[:12]}, not to the one at hand "
                f"({fingerprint[:12]}); encode the data again with `mnif encode`"
            )
        found = self.latents.shape[1]
        if latent_dim not in (None, found):
            raise UserError(
                f"{path}: damaged latent table (latents of {found} numbers; the decoder's have {latent_dim})"
            )


def data_of_table(path: Path, fingerprint: str) -> str | None:
    """Reads from a table's header what data its decoder learned from, and no latent.

    Args:
        path: the safetensors file.
        fingerprint: of the decoder at hand.

    Returns:
        The data's name; None if there is no such table, or it is that of another decoder.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    belongs = metadata.get("format") == _FORMAT and metadata.get("fingerprint") == fingerprint
    return metadata.get("data") if belongs else None


def _check_header(file: Any) -> None:
    """Looks at what a file says it holds, before anything is read.

    Raises:
        ValueError: a tensor or an entry is missing, or of another type or shape.
    """
    metadata, names = file.metadata() or {}, set(file.keys())
    for name in ("fingerprint", "data"):
        if name not in metadata:
            raise ValueError(f"it has no {name}")
    for name, kind in _TYPES.items():
        if name not in names or file.get_slice(name).get_dtype() != kind:
            raise ValueError(f"it has no {name} of type {kind}")
    shapes = {name: file.get_slice(name).get_shape() for name in _TYPES}
    if len(shapes["latents"]) != 2 or 0 in shapes["latents"]:
        raise ValueError(f"latents are {shapes['latents']}; [N, D] is needed")
    count = shapes["latents"][0]
    for name, length in (("held_out", count), ("id_offsets", count + 1), ("id_bytes", None)):
        if len(shapes[name]) != 1 or length not in (None, *shapes[name]):
            raise ValueError(f"{name} is {shapes[name]} for {count} latents")


def _checked_ids(tensors: dict[str, Tensor]) -> list[str]:
    """Cuts the ids out of their bytes, once all tensors are what :meth:`LatentTable.save` writes.

    Raises:
        ValueError: a latent is not finite, the mask holds other numbers than 0 and 1, or the ids are not cut from
            all of the bytes in order, not UTF-8, or not unique.
    """
    text, offsets = tensors["id_bytes"].numpy().tobytes(), tensors["id_offsets"]
    end = 0 if text == b"\0" and offsets[-1] == 0 else len(text)  # safetensors holds no empty tensor
    if offsets[0] != 0 or (offsets.diff() < 0).any() or offsets[-1] != end:
        raise ValueError("its ids do not lie one after another")
    ids = [text[start:stop].decode() for start, stop in pairwise(offsets.tolist())]
    if len(set(ids)) < len(ids):
        raise ValueError("an id occurs twice")
    if (tensors["held_out"] > 1).any():
        raise ValueError("held_out holds other numbers than 0 and 1")
    for start, rows in zip(range(0, len(ids), _CHUNK), tensors["latents"].split(_CHUNK), strict=True):
        bad = (~rows.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise ValueError(f"the latent of {ids[start + int(bad[0])]} holds NaN or infinity")
    return ids
