"""How far drawn pictures or shapes are from a run's data: what benchmarks of stage two measure again and again.

Leaner than `mnif eval`, which also measures reconstructions: features of real pictures and of controls are made once.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol as Interface

import numpy as np
import torch

from evals.arguments import PRESETS
from evals.features import extractor_by_name
from evals.features.extractor import FeatureCache, IndexedImages
from evals.image_sets import data_images, latent_images, novelty_metrics, reference_of
from evals.loaded_run import gaussian_latents, splits_of
from evals.metrics.frechet import frechet_distance, moments_of
from evals.metrics.neighbours import memorisation_metrics
from evals.metrics.shapes import surfaces_of_grids
from evals.voxel_sets import comparison_metrics, real_shapes, shape_novelty
from mnif.data.dataset import Split
from mnif.data.images import load_images
from mnif.data.voxels import load_voxels
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.utils.json_files import read_json
from mnif.utils.process import Processes


class Judge(Interface):
    """Measures what latents of a run draw."""

    table: LatentTable
    distance: str
    """The metric that says how far samples are from the data."""

    def of_latents(self, latents: np.ndarray) -> dict[str, float]:
        """Measures latents [N, D]: ``distance``, ``nn_ratio`` and ``nn_ratio_latents`` are among the metrics."""

    def controls(self, count: int) -> dict[str, dict[str, float]]:
        """Measures ``gaussian`` and ``held_out`` latents, and the ``real`` data."""


def judge_of(run: Path) -> Judge:
    """Makes the judge of the signal of a run folder of `mnif fit`."""
    arguments = read_json(run / "run.json")["fit"]["arguments"]
    decoder = load_component(MNIFModel, run / "model", "decoder")
    table = LatentTable.load(run / "latents.safetensors", decoder.fingerprint())
    kind = PictureJudge if decoder.config.signal == "image" else ShapeJudge
    return kind(decoder, table, arguments["data"])


@dataclass
class PictureJudge:
    """Fréchet distances of EfficientNet-Lite0's features to one half of the real pictures."""

    decoder: MNIFModel
    table: LatentTable
    source: str
    distance: str = "fd_lite0"

    def __post_init__(self) -> None:
        size = self.decoder.config.resolution
        self.data = load_images(self.source, size if isinstance(size, int) else tuple(size))
        extractor = extractor_by_name("lite0", None, torch.device("cpu"))
        self.cache = FeatureCache(PRESETS["offline"].resize, extractor, Processes(), Path("runs/judged"))
        self.real = self.cache.features(data_images(self.data), "real pictures", keep=True)
        self.splits = splits_of(self.table, self.data)
        self.reference = reference_of(self.data, self.splits, "half")
        self.moments = moments_of(self.real[self.reference.rows])

    def of_latents(self, latents: np.ndarray) -> dict[str, float]:
        name = hashlib.sha256(latents.tobytes()).hexdigest()
        pictures = latent_images(self.decoder, latents, f"{self.decoder.fingerprint()} {name}", quantise=True)
        return self.of_pictures(pictures) | memorisation_metrics(latents, self.table)

    def of_pictures(self, pictures: IndexedImages) -> dict[str, float]:
        features = self.cache.features(pictures, "samples")
        parts = (self.real[self.splits == split] for split in (Split.HELD_OUT, Split.TRAIN))
        return self._frechet(features) | novelty_metrics(features, *parts)[0]

    def controls(self, count: int) -> dict[str, dict[str, float]]:
        held_out = self.table.latents[self.table.held_out].numpy()[:count]
        return {
            "gaussian": self.of_latents(gaussian_latents(self.table, count, seed=0)),
            "held_out": self.of_latents(held_out),
            "real": self._frechet(self.real[self.reference.floor[:count]]),
        }

    def _frechet(self, features: np.ndarray) -> dict[str, float]:
        return {self.distance: frechet_distance(moments_of(features), self.moments)}


@dataclass
class ShapeJudge:
    """Chamfer distances of surfaces: how well a nearest neighbour tells drawn shapes from unseen real ones."""

    decoder: MNIFModel
    table: LatentTable
    source: str
    distance: str = "nna_chamfer"

    def __post_init__(self) -> None:
        self.data = load_voxels(self.source)
        self.splits = splits_of(self.table, self.data)
        self.real = real_shapes(self.data, self.splits)

    @torch.no_grad()
    def of_latents(self, latents: np.ndarray) -> dict[str, float]:
        some = torch.from_numpy(latents[: len(self.real.reference)])
        grids = (grid for part in some.split(32) for grid in self.decoder(part)[..., 0].numpy())
        shapes = surfaces_of_grids(grids, [f"sample {row}" for row in range(len(some))], level=0.0)
        found = comparison_metrics({"": shapes.points}, self.real, "chamfer")
        novelty = shape_novelty(shapes.points, self.data, self.splits)[0]
        return found | novelty | memorisation_metrics(latents, self.table)

    def controls(self, count: int) -> dict[str, dict[str, float]]:
        gaussian = self.of_latents(gaussian_latents(self.table, count, seed=0))
        return {
            "gaussian": gaussian,
            "held_out": self.of_latents(self.table.latents[self.table.held_out].numpy()[:count]),
            "real": {name.removesuffix("_floor"): gaussian[name] for name in gaussian if name.endswith("_floor")},
        }
