"""Samples as files: one by one in a folder, in tar shards, or as one .npz file; all of them atomic and resumable.

The samples are cut into chunks, each written at a time. What a killed command leaves behind are whole chunks and, in a
folder, whole files; the next one writes the rest, and what is not as it was written
(:class:`mnif.utils.resumable.Seals`).
"""

import tarfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import CHUNK, denoised, initial_noise, sample_latents, slerp
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import OutputWriter, Signal
from mnif.utils.files import temporary_folder, written_atomically
from mnif.utils.pixels import image_grid, save_animation, save_image
from mnif.utils.resumable import SEALS, Chunks, Seals, chunks_of


@dataclass(frozen=True)
class Samples(ABC):
    """Samples 0 to ``count`` - 1 and where they go.

    Args:
        output: the folder.
        count: how many.
        pipeline: draws their latents.
        seed: of the noise.
        options: of drawing: ``num_inference_steps``, ``truncation`` and ``use_student``, as of the pipeline.
        signal: the model's.
        writer: makes files of one sample.
        at_once: pictures that are decoded at a time.
        chunk_size: samples that are written at a time, a multiple of :data:`latent_prior.sampling.CHUNK`.
    """

    output: Path
    count: int
    pipeline: MNIFPipeline
    seed: int
    options: Mapping[str, Any]
    signal: Signal
    writer: OutputWriter
    at_once: int
    chunk_size: int = CHUNK

    @property
    def decoder(self) -> MNIFModel:
        """The decoder of the pipeline."""
        return self.pipeline.decoder

    @property
    def seals(self) -> Seals:
        """What the files held when they were written, a seal for each chunk."""
        return Seals(self.output)

    def chunks(self) -> list[range]:
        """The samples, cut into what is written at a time."""
        return chunks_of(range(self.count), self.chunk_size)

    def folders(self) -> list[Path]:
        """The folders that files are written to, in this and every other format."""
        inside = [path for path in self.output.glob("[0-9]" * 6) if path.is_dir()]
        kept = self.output / "parts"
        return [self.output, self.output / SEALS, kept, kept / SEALS, self.output / "preview", *inside]

    @abstractmethod
    def missing(self, chunk: range) -> int:
        """Counts the samples of a chunk that are not there yet."""

    @abstractmethod
    def any_there(self) -> bool:
        """Whether the folder holds samples."""

    @abstractmethod
    def write(self, chunk: range) -> Iterator[str | None]:
        """Writes what is missing of a chunk, and says of each sample None or why there is nothing to show of it."""

    def finish(self) -> None:  # noqa: B027
        """Completes the whole once all chunks are written, if there is anything to do."""

    def _drawn(self, chunk: range) -> Iterator[tuple[range, Tensor]]:
        """Draws the samples of a chunk, as many at a time as are drawn together.

        Yields:
            Some of the samples, and the latents [64, D] from the first of them on, of which the last may be more than
            there are: decoding rounds as drawing does, so it gets the same number of rows always.
        """
        for samples in chunks_of(chunk, CHUNK):
            together = range(samples.start, samples.start + CHUNK)
            yield samples, sample_latents(self.pipeline, self.seed, together, **self.options)


def _seal_of(chunk: range) -> str:
    """Names the seal of a chunk; the same samples have the same, however many are asked for."""
    return f"{chunk.start:09d}"


class FolderOfSamples(Samples):
    """000000.png ... and whatever else a signal is shown by, named by the samples' numbers."""

    def files(self, sample: int) -> list[str]:
        """The files of one sample, below the folder."""
        return self.writer.files(f"{sample:06d}")

    def missing(self, chunk: range) -> int:
        """Counts the samples that lack a file, or have one that is not as it was written."""
        return len(self._missing(chunk))

    def _missing(self, chunk: range, tell: bool = True) -> dict[int, set[Path]]:
        """Finds the samples that are not whole, and the files that they lack."""
        files = {sample: [self.output / file for file in self.files(sample)] for sample in chunk}
        sound = self.seals.sound(_seal_of(chunk), chain.from_iterable(files.values()), tell)
        return {sample: set(paths) - sound for sample, paths in files.items() if not sound.issuperset(paths)}

    def any_there(self) -> bool:
        """Whether a name begins with six digits."""
        return any(self.output.glob("[0-9]" * 6 + "*"))

    def write(self, chunk: range) -> Iterator[str | None]:
        """Writes the files that are missing."""
        missing = self._missing(chunk, tell=False)
        for path in chain.from_iterable(missing.values()):
            path.unlink(missing_ok=True)  # writers keep what they find
        for samples, latents in self._drawn(chunk):
            some = [sample for sample in missing if sample in samples]
            yield from self._write_files(self.output, some, latents, samples.start)
        files = [self.output / file for sample in chunk for file in self.files(sample)]
        self.seals.seal(_seal_of(chunk), files, flush=False)

    def _write_files(self, folder: Path, samples: list[int], latents: Tensor, first: int) -> Iterator[str | None]:
        """Writes the files of ``samples``, whose latents are those from ``first`` on."""
        names = {sample - first: f"{sample:06d}" for sample in samples}
        yield from self.writer.write_each(self.decoder, self.signal, latents, folder, names, self.at_once)


class TarShards(FolderOfSamples):
    """samples-00000.tar ... as WebDataset reads them: a sample's files are neighbours of one name up to its first dot.

    A shard holds a chunk. Owner and times are left out, so that the same samples make the same bytes.
    """

    def path(self, chunk: range) -> Path:
        """The shard of a chunk."""
        return self.output / f"samples-{chunk.start // self.chunk_size:05d}.tar"

    def missing(self, chunk: range) -> int:
        """Counts all samples of a chunk or none."""
        path = self.path(chunk)
        return 0 if path in self.seals.sound(_seal_of(chunk), [path]) else len(chunk)

    def any_there(self) -> bool:
        """Whether there are shards."""
        return any(self.output.glob("samples-*.tar"))

    def write(self, chunk: range) -> Iterator[str | None]:
        """Writes a shard."""
        path = self.path(chunk)
        with (
            temporary_folder(path) as folder,
            written_atomically(path) as temporary,
            tarfile.open(temporary, "w") as archive,
        ):
            for samples, latents in self._drawn(chunk):
                yield from self._write_files(folder, list(samples), latents, samples.start)
                for sample in samples:
                    self._move(archive, folder, sample)
        self.seals.seal(_seal_of(chunk), [path])

    def _move(self, archive: tarfile.TarFile, folder: Path, sample: int) -> None:
        for file in self.files(sample):
            if (folder / file).exists():  # a shape without a surface has none
                member = tarfile.TarInfo(file.replace("/", "."))
                member.size = (folder / file).stat().st_size
                with (folder / file).open("rb") as content:
                    archive.addfile(member, content)
                (folder / file).unlink()


class NpzOfSamples(Samples):
    """samples.npz with one array, which `mnif fit`, `mnif encode` and `mnif eval` read, made of chunks at the end.

    ``images`` [N, H, W, C] uint8 of pictures, ``voxels`` [N, R, R, R] bool of shapes, ``views`` [N, V, H, W, 3] uint8
    of objects; ``pictures`` [N, H, W, 3] uint8 of other signals.
    """

    @property
    def path(self) -> Path:
        """The file that is made."""
        return self.output / "samples.npz"

    @property
    def kept(self) -> Chunks:
        """The chunks, which are there until the whole is."""
        return Chunks(self.output / "parts", "samples")

    @cached_property
    def _is_whole(self) -> bool:
        """Whether the file was there when the command began, as it was written."""
        return self.path in self.seals.sound(self.path.name, [self.path])

    def missing(self, chunk: range) -> int:
        """Counts all samples of a chunk or none."""
        return 0 if self._is_whole or chunk.start in self.kept else len(chunk)

    def any_there(self) -> bool:
        """Whether there is the file or a chunk of it."""
        return self.path.exists() or bool(self.kept)

    def write(self, chunk: range) -> Iterator[str | None]:
        """Writes a chunk."""
        arrays = []
        for samples, latents in self._drawn(chunk):
            arrays.append(self.writer.to_array(self.decoder, self.signal, latents, len(samples), self.at_once))
            yield from [None] * len(samples)
        self.kept.save(chunk.start, np.concatenate(arrays))

    def finish(self) -> None:
        """Puts the chunks together, one in memory at a time."""
        if not self._is_whole:
            self._join()
            self.seals.seal(self.path.name, [self.path])
        self.kept.remove()

    def _join(self) -> None:
        first = self.kept.load(0)
        header = {"descr": first.dtype.str, "fortran_order": False, "shape": (self.count, *first.shape[1:])}
        entry = zipfile.ZipInfo(f"{self.writer.array_name}.npy")  # of no date
        with (
            written_atomically(self.path) as temporary,
            zipfile.ZipFile(temporary, "w") as archive,
            archive.open(entry, "w", force_zip64=True) as file,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            for chunk in self.chunks():
                file.write(self.kept.load(chunk.start).tobytes())


FORMATS: dict[str, type[Samples]] = {"folder": FolderOfSamples, "tar": TarShards, "npz": NpzOfSamples}

_ROWS = 8  # ways on the sheet of an interpolation


@torch.no_grad()
def save_preview(samples: Samples, count: int) -> None:
    """Writes preview/grid.png, the first ``count`` samples at the training resolution."""
    count = min(count, samples.count)
    latents = sample_latents(samples.pipeline, samples.seed, range(count), **samples.options)
    pictures = np.concatenate([samples.signal.images(samples.decoder, latent) for latent in latents.split(CHUNK)])
    sheet = image_grid(pictures, columns=min(count, 8), scale=_scale(pictures))
    save_image(samples.output / "preview" / "grid.png", sheet)


@torch.no_grad()
def save_interpolation(samples: Samples, steps: int) -> None:
    """Writes preview/interpolation.png, a row for each way from a sample to the next, and all of them as a .gif.

    A way leads through the noise (:func:`latent_prior.sampling.slerp`), so that every picture on it is a sample; it is
    cut into ``steps`` parts. Its pictures have the resolution that samples are written with.
    """
    count = min(samples.count, _ROWS + 1)
    noise = initial_noise(samples.seed, range(count), samples.decoder.config.latent_dim)
    ways = []
    for start, end in pairwise(noise):
        way = torch.from_numpy(slerp(start, end, np.linspace(0, 1, steps + 1)))
        latents = denoised(samples.pipeline, way, **samples.options)
        ways.append(samples.writer.images(samples.decoder, samples.signal, latents))
    pictures = np.concatenate(ways)
    folder, scale = samples.output / "preview", _scale(pictures)
    save_image(folder / "interpolation.png", image_grid(pictures, columns=steps + 1, scale=scale))
    frames = np.concatenate([ways[0], *(way[1:] for way in ways[1:])])  # an end is the next beginning
    save_animation(folder / "interpolation.gif", frames.repeat(scale, axis=1).repeat(scale, axis=2))


def _scale(pictures: np.ndarray) -> int:
    """Enlarges small pictures to 64 pixels."""
    return max(1, 64 // pictures.shape[1])
