"""Checkpoints of a training stage: ``checkpoint-<step>`` folders written whole, and the best weights so far."""

import pickle
import re
import shutil
import struct
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from msgspec import Meta
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from mnif.latents.embedding import LatentEmbedding
from mnif.utils.errors import UserError
from mnif.utils.files import (
    folder_written_atomically,
    remove_folder,
    remove_leftovers,
    save_tensors,
    sha256_of_folder,
    write_json,
)
from mnif.utils.json_files import read_json

_DAMAGE = (
    OSError,
    EOFError,
    MemoryError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    struct.error,
    pickle.PickleError,
    SafetensorError,
    UserError,
)

_SEAL = ".sha256"  # of all that is not hidden: without it a folder is not whole, and a flipped bit shows


@dataclass
class Progress:
    """How far a stage has come.

    Attributes:
        step: optimizer steps done.
        seconds: of training, over all sessions.
        best: the smallest value of the figure that picks the weights, or None before the first validation.
        best_step: the step of ``best``.
        losses: of the batches since the last record of their mean, over all processes.
    """

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    best_step: int = 0
    losses: list[float] = field(default_factory=list)


class ProgressRecord(msgspec.Struct):
    """A checkpoint's ``progress.json``: :class:`Progress`, and how many times the moving average was updated."""

    step: Annotated[int, Meta(ge=0)]
    seconds: Annotated[float, Meta(ge=0)]
    best: float | None
    best_step: Annotated[int, Meta(ge=0)]
    losses: list[float]
    ema_step: Annotated[int, Meta(ge=0)]


class Checkpoints:
    """The checkpoints of one stage of a run.

    Optimizer and schedule are stored by Accelerate and read back as tensors only; weights and moving averages are
    safetensors.

    Args:
        folder: where ``checkpoint-<step>`` folders stand.
        accelerator: holds what is to be saved.
        ema: the moving average of the weights, if there is one.
        latent_embedding: the latents of instances that this process owns, if they learn by themselves.
        limit: older checkpoints beyond this number are removed.
    """

    def __init__(
        self,
        folder: Path,
        accelerator: Accelerator,
        ema: EMAModel | None,
        latent_embedding: LatentEmbedding | None,
        limit: int,
    ):
        self.folder, self.accelerator, self.ema, self.limit = folder, accelerator, ema, limit
        self.latent_embedding = latent_embedding

    def complete(self) -> list[Path]:
        """The complete checkpoints, which have a seal, oldest first."""
        return _complete(self.folder)

    def resume(self, resume_from: str) -> Progress:
        """Puts everything back as ``--resume_from_checkpoint`` asks, and says so.

        Args:
            resume_from: "latest", the newest checkpoint that is whole, if there is any; a folder; or "no", which
                removes all checkpoints.

        Returns:
            How far the stage has come.

        Raises:
            UserError: the folder is no checkpoint, or damaged; or there are checkpoints and all of them are.
        """
        if self.accelerator.is_main_process:
            if resume_from == "no" and self.folder.exists():
                remove_folder(self.folder)
            remove_leftovers(self.folder.parent, self.folder.name)
            remove_leftovers(self.folder)
        self.accelerator.wait_for_everyone()
        if resume_from not in ("latest", "no"):
            if not (Path(resume_from) / "progress.json").is_file():
                raise UserError(f"--resume_from_checkpoint {resume_from}: not a checkpoint folder")
            candidates = [Path(resume_from)]
        else:
            candidates = _folders(self.folder)[::-1]
        for checkpoint in candidates:
            try:
                progress = self._load(checkpoint)
            except _DAMAGE as error:
                self.accelerator.print(f"{checkpoint}: damaged ({_reason(error)}); it is passed over")
                continue
            self.accelerator.print(f"resuming from {checkpoint}")
            return progress
        if candidates:
            raise UserError(
                f"{candidates[0]}: damaged, and no older checkpoint to go back to; begin anew with "
                "--resume_from_checkpoint no"
            )
        return Progress()

    def save(self, progress: Progress) -> None:
        """Writes ``checkpoint-<step>`` and removes those beyond the limit.

        Raises:
            UserError: it cannot be written, as on a full disk; the older ones are as they were.
        """
        try:
            self._save(progress)
        except OSError as error:
            kept = self.complete()
            last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            path = self.folder / f"checkpoint-{progress.step}"
            raise UserError(
                f"{path} cannot be written ({error.strerror or error}); {last}; "
                "mend that, and the same command continues"
            ) from None

    def _save(self, progress: Progress) -> None:
        if self.latent_embedding is not None:
            # Every process leaves its share before the main process makes a complete checkpoint of all of them.
            if self.accelerator.is_main_process:
                shutil.rmtree(self._shares, ignore_errors=True)
                self._shares.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self.latent_embedding.save(self._shares)
            self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            with folder_written_atomically(self.folder / f"checkpoint-{progress.step}") as temporary:
                if self.latent_embedding is not None:
                    for share in self._shares.iterdir():
                        share.rename(temporary / share.name)
                    self._shares.rmdir()
                self.accelerator.save_state(str(temporary), safe_serialization=True)
                if self.ema is not None:
                    _save_tensors(self.ema.shadow_params, temporary / "ema.safetensors")
                ema_step = self.ema.optimization_step if self.ema is not None else 0
                write_json(temporary / "progress.json", asdict(progress) | {"ema_step": ema_step})
                _seal(temporary)
            oldest_kept = self.complete()[-self.limit :][0]
            for older in _folders(self.folder):
                if _step(older) < _step(oldest_kept):
                    remove_folder(older)
        self.accelerator.wait_for_everyone()

    @property
    def _shares(self) -> Path:
        return self.folder / ".latent-rows"

    def _load(self, checkpoint: Path) -> Progress:
        """Puts everything back as it was at ``checkpoint``; damage shows as one of many kinds of error."""
        _check_seal(checkpoint)
        record = msgspec.structs.asdict(read_json(checkpoint / "progress.json", ProgressRecord))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch's, of a foreign pickle, before it refuses it
            self.accelerator.load_state(str(checkpoint))
        if self.latent_embedding is not None:
            self.latent_embedding.load(checkpoint)
        ema_step = record.pop("ema_step")
        if self.ema is not None:
            _load_tensors(self.ema.shadow_params, checkpoint / "ema.safetensors")
            self.ema.optimization_step = ema_step
        return Progress(**record)

    def save_best(self, parameters: list[nn.Parameter]) -> None:
        """Keeps the weights of now (of the moving average, if there is one) as the best so far."""
        if self.accelerator.is_main_process:
            with folder_written_atomically(self.folder / "best") as temporary:
                best = self.ema.shadow_params if self.ema is not None else parameters
                _save_tensors(best, temporary / "parameters.safetensors")
                _seal(temporary)
        self.accelerator.wait_for_everyone()

    def load_best(self, parameters: list[nn.Parameter]) -> None:
        """Puts the best weights into ``parameters``.

        Raises:
            UserError: they are damaged or gone.
        """
        best = self.folder / "best"
        try:
            _check_seal(best)
            _load_tensors(parameters, best / "parameters.safetensors")
        except _DAMAGE as error:
            raise UserError(
                f"{best}: damaged ({_reason(error)}); begin anew with --resume_from_checkpoint no"
            ) from None


def newest_checkpoint(folder: Path) -> Path:
    """The last of a finished stage's checkpoints."""
    return _complete(folder)[-1]


def _complete(folder: Path) -> list[Path]:
    return [path for path in _folders(folder) if (path / _SEAL).is_file()]


def _folders(folder: Path) -> list[Path]:
    """Those named as checkpoints, complete or not, oldest first."""
    folders = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _seal(folder: Path) -> None:
    """Notes what the folder holds, once all of it is there."""
    (folder / _SEAL).write_text(sha256_of_folder(folder))


def _check_seal(folder: Path) -> None:
    """Raises a ValueError unless the folder holds what was written."""
    seal = folder / _SEAL
    if not seal.is_file():
        raise ValueError(f"it was not written to its end, or its seal {_SEAL} is lost")
    if seal.read_text() != sha256_of_folder(folder):
        raise ValueError("its content is not what was written")


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _save_tensors(tensors: list[torch.Tensor] | list[nn.Parameter], path: Path) -> None:
    save_tensors({str(index): tensor.detach().contiguous() for index, tensor in enumerate(tensors)}, path)


@torch.no_grad()
def _load_tensors(tensors: list[torch.Tensor] | list[nn.Parameter], path: Path) -> None:
    stored = load_file(path)
    for index, tensor in enumerate(tensors):
        tensor.copy_(stored[str(index)])
