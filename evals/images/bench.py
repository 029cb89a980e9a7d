"""Where features are made: one extractor and one protocol, shared by all sets of pictures of an evaluation."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from evals.features import Extractor, extract_features
from evals.images.sources import PictureSource
from evals.processes import Processes
from evals.protocols import Protocol
from evals.shards import computed_in_shards
from mnif.files import cache_folder

T = TypeVar("T")


def stated(protocol: Protocol, extractor: Extractor, size: tuple[int, int]) -> dict[str, str]:
    """What another number must agree in to be comparable, for pictures of a size."""
    return extractor.protocol() | {"resize": protocol.resize, "resolution": f"{size[0]}×{size[1]}"}


@dataclass(frozen=True)
class Bench:
    """What every set of pictures goes through.

    Attributes:
        protocol: how they are compared.
        extractor: its extractor, loaded.
        processes: who share the work; all call the same methods in the same order.
        scratch: folder for what a later command does not need; it is what a killed evaluation continues from.
    """

    protocol: Protocol
    extractor: Extractor
    processes: Processes
    scratch: Path

    def features(self, pictures: PictureSource, description: str, keep: bool = False) -> np.ndarray:
        """Features of pictures, memory-mapped: [count, D] float32.

        Args:
            pictures: of one size.
            description: for the progress bar.
            keep: in the cache folder, for further evaluations against the same data.
        """

        def compute(images: np.ndarray) -> np.ndarray:
            return extract_features(images, self.extractor, self.protocol.resizing, progress=False)

        key = [pictures.fingerprint, pictures.count, stated(self.protocol, self.extractor, pictures.size)]
        width = self.extractor.dimension
        return self.rows(key, pictures.count, width, pictures.read, compute, f"features: {description}", keep)

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
        """Any numbers [count, width] of pictures, shared out likewise; ``key`` is all that they depend on."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        folder = cache_folder() / "features" if keep else self.scratch
        path, pieces = folder / f"{name}.npy", self.scratch / f"{name}.pieces"
        return computed_in_shards(path, pieces, count, width, load, compute, self.processes, description)
