"""Feature extractors by name: pictures → vectors that distances are taken in.

Each is a class of its own: :mod:`evals.features.lite0` comes with its weights and works offline,
:mod:`evals.features.resnet` is of another family, :mod:`evals.features.inception` is the network of FID. Another one
is a subclass of :class:`Extractor` that :func:`evals.features.extractor_by_name` knows.
"""

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import onnx
import onnxruntime
import torch

from evals.features.resize import RESIZES, Resize
from latent_prior.sampling import CHUNK
from mnif.utils.errors import UserError
from mnif.utils.files import cache_folder
from mnif.utils.process import Processes, progress_bar
from mnif.utils.published import PublishedFile, downloaded
from mnif.utils.resumable import compute_in_chunks

_PICTURES_AT_ONCE = 256

_CUDA = "CUDAExecutionProvider"

_BATCH_SIZE = 2  # pictures a thread takes at a time; small batches stay in the cache and are the fastest

_GPU_BATCH_SIZE = 64


class Extractor(ABC):
    """A network whose last pooled activations are features.

    Attributes:
        name: as on the command line.
        frechet: what a Fréchet distance in its features is called; "fid" is Inception's alone.
        kernel: what a kernel distance is called; "kid" likewise.
        suffix: what other metrics in its features end with.
        dimension: features of a picture.
        size: pixels per axis that it looks at.
    """

    name: ClassVar[str]
    frechet: ClassVar[str]
    kernel: ClassVar[str]
    suffix: ClassVar[str]
    dimension: ClassVar[int]
    size: ClassVar[int]

    @abstractmethod
    def protocol(self) -> dict[str, str]:
        """Returns what a stored number must state of the extractor: network, hash of the weights, normalisation."""

    @abstractmethod
    def features(self, images: np.ndarray, resize: Resize) -> Iterator[np.ndarray]:
        """Yields features of pictures [N, H, W, 3], uint8 or float32 in 0..255: [n, dimension] float32, in order.

        Resizing goes on while the network is at work.
        """


class OnnxExtractor(Extractor):
    """A network in ONNX Runtime, on a CPU on as many threads as torch is set to (``torch.set_num_threads``).

    Args:
        session: ``pixels`` [N, size, size, 3] float32, RGB in 0..255 → features [N, dimension].
    """

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session

    def features(self, images: np.ndarray, resize: Resize) -> Iterator[np.ndarray]:
        """Yields features of pictures, each at least 0."""
        at_once = _GPU_BATCH_SIZE if _CUDA in self._session.get_providers() else _BATCH_SIZE

        def features_of(start: int) -> np.ndarray:
            pixels = resize(images[start : start + at_once], self.size)
            return self._session.run(None, {"pixels": pixels})[0]

        # A convolution of one picture is too small to share: two threads that have pictures of their own were
        # measured to be 1.6 times as fast as two threads that work on each picture together.
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            yield from threads.map(features_of, range(0, len(images), at_once))


def session_on(device: torch.device | str, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Loads a model for a device: an NVIDIA GPU where ONNX Runtime can use it (``onnxruntime-gpu``), else the CPU.

    On a GPU it multiplies float32 itself, not TF32. On the CPU a call takes one thread.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers: list[str | tuple[str, dict[str, str]]] = ["CPUExecutionProvider"]
    place = torch.device(device)
    if place.type == "cuda" and _CUDA in onnxruntime.get_available_providers():
        # An exhaustive search for the fastest convolution might choose another one next time.
        settings = {"device_id": str(place.index or 0), "use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
        providers.insert(0, (_CUDA, settings))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)


def extract_features(
    images: np.ndarray, extractor: Extractor, resize: Resize, progress: bool = True, description: str = "features"
) -> np.ndarray:
    """Computes the features of pictures; neither batches nor threads change them.

    Args:
        images: [N, H, W, 3], RGB, of any size: uint8, or float32 in 0..255.
        extractor: from :func:`evals.features.extractor_by_name`.
        resize: one of :data:`evals.features.resize.RESIZES`.
        progress: whether to show a bar with rate and remaining time on stderr.
        description: what the bar is called.

    Returns:
        [N, extractor.dimension] float32.

    Raises:
        UserError: the images are of another type or shape, or features come out as NaN or infinity.
    """
    good = images.dtype in (np.uint8, np.float32) and images.ndim == 4 and images.shape[3] == 3
    if not good or 0 in images.shape[1:3]:
        raise UserError(f"features: images are {images.dtype} {list(images.shape)}; uint8 [N, H, W, 3] is needed")
    found = np.empty((len(images), extractor.dimension), dtype=np.float32)
    with progress_bar(total=len(images), desc=description, unit="image", disable=not progress) as bar:
        for start in range(0, len(images), _PICTURES_AT_ONCE):
            place = start
            for batch in extractor.features(images[start : start + _PICTURES_AT_ONCE], resize):
                found[place : place + len(batch)] = batch
                place += len(batch)
                bar.update(len(batch))
    if not np.isfinite(found).all():
        row = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise UserError(f"features: picture {row} of {description} gives NaN or infinity; look at it")
    return found


@dataclass(frozen=True)
class IndexedImages:
    """Pictures of one size, read when they are asked for.

    Attributes:
        count: how many.
        size: height and width.
        fingerprint: changes with their content.
        read: row numbers → [n, H, W, 3] uint8, or float32 in 0..255 where they are not rounded; from any thread.
    """

    count: int
    size: tuple[int, int]
    fingerprint: str
    read: Callable[[range], np.ndarray]

    def first(self, count: int) -> "IndexedImages":
        """Returns only the first ``count`` of them."""
        return IndexedImages(min(count, self.count), self.size, self.fingerprint, self.read)


T = TypeVar("T")


@dataclass(frozen=True)
class FeatureCache:
    """Numbers of pictures, kept on disk: what every set of pictures goes through.

    Attributes:
        resize: one of :data:`evals.features.resize.RESIZES`, by name.
        extractor: of features, loaded.
        processes: who share the work; all call the same methods in the same order.
        scratch: folder for what a later command does not need; it is what a killed evaluation continues from.
    """

    resize: str
    extractor: Extractor
    processes: Processes
    scratch: Path

    def protocol(self, size: tuple[int, int]) -> dict[str, str]:
        """Returns what another number must agree in to be comparable, for pictures of a size [height, width]."""
        return self.extractor.protocol() | {"resize": self.resize, "resolution": f"{size[0]}×{size[1]}"}

    def features(self, images: IndexedImages, description: str, keep: bool = False) -> np.ndarray:
        """Computes features of pictures, or finds them: [count, D] float32, memory-mapped.

        Args:
            images: of one size.
            description: for the progress bar.
            keep: in the cache folder, for further evaluations against the same data.
        """

        def compute(images: np.ndarray) -> np.ndarray:
            return extract_features(images, self.extractor, RESIZES[self.resize], progress=False)

        key = [images.fingerprint, images.count, self.protocol(images.size)]
        width = self.extractor.dimension
        return self.rows(key, images.count, width, images.read, compute, f"features: {description}", keep)

    def rows(
        self,
        key: object,
        count: int,
        width: int,
        load: Callable[[range], T],
        compute: Callable[[T], np.ndarray],
        description: str,
        keep: bool = False,
    ) -> np.ndarray:
        """Computes any numbers [count, width] of pictures likewise; ``key`` is all that they depend on."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_folder() / "features" if keep else self.scratch
        path, chunks = folder / f"{name}.npy", self.scratch / f"{name}.chunks"
        return compute_in_chunks(path, chunks, count, width, CHUNK, load, compute, self.processes, description)


@dataclass(frozen=True)
class PublishedWeights(PublishedFile):
    """Weights as their makers published them.

    Attributes:
        variable: of the environment, which names a copy.
        flag: of the command line, likewise; None if there is none.
        instead: what else can be done without them.
    """

    variable: str
    flag: str | None
    instead: str


def found_weights(weights: PublishedWeights, given: Path | None = None) -> Path:
    """Finds the file: ``given``, else what the environment names, else the cached one, else it is downloaded.

    Raises:
        UserError: the file named does not exist or has another hash, or it cannot be downloaded.
    """
    named = given or (Path(named) if (named := os.environ.get(weights.variable)) else None)
    cached = cache_folder() / "weights" / weights.name
    path = named or cached
    consequence = f"with other weights the distance would not be the published one; {weights.instead}"
    if path.is_file():
        weights.check(path, consequence)
        return path
    if named is not None:
        raise UserError(f"{path}: no such file; {weights.name} ({weights.size:,} bytes) is needed")
    names = " or ".join(filter(None, (weights.flag, weights.variable)))
    instead = f"put it there or name it with {names}; {weights.url} has it; {weights.instead}"
    return downloaded(weights, cached.parent, consequence, instead)
