"""How well a model of voxels draws what it is given, beside PCA with as many numbers and the mean shape."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evals.metrics.occupancy import joined, mean_figures, occupancy_scores
from evals.metrics.shape_distances import chamfer_distance
from evals.metrics.surfaces import SHOWN, surfaces_of_grids
from evals.stages import Stages
from mnif.data import Split, VoxelData
from mnif.meshes import occupancy_preview
from mnif.pca import PCA, fit_pca
from mnif.pictures import picture_grid, save_picture
from mnif.rows import Rows

PIXELS = 96  # of a picture of a shape
_BATCH = 32  # shapes drawn at a time
_SURFACES = 128  # shapes of a side whose surfaces are compared, evenly spread
_PCA_NUMBERS = 1 << 27  # of training shapes; where there are more, PCA is fitted to every n-th

Draw = Callable[[Tensor, Tensor], Tensor]
"""Latents [B, D] and originals [B, R, R, R, 1] → values in the form of the originals."""


def pca_of_shapes(data: VoxelData, train: np.ndarray, components: int) -> PCA:
    """Principal components of training shapes [N_train rows] as values -1 and 1; fewer where there are few shapes."""
    numbers = data.resolution**3
    some = train[:: -(-len(train) * numbers // _PCA_NUMBERS)]
    values = data.occupancy(some).astype(np.float32) * 2 - 1
    return fit_pca(values, min(components, len(some), numbers))


@dataclass(frozen=True)
class ShapeReconstructions:
    """Measures one model's reconstructions of a reference.

    Attributes:
        stages: the model.
        data: the reference.
        sides: [N] of :class:`mnif.data.Split`.
        pca: of the training shapes.
        refinement_steps: for latents of shapes not trained on.
        pictures: folder for originals above reconstructions.
    """

    stages: Stages
    data: VoxelData
    sides: np.ndarray
    pca: PCA
    refinement_steps: int
    pictures: Path

    def figures(self) -> dict[str, float]:
        """Of every side that has shapes: ``psnr``, ``iou``, ``accuracy`` and ``chamfer``, means with standard errors.

        Each for the model, for PCA (``iou_pca_heldout``) and for the mean shape; ``chamfer_floor_…`` is that of other
        points on the same surfaces, which no reconstruction beats; ``no_surface_…`` counts reconstructions that are
        empty or full, which the mean chamfer distance leaves out.
        """
        found: dict[str, float] = {"pca_components": len(self.pca.components)}
        for part, side in (("train", Split.TRAIN), ("heldout", Split.HELD_OUT), ("test", Split.TEST)):
            chosen = np.flatnonzero(self.sides == side)
            if len(chosen):
                rows, latents = self.stages.latents(self.data, self.sides, side, self.refinement_steps)
                found |= self._side(part, chosen, rows, latents.cpu())
        return found

    def _side(self, part: str, chosen: np.ndarray, rows: Rows, latents: Tensor) -> dict[str, float]:
        picked = np.unique(np.linspace(0, len(chosen) - 1, min(_SURFACES, len(chosen))).round().astype(int))
        ids = [self.data.ids[row] for row in chosen[picked]]
        grids = self.data.occupancy(chosen[picked]).astype(np.float32)
        originals = surfaces_of_grids(grids, ids, level=0.5).points
        again = surfaces_of_grids(grids, [f"{id} again" for id in ids], level=0.5).points
        found = mean_figures({"chamfer": _pairwise(again, originals)}, f"floor_{part}")
        for name, draw in {"": self._decoded, "pca_": self._projected, "mean_": self._mean}.items():
            pairs = self._batches(rows, latents)
            scores = joined([occupancy_scores(draw(some, targets), targets) for some, targets in pairs])
            found |= mean_figures(scores, f"{name}{part}")
            drawn = np.concatenate(
                [
                    draw(some, targets)[..., 0].numpy()
                    for some, targets in self._batches(rows.subset(picked), latents[picked])
                ]
            )
            surfaces = surfaces_of_grids(drawn, [f"{name}reconstruction of {id}" for id in ids], level=0.0)
            found[f"no_surface_{name}{part}"] = surfaces.empty + surfaces.full
            if len(distances := _pairwise(surfaces.points, originals)):
                found |= mean_figures({"chamfer": distances}, f"{name}{part}")
            if not name:
                self._save_picture(part, grids > 0.5, drawn > 0)
        return found

    def _batches(self, rows: Rows, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and what they should draw."""
        for batch, some in zip(rows.batches(_BATCH), latents.split(_BATCH), strict=True):
            yield some, self.stages.signal.observe(batch).values

    @torch.no_grad()
    def _decoded(self, latents: Tensor, originals: Tensor) -> Tensor:
        decoder = self.stages.decoder
        return decoder(latents.to(decoder.device)).cpu()

    def _projected(self, latents: Tensor, originals: Tensor) -> Tensor:
        return torch.from_numpy(self.pca.reconstruct(originals.numpy()))

    def _mean(self, latents: Tensor, originals: Tensor) -> Tensor:
        return torch.from_numpy(self.pca.mean).view(originals.shape[1:]).expand_as(originals)

    def _save_picture(self, part: str, originals: np.ndarray, drawn: np.ndarray) -> None:
        some = np.linspace(0, len(originals) - 1, min(SHOWN, len(originals))).round().astype(int)
        views = [occupancy_preview(shape, PIXELS) for shape in (*originals[some], *drawn[some])]
        save_picture(self.pictures / f"reconstructions_{part}.png", picture_grid(views, columns=len(some)))


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The chamfer distance of each shape of ``a`` [N, P, 3] to its own in ``b``, of those that have both surfaces."""
    both = ~np.isnan(a[:, 0, 0]) & ~np.isnan(b[:, 0, 0])
    return np.array([chamfer_distance(first, second) for first, second in zip(a[both], b[both], strict=True)])
