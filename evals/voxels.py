"""Shapes as `mnif eval` measures them, samples and reconstructions, beside PCA and the mean shape.

The main process does all of it; the work is bounded by the size of the reference, not by the number of samples.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.arguments import EvalArguments
from evals.evaluator import Evaluator, register_evaluator
from evals.loaded_run import SPLITS, LoadedRun, drawn_latents, gaussian_latents, load_run
from evals.metrics.neighbours import memorisation_metrics
from evals.metrics.reconstruction import PROTOCOL, joined, mean_metrics, occupancy_scores
from evals.metrics.shapes import POINTS, SHOWN, Surfaces, chamfer_distance, surfaces_of_grids
from evals.voxel_sets import (
    LEAST,
    RealShapes,
    ShapeFiles,
    comparison_metrics,
    real_shapes,
    set_size,
    shape_files,
    shape_novelty,
)
from mnif.data.batches import ArrayDataset, evenly_spaced
from mnif.data.dataset import Split
from mnif.data.voxels import VoxelData, load_voxels
from mnif.latents.pca import PCA, fit_pca, pca_warnings
from mnif.utils.errors import UserError
from mnif.utils.meshes import mesh_preview, occupancy_preview
from mnif.utils.model_folders import sha256_of_model
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import Processes

PIXELS = 96  # of a picture of a shape

_BATCH = 32  # shapes drawn at a time

_SURFACES = 128  # shapes of a split whose surfaces are compared, evenly spread

_PCA_NUMBERS = 1 << 27  # of training shapes; where there are more, PCA is fitted to every n-th

Draw = Callable[[Tensor, Tensor], Tensor]
"""Latents [B, D] and originals [B, R, R, R, 1] → values in the form of the originals."""


def pca_of_shapes(data: VoxelData, train: np.ndarray, components: int) -> PCA:
    """Fits principal components to training shapes as values -1 and 1; fewer where there are few shapes."""
    numbers = data.resolution**3
    some = train[:: -(-len(train) * numbers // _PCA_NUMBERS)]
    values = data.occupancy(some).astype(np.float32) * 2 - 1
    return fit_pca(values, min(components, len(some), numbers))


@dataclass(frozen=True)
class VoxelReconstructions:
    """Measures one model's reconstructions of a reference.

    Attributes:
        run: the model.
        data: the reference.
        splits: [N] of :class:`mnif.data.dataset.Split`.
        pca: of the training shapes.
        refinement_steps: for latents of shapes not trained on.
        output_dir: gets pictures of originals above reconstructions.
    """

    run: LoadedRun
    data: VoxelData
    splits: np.ndarray
    pca: PCA
    refinement_steps: int
    output_dir: Path

    def metrics(self) -> dict[str, float]:
        """Measures ``psnr``, ``iou``, ``accuracy`` and ``chamfer`` of every split, means with standard errors.

        Each for the model, for PCA (``iou_pca_heldout``) and for the mean shape; ``chamfer_floor_…`` is that of other
        points on the same surfaces, which no reconstruction beats; ``no_surface_…`` counts reconstructions that are
        empty or full, which the mean chamfer distance leaves out.
        """
        metrics: dict[str, float] = {"pca_components": len(self.pca.components)}
        for name, split in SPLITS.items():
            chosen = np.flatnonzero(self.splits == split)
            if len(chosen):
                rows, latents = self.run.latents(self.data, self.splits, split, self.refinement_steps)
                metrics |= self._metrics_of_split(name, chosen, rows, latents.cpu())
        return metrics

    def _metrics_of_split(
        self, split: str, chosen: np.ndarray, rows: ArrayDataset, latents: Tensor
    ) -> dict[str, float]:
        picked = evenly_spaced(len(chosen), _SURFACES)
        ids = [self.data.ids[row] for row in chosen[picked]]
        grids = self.data.occupancy(chosen[picked]).astype(np.float32)
        originals = surfaces_of_grids(grids, ids, level=0.5).points
        again = surfaces_of_grids(grids, [f"{id} again" for id in ids], level=0.5).points
        metrics = mean_metrics({"chamfer": _pairwise(again, originals)}, f"floor_{split}")
        for name, draw in {"": self._decoded, "pca_": self._projected, "mean_": self._mean}.items():
            batches = self._batches(rows, latents)
            scores = joined([occupancy_scores(draw(some, targets), targets) for some, targets in batches])
            metrics |= mean_metrics(scores, f"{name}{split}")
            batches = self._batches(rows.subset(picked), latents[picked])
            drawn = np.concatenate([draw(some, targets)[..., 0].numpy() for some, targets in batches])
            surfaces = surfaces_of_grids(drawn, [f"{name}reconstruction of {id}" for id in ids], level=0.0)
            metrics[f"no_surface_{name}{split}"] = surfaces.empty + surfaces.full
            if len(distances := _pairwise(surfaces.points, originals)):
                metrics |= mean_metrics({"chamfer": distances}, f"{name}{split}")
            if not name:
                self._save_image(split, grids > 0.5, drawn > 0)
        return metrics

    def _batches(self, rows: ArrayDataset, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields latents [B, D] and the originals [B, R, R, R, 1] they should draw."""
        for batch, some in zip(rows.batches(_BATCH), latents.split(_BATCH), strict=True):
            yield some, self.run.signal.observe(batch).values

    @torch.no_grad()
    def _decoded(self, latents: Tensor, originals: Tensor) -> Tensor:
        decoder = self.run.decoder
        return decoder(latents.to(decoder.device)).cpu()

    def _projected(self, latents: Tensor, originals: Tensor) -> Tensor:
        return torch.from_numpy(self.pca.reconstruct(originals.numpy()))

    def _mean(self, latents: Tensor, originals: Tensor) -> Tensor:
        return torch.from_numpy(self.pca.mean).view(originals.shape[1:]).expand_as(originals)

    def _save_image(self, split: str, originals: np.ndarray, drawn: np.ndarray) -> None:
        some = evenly_spaced(len(originals), SHOWN)
        views = [occupancy_preview(shape, PIXELS) for shape in (*originals[some], *drawn[some])]
        save_image(self.output_dir / f"reconstructions_{split}.png", image_grid(views, columns=len(some)))


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Computes the chamfer distance of each shape of ``a`` [N, P, 3] to its own in ``b``, where both have surfaces."""
    both = ~np.isnan(a[:, 0, 0]) & ~np.isnan(b[:, 0, 0])
    return np.array([chamfer_distance(first, second) for first, second in zip(a[both], b[both], strict=True)])


@register_evaluator
class VoxelEvaluator(Evaluator):
    """Measures a model of voxels, or drawn shapes from files (:mod:`evals.voxel_sets`).

    Raises:
        UserError: the model, the samples or the reference cannot be read, or too few samples are asked for.
    """

    signal = "voxels"

    def __init__(self, arguments: EvalArguments) -> None:
        super().__init__(arguments)
        if arguments.num_samples is not None and arguments.num_samples < LEAST:
            raise UserError(f"--num_samples {arguments.num_samples}: at least {LEAST} shapes are needed")
        if arguments.emd_points < 0:
            raise UserError(f"--emd_points {arguments.emd_points}: at least 0 is needed")
        self.subject: LoadedRun | ShapeFiles
        if arguments.model is not None:
            self.subject = load_run(arguments.model)
            data = self.subject.signal.load_like(arguments.reference)
            assert isinstance(data, VoxelData)
            self.data, self.measured = data, sha256_of_model(arguments.model)
        else:
            assert arguments.samples is not None
            self.subject = shape_files(arguments.samples)
            self.data, self.measured = load_voxels(arguments.reference), self.subject.fingerprint()

    def inputs(self) -> dict[str, str]:
        """Returns the fingerprints of model or samples and of the reference."""
        return {"measured": self.measured, "reference_fingerprint": self.data.fingerprint()}

    def evaluate(self, processes: Processes) -> dict[str, Any]:
        """Measures a model's reconstructions, and its samples if it has a prior; or the samples."""
        if not processes.is_main:
            return {}
        if isinstance(self.subject, LoadedRun):
            self.subject.to(processes.device)
            return self._evaluate_model(self.subject)
        splits = self.data.split(self.arguments.held_out_fraction, self.arguments.test_fraction)
        real = real_shapes(self.data, splits)
        return self._compare({"": self.subject.surfaces(self._count(real))}, real, splits)

    def _evaluate_model(self, run: LoadedRun) -> dict[str, Any]:
        arguments, data = self.arguments, self.data
        splits = run.splits(data, arguments.held_out_fraction, arguments.test_fraction)
        train = np.flatnonzero(splits == Split.TRAIN)
        if not len(train):
            raise UserError(f"--reference {arguments.reference}: none of it was trained on; lower --held_out_fraction")
        pca = pca_of_shapes(data, train, run.decoder.config.latent_dim)
        reconstructions = VoxelReconstructions(
            run, data, splits, pca, arguments.refinement_steps, arguments.output_dir
        )
        metrics: dict[str, Any] = reconstructions.metrics()
        metrics["warnings"] = [
            f"{metrics[name]} reconstructions of {split} shapes have no surface; chamfer_{split} leaves them out"
            for split in SPLITS
            if metrics.get(name := f"no_surface_{split}")
        ] + pca_warnings(metrics["pca_components"], len(train))
        if run.pipeline is None:
            return metrics | {"protocol": self._protocol(splits)}
        real, seed = real_shapes(data, splits), arguments.seed
        latents = drawn_latents(run.pipeline, self._count(real), seed, arguments.num_inference_steps)
        drawn = {"": _surfaces(run, latents, "sample"), "_pca": _gaussian_pca(pca, data, train, len(latents), seed)}
        if run.table is not None:
            gaussian = torch.from_numpy(gaussian_latents(run.table, len(latents), seed))
            drawn["_gaussian"] = _surfaces(run, gaussian, "Gaussian latent")
            if run.table.held_out.any():
                metrics |= memorisation_metrics(latents.cpu().numpy(), run.table)
        compared = self._compare(drawn, real, splits)
        return metrics | compared | {"warnings": metrics["warnings"] + compared["warnings"]}

    def _count(self, real: RealShapes) -> int:
        """Returns how many samples are measured: no more than there are real shapes to compare with."""
        return min(self.arguments.num_samples or len(real.reference), len(real.reference))

    def _compare(self, drawn: Mapping[str, Surfaces], real: RealShapes, splits: np.ndarray) -> dict[str, Any]:
        """Compares sets of drawn shapes with real ones, and shows some samples above the nearest training shapes.

        Args:
            drawn: what a set's metrics end with ("" for the samples, "_gaussian" …) → its surfaces.
            real: the real shapes.
            splits: [N] of :class:`mnif.data.dataset.Split`.

        Returns:
            The metrics with their protocol and warnings.
        """
        samples, emd_points = drawn[""], min(self.arguments.emd_points, POINTS)
        if len(samples) < LEAST:
            raise UserError(f"{len(samples)} drawn shapes; at least {LEAST} are needed")
        points = {ending: surfaces.points for ending, surfaces in drawn.items()}
        metrics: dict[str, Any] = {}
        for ending, surfaces in drawn.items():
            metrics |= {f"empty_shapes{ending}": surfaces.empty, f"full_shapes{ending}": surfaces.full}
        metrics |= comparison_metrics(points, real, "chamfer")
        if emd_points:
            metrics |= comparison_metrics(points, real, "emd", emd_points)
        if (splits == Split.TRAIN).any():
            novelty, nearest = shape_novelty(samples.points, self.data, splits)
            metrics |= novelty
            self._save_nearest(samples, nearest)
        protocol = self._protocol(splits) | {
            "reference_part": real.part,
            "shapes_of_each_set": set_size(points, real),
            "real_shapes_without_surface": real.left_out,
            "emd_points": emd_points,
        }
        return metrics | {"protocol": protocol, "warnings": _warnings(samples, set_size(points, real))}

    def _save_nearest(self, samples: Surfaces, nearest: np.ndarray) -> None:
        shapes = self.data.occupancy(nearest[:SHOWN])
        shapes[~samples.present[:SHOWN]] = False  # what has no surface has no neighbour
        below = [occupancy_preview(shape, PIXELS) for shape in shapes]
        above = [mesh_preview(*mesh, PIXELS) for mesh in samples.meshes]
        save_image(self.arguments.output_dir / "nearest.png", image_grid([*above, *below], columns=len(above)))

    def _protocol(self, splits: np.ndarray) -> dict[str, Any]:
        """Returns all that another number must share to be comparable."""
        return {
            "reference": self.arguments.reference,
            "resolution": f"{self.data.resolution}³",
            "surface": f"marching cubes at one half, {POINTS} points by area, coordinates of the grid in [-1, 1]",
            "chamfer": "sum of the two mean squared distances",
            "occupancy": PROTOCOL,
            "seed": self.arguments.seed,
            "train_shapes": int((splits == Split.TRAIN).sum()),
            "held_out_shapes": int((splits == Split.HELD_OUT).sum()),
            "test_shapes": int((splits == Split.TEST).sum()),
        }


def _surfaces(run: LoadedRun, latents: Tensor, name: str) -> Surfaces:
    """Decodes latents [N, D] to surfaces."""
    decoder = run.decoder

    @torch.no_grad()
    def grids(some: Tensor) -> np.ndarray:
        return decoder(some.to(decoder.device))[..., 0].float().cpu().numpy()

    every = (grid for some in latents.split(_BATCH) for grid in grids(some))
    return surfaces_of_grids(every, [f"{name} {row}" for row in range(len(latents))], level=0.0)


def _gaussian_pca(pca: PCA, data: VoxelData, train: np.ndarray, count: int, seed: int) -> Surfaces:
    """Draws shapes from a Gaussian over principal components, with the surface where its values are 0."""
    spread = np.zeros(len(pca.components))
    for rows in np.array_split(train, -(-len(train) // 256)):
        values = data.occupancy(rows).reshape(len(rows), -1).astype(np.float32) * 2 - 1
        spread += np.square((values - pca.mean) @ pca.components.T).sum(axis=0)
    drawn = np.random.default_rng([seed, 2]).standard_normal((count, len(spread))) * np.sqrt(spread / len(train))
    grids = ((row @ pca.components + pca.mean).reshape((data.resolution,) * 3) for row in drawn)
    return surfaces_of_grids(grids, [f"PCA {row}" for row in range(count)], level=0.0)


def _warnings(samples: Surfaces, count: int) -> list[str]:
    lines = []
    if samples.empty or samples.full:
        lines.append(f"{samples.empty} samples are empty and {samples.full} full; they cover and match nothing")
    if count < 100:
        lines.append(f"{count} shapes in each set: coverage and 1-NNA move by some {50 / count**0.5:.0f} % by chance")
    return lines
