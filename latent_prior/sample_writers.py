"""Samples as files: one by one in a folder, in tar shards, or as one .npz file; all of them atomic and resumable.

The samples are cut into units that are written at a time. What a killed command leaves behind are whole units and, in
a folder, whole files; the next one writes the rest.
"""

import contextlib
import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from latent_prior.sampling import BLOCK, ExactSampler, initial_noise, slerp
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import OutputWriter, Signal
from mnif.utils.files import temporary_folder, was_written, written_atomically
from mnif.utils.pixels import image_grid, save_animation, save_image


@dataclass(frozen=True)
class Samples(ABC):
    """Samples 0 to ``count`` - 1 and where they go.

    Args:
        output: the folder.
        count: how many.
        drawing: draws their latents.
        signal: the model's.
        showing: how one is shown.
        at_once: pictures that are decoded at a time.
        unit: samples that are written at a time, a multiple of the block of :mod:`latent_prior.sampling`.
    """

    output: Path
    count: int
    drawing: ExactSampler
    signal: Signal
    writer: OutputWriter
    at_once: int
    unit: int = BLOCK

    @property
    def decoder(self) -> MNIFModel:
        """That of the pipeline."""
        return self.drawing.pipeline.decoder

    def units(self) -> range:
        """Their numbers."""
        return range(-(-self.count // self.unit))

    def of_unit(self, number: int) -> range:
        """The samples in it."""
        return range(number * self.unit, min((number + 1) * self.unit, self.count))

    def folders(self) -> list[Path]:
        """Those that files are written to, of this and every other format."""
        inside = [path for path in self.output.glob("[0-9]" * 6) if path.is_dir()]
        return [self.output, self.output / "parts", self.output / "preview", *inside]

    @abstractmethod
    def missing(self, number: int) -> int:
        """How many samples of a unit are not there yet."""

    @abstractmethod
    def any_there(self) -> bool:
        """Whether the folder holds samples."""

    @abstractmethod
    def write(self, number: int) -> Iterator[str | None]:
        """Writes what is missing of a unit, and says of each sample None or why there is nothing to show of it."""

    def finish(self) -> None:  # noqa: B027
        """Completes the whole once all units are written, if there is anything to do."""

    def _blocks(self, number: int) -> Iterator[tuple[range, Tensor]]:
        """A unit's samples and the latents of their block, [64, D], of which the last may be more than there are."""
        samples = self.of_unit(number)
        for first in range(samples.start, samples.stop, BLOCK):
            yield range(first, min(first + BLOCK, samples.stop)), self.drawing.block(first // BLOCK)


class FolderOfSamples(Samples):
    """000000.png ... and whatever else a signal is shown by, named by the samples' numbers."""

    def files(self, sample: int) -> list[str]:
        """Of one sample, below the folder."""
        return self.writer.files(f"{sample:06d}")

    def _lacks(self, sample: int) -> bool:
        return not all(was_written(self.output / file) for file in self.files(sample))

    def missing(self, number: int) -> int:
        """Those that lack a file."""
        return sum(map(self._lacks, self.of_unit(number)))

    def any_there(self) -> bool:
        """Whether a name begins with six digits."""
        return any(self.output.glob("[0-9]" * 6 + "*"))

    def write(self, number: int) -> Iterator[str | None]:
        """Writes the files that are missing."""
        for samples, latents in self._blocks(number):
            lacking = [sample for sample in samples if self._lacks(sample)]
            yield from self._write_files(self.output, lacking, latents, samples.start)

    def _write_files(self, folder: Path, samples: list[int], latents: Tensor, first: int) -> Iterator[str | None]:
        """Writes the files of ``samples``, whose latents are those from ``first`` on."""
        names = {sample - first: f"{sample:06d}" for sample in samples}
        yield from self.writer.write_each(self.decoder, self.signal, latents, folder, names, self.at_once)


class TarShards(FolderOfSamples):
    """samples-00000.tar ... as WebDataset reads them: a sample's files are neighbours of one name up to its first dot.

    Owner and times are left out, so that the same samples make the same bytes.
    """

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.output / f"samples-{number:05d}.tar"

    def missing(self, number: int) -> int:
        """All of a shard or nothing."""
        return 0 if self.path(number).exists() else len(self.of_unit(number))

    def any_there(self) -> bool:
        """Whether there are shards."""
        return any(self.output.glob("samples-*.tar"))

    def write(self, number: int) -> Iterator[str | None]:
        """Writes a shard."""
        path = self.path(number)
        with (
            temporary_folder(path) as folder,
            written_atomically(path) as temporary,
            tarfile.open(temporary, "w") as archive,
        ):
            for samples, latents in self._blocks(number):
                yield from self._write_files(folder, list(samples), latents, samples.start)
                for sample in samples:
                    self._move(archive, folder, sample)

    def _move(self, archive: tarfile.TarFile, folder: Path, sample: int) -> None:
        for file in self.files(sample):
            if (folder / file).exists():  # a shape without a surface has none
                member = tarfile.TarInfo(file.replace("/", "."))
                member.size = (folder / file).stat().st_size
                with (folder / file).open("rb") as content:
                    archive.addfile(member, content)
                (folder / file).unlink()


class NpzOfSamples(Samples):
    """samples.npz with one array, which `mnif fit`, `mnif encode` and `mnif eval` read, made of parts at the end.

    ``images`` [N, H, W, C] uint8 of pictures, ``voxels`` [N, R, R, R] bool of shapes, ``views`` [N, V, H, W, 3] uint8
    of objects; ``pictures`` [N, H, W, 3] uint8 of other signals.
    """

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.output / "samples.npz"

    def part(self, number: int) -> Path:
        """Of a part, which is there until the whole is."""
        return self.output / "parts" / f"{number:05d}.npy"

    def missing(self, number: int) -> int:
        """All of a part or nothing."""
        return 0 if self.path.exists() or self.part(number).exists() else len(self.of_unit(number))

    def any_there(self) -> bool:
        """Whether there is the file or a part of it."""
        return self.path.exists() or any(self.output.glob("parts/*.npy"))

    def write(self, number: int) -> Iterator[str | None]:
        """Writes a part."""
        arrays = []
        for samples, latents in self._blocks(number):
            arrays.append(self.writer.to_array(self.decoder, self.signal, latents, len(samples), self.at_once))
            yield from [None] * len(samples)
        with written_atomically(self.part(number)) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate(arrays), allow_pickle=False)

    def finish(self) -> None:
        """Puts the parts together, one in memory at a time."""
        if not self.path.exists():
            self._join()
        for number in self.units():
            self.part(number).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # somebody else has files there, or it is gone
            (self.output / "parts").rmdir()

    def _join(self) -> None:
        first = np.load(self.part(0), mmap_mode="r", allow_pickle=False)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (self.count, *first.shape[1:])}
        entry = zipfile.ZipInfo(f"{self.writer.array_name}.npy")  # of no date
        with (
            written_atomically(self.path) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
            archive.open(entry, "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for number in self.units():
                file.write(np.load(self.part(number), allow_pickle=False).tobytes())


FORMATS: dict[str, type[Samples]] = {"folder": FolderOfSamples, "tar": TarShards, "npz": NpzOfSamples}


_ROWS = 8  # ways on the sheet of an interpolation


@torch.no_grad()
def save_preview(samples: Samples, count: int) -> None:
    """Writes preview/grid.png, the first ``count`` samples at the training resolution."""
    count = min(count, samples.count)
    latents = samples.drawing.samples(count)
    pictures = np.concatenate([samples.signal.images(samples.decoder, latent) for latent in latents.split(64)])
    sheet = image_grid(pictures, columns=min(count, 8), scale=_scale(pictures))
    save_image(samples.output / "preview" / "grid.png", sheet)


@torch.no_grad()
def save_interpolation(samples: Samples, steps: int) -> None:
    """Writes preview/interpolation.png, a row for each way from a sample to the next, and all of them as a .gif.

    A way leads through the noise (:func:`latent_prior.sampling.slerp`), so that every picture on it is a sample; it is
    cut into ``steps`` parts.
    """
    count = min(samples.count, _ROWS + 1)
    noise = initial_noise(samples.drawing.seed, range(count), samples.decoder.config.latent_dim)
    ways = []
    for start, end in pairwise(noise):
        latents = samples.drawing.latents(torch.from_numpy(slerp(start, end, np.linspace(0, 1, steps + 1))))
        ways.append(samples.signal.images(samples.decoder, latents))
    pictures = np.concatenate(ways)
    folder, scale = samples.output / "preview", _scale(pictures)
    save_image(folder / "interpolation.png", image_grid(pictures, columns=steps + 1, scale=scale))
    frames = np.concatenate([ways[0], *(way[1:] for way in ways[1:])])  # an end is the next beginning
    save_animation(folder / "interpolation.gif", frames.repeat(scale, axis=1).repeat(scale, axis=2))


def _scale(pictures: np.ndarray) -> int:
    """Enlarges small pictures to 64 pixels."""
    return max(1, 64 // pictures.shape[1])
