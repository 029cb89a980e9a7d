"""Sound as a fourth signal, without a change to mnif: folders of mono 16-bit WAV clips.

python examples/audio_signal.py fit --signal audio --data clips --output_dir runs/clips --resolution 2048 --cells 16

Every other command works the same way, as in `python examples/audio_signal.py encode --model runs/clips/model …`;
docs/new_signal.md walks through this file.
"""

import sys
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnif.cli import main
from mnif.data.dataset import Dataset
from mnif.data.source import DataSource, files_by_name
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Observation
from mnif.signals.registry import register_signal
from mnif.utils.errors import UserError
from mnif.utils.pixels import as_axes

_LENGTH = 2048  # samples of a clip unless --resolution says otherwise


@dataclass(frozen=True)
class AudioData(Dataset):
    """Clips of one length and rate.

    Attributes:
        name: as the user gave it.
        samples: [N, T] int16, one channel.
        rate: samples per second.
        ids: N file names.
        groups: N names; clips of one group stay on one side of the split.
    """

    name: str
    samples: np.ndarray
    rate: int
    ids: list[str]
    groups: list[str]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the samples."""
        return {"samples": self.samples}


def load_audio(source: str, length: int) -> AudioData:
    """Reads the first ``length`` samples of every WAV file in a folder.

    Raises:
        UserError: there is no clip, or one is damaged, too short, not mono, not 16-bit, or of another rate.
    """
    files = files_by_name(Path(source), (".wav",)) if Path(source).is_dir() else {}
    if not files:
        raise UserError(f"--data {source}: no folder with .wav files")
    clips = {id: _clip(path, length) for id, path in files.items()}
    (first, (_, rate)), *_ = clips.items()
    for id, (_, other) in clips.items():
        if other != rate:
            raise UserError(f"{files[id]}: {other} samples a second where {first} has {rate}; resample it")
    return AudioData(source, np.stack([samples for samples, _ in clips.values()]), rate, list(files), list(files))


def _clip(path: Path, length: int) -> tuple[np.ndarray, int]:
    """Reads the first ``length`` samples, int16, and the rate."""
    try:
        with wave.open(str(path)) as clip:
            channels, width, rate, *_ = clip.getparams()
            content = clip.readframes(length)
    except (wave.Error, EOFError) as error:
        raise UserError(f"{path}: not a readable WAV file ({error}); remove or replace it") from None
    if channels != 1 or width != 2:
        raise UserError(f"{path}: {channels} channel(s) of {8 * width} bits; one channel of 16 bits is needed")
    if len(content) < 2 * length:
        raise UserError(
            f"{path}: {len(content) // 2} samples where {length} are needed; remove it or lower --resolution"
        )
    return np.frombuffer(content, dtype="<i2"), rate


@register_signal
class Audio(GridSignal):
    """Sound pressure over time: a grid of one axis with one value, in [-1, 1].

    Args:
        resolution: T, samples of a clip.
        channels: 1.
        stride: a step of learning looks at every ``stride``-th sample, with a random offset.
        rate: samples per second.
    """

    name = "audio"
    noun = "clip"
    dimensions = 1

    def __init__(self, resolution: int, channels: int = 1, stride: int = 1, rate: int = 16000):
        super().__init__(resolution, channels, stride)
        self.rate = rate

    @classmethod
    def recognizes(cls, source: DataSource) -> bool:
        """Recognizes folders of WAV files."""
        return ".wav" in source.file_suffixes

    @classmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> AudioData:
        """Reads clips of ``resolution`` samples, 2048 unless given."""
        length, *more = options["resolution"] or [_LENGTH]
        if more:
            raise UserError("--resolution: a clip has one axis; give one number of samples")
        return load_audio(source, length)

    @classmethod
    def from_data(cls, data: AudioData, options: Mapping[str, Any]) -> "Audio":
        """Takes ``stride``."""
        return cls(data.samples.shape[1], stride=options["stride"], rate=data.rate)

    def load_like(self, source: str) -> AudioData:
        """Reads clips of the model's length and rate."""
        (length,) = as_axes(self.resolution, 1)
        data = load_audio(source, length)
        if data.rate != self.rate:
            raise UserError(f"--data {source}: {data.rate} samples a second where the model has {self.rate}")
        return data

    def settings(self) -> dict[str, Any]:
        """Returns resolution, channels, stride and rate."""
        return super().settings() | {"rate": self.rate}

    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """Maps ``samples`` [B, T] int16 to [B, T, 1] in [-1, 1]."""
        return self.on_grid(batch["samples"][..., None].float() / 32768)

    def images(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """Draws the waveforms."""
        return _waveforms(decoder(latents))

    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Draws the originals' waveforms."""
        return _waveforms(self.observe(batch).values)


def _waveforms(values: Tensor, height: int = 64, width: int = 128) -> np.ndarray:
    """Samples [B, T, 1] in about [-1, 1] → [B, height, width, 3] uint8: from lowest to highest, column by column."""
    samples = values[..., 0].clamp(-1, 1)[:, None]
    # A column reaches a sample into its neighbours, so that steep lines do not break.
    highest, lowest = (
        sign * F.adaptive_max_pool1d(F.max_pool1d(sign * samples, 3, stride=1, padding=1), width) for sign in (1, -1)
    )
    level = torch.linspace(1, -1, height, device=values.device)[:, None]
    inked = (level < highest + 1 / height) & (level > lowest - 1 / height)
    return np.where(inked.cpu().numpy()[..., None], [38, 70, 120], 255).astype(np.uint8)


if __name__ == "__main__":
    sys.exit(main())
