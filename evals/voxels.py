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

from evals.baselines import gaussian_latents
from evals.evaluator import Measurement
from evals.loaded_run import LoadedRun, drawn_latents, load_run
from evals.metrics.neighbours import memorisation_metrics
from evals.metrics.reconstruction import PROTOCOL, joined, mean_metrics, occupancy_scores
from evals.metrics.shapes import POINTS, SHOWN, Surfaces, chamfer_distance, surfaces_of_grids
from evals.protocol import EvalArguments
from evals.voxel_sets import LEAST, RealShapes, comparison_metrics, novelty_of, real_shapes, set_size
from evals.voxel_sources import shape_files
from mnif.data.batches import ArrayDataset
from mnif.data.dataset import Split
from mnif.data.voxels import VoxelData, load_voxels
from mnif.latents.pca import PCA, fit_pca
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_folder
from mnif.utils.meshes import mesh_preview, occupancy_preview
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import Processes

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
        sides: [N] of :class:`mnif.data.dataset.Split`.
        pca: of the training shapes.
        refinement_steps: for latents of shapes not trained on.
        pictures: folder for originals above reconstructions.
    """

    run: LoadedRun
    data: VoxelData
    splits: np.ndarray
    pca: PCA
    refinement_steps: int
    pictures: Path

    def metrics(self) -> dict[str, float]:
        """Of every side that has shapes: ``psnr``, ``iou``, ``accuracy`` and ``chamfer``, means with standard errors.

        Each for the model, for PCA (``iou_pca_heldout``) and for the mean shape; ``chamfer_floor_…`` is that of other
        points on the same surfaces, which no reconstruction beats; ``no_surface_…`` counts reconstructions that are
        empty or full, which the mean chamfer distance leaves out.
        """
        found: dict[str, float] = {"pca_components": len(self.pca.components)}
        for part, split in (("train", Split.TRAIN), ("heldout", Split.HELD_OUT), ("test", Split.TEST)):
            chosen = np.flatnonzero(self.splits == split)
            if len(chosen):
                rows, latents = self.run.latents(self.data, self.splits, split, self.refinement_steps)
                found |= self._side(part, chosen, rows, latents.cpu())
        return found

    def _side(self, part: str, chosen: np.ndarray, rows: ArrayDataset, latents: Tensor) -> dict[str, float]:
        picked = np.unique(np.linspace(0, len(chosen) - 1, min(_SURFACES, len(chosen))).round().astype(int))
        ids = [self.data.ids[row] for row in chosen[picked]]
        grids = self.data.occupancy(chosen[picked]).astype(np.float32)
        originals = surfaces_of_grids(grids, ids, level=0.5).points
        again = surfaces_of_grids(grids, [f"{id} again" for id in ids], level=0.5).points
        found = mean_metrics({"chamfer": _pairwise(again, originals)}, f"floor_{part}")
        for name, draw in {"": self._decoded, "pca_": self._projected, "mean_": self._mean}.items():
            pairs = self._batches(rows, latents)
            scores = joined([occupancy_scores(draw(some, targets), targets) for some, targets in pairs])
            found |= mean_metrics(scores, f"{name}{part}")
            drawn = np.concatenate(
                [
                    draw(some, targets)[..., 0].numpy()
                    for some, targets in self._batches(rows.subset(picked), latents[picked])
                ]
            )
            surfaces = surfaces_of_grids(drawn, [f"{name}reconstruction of {id}" for id in ids], level=0.0)
            found[f"no_surface_{name}{part}"] = surfaces.empty + surfaces.full
            if len(distances := _pairwise(surfaces.points, originals)):
                found |= mean_metrics({"chamfer": distances}, f"{name}{part}")
            if not name:
                self._save_image(part, grids > 0.5, drawn > 0)
        return found

    def _batches(self, rows: ArrayDataset, latents: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Latents and what they should draw."""
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

    def _save_image(self, part: str, originals: np.ndarray, drawn: np.ndarray) -> None:
        some = np.linspace(0, len(originals) - 1, min(SHOWN, len(originals))).round().astype(int)
        views = [occupancy_preview(shape, PIXELS) for shape in (*originals[some], *drawn[some])]
        save_image(self.pictures / f"reconstructions_{part}.png", image_grid(views, columns=len(some)))


def _pairwise(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The chamfer distance of each shape of ``a`` [N, P, 3] to its own in ``b``, of those that have both surfaces."""
    both = ~np.isnan(a[:, 0, 0]) & ~np.isnan(b[:, 0, 0])
    return np.array([chamfer_distance(first, second) for first, second in zip(a[both], b[both], strict=True)])


def of_model(arguments: EvalArguments) -> Measurement:
    """Reconstructions of a model of voxels, and its samples if it has a prior.

    Raises:
        UserError: the model or the reference cannot be read, or too few samples are asked for.
    """
    assert arguments.model is not None
    _check_count(arguments)
    run = load_run(arguments.model)
    data = run.signal.load_like(arguments.reference)
    assert isinstance(data, VoxelData)

    def metrics(processes: Processes) -> dict[str, Any]:
        if not processes.is_main:
            return {}
        run.to(processes.device)
        splits = run.splits(data, arguments.held_out_fraction, arguments.test_fraction)
        train = np.flatnonzero(splits == Split.TRAIN)
        if not len(train):
            raise UserError(f"--reference {arguments.reference}: none of it was trained on; lower --held_out_fraction")
        pca = pca_of_shapes(data, train, run.decoder.config.latent_dim)
        steps, output = arguments.refinement_steps, arguments.output_dir
        found: dict[str, Any] = ShapeReconstructions(run, data, splits, pca, steps, output).metrics()
        found["warnings"] = [
            f"{found[name]} reconstructions of {part} shapes have no surface; chamfer_{part} leaves them out"
            for part in ("train", "heldout", "test")
            if found.get(name := f"no_surface_{part}")
        ]
        if run.pipeline is None:
            return found | {"protocol": _protocol(arguments, data, splits)}
        real = real_shapes(data, splits)
        count = min(arguments.num_samples or len(real.reference), len(real.reference))
        latents = drawn_latents(run.pipeline, count, arguments.seed, arguments.num_inference_steps)
        drawn = {"": _surfaces(run, latents, "sample"), "_pca": _gaussian_pca(pca, data, train, count, arguments.seed)}
        if run.table is not None:
            gaussian = torch.from_numpy(gaussian_latents(run.table, count, arguments.seed))
            drawn["_gaussian"] = _surfaces(run, gaussian, "Gaussian latent")
            if run.table.held_out.any():
                found |= memorisation_metrics(latents.cpu().numpy(), run.table)
        compared = _compared(arguments, drawn, real, data, splits)
        return found | compared | {"warnings": found["warnings"] + compared["warnings"]}

    return Measurement(_inputs(data, sha256_of_folder(arguments.model)), metrics)


def of_samples(arguments: EvalArguments) -> Measurement:
    """Drawn shapes from files (:mod:`evals.voxel_sources`).

    Raises:
        UserError: the samples are not such, too few are asked for, or the reference cannot be read.
    """
    assert arguments.samples is not None
    _check_count(arguments)
    files = shape_files(arguments.samples)
    data = load_voxels(arguments.reference)

    def metrics(processes: Processes) -> dict[str, Any]:
        if not processes.is_main:
            return {}
        splits = data.split(arguments.held_out_fraction, arguments.test_fraction)
        real = real_shapes(data, splits)
        surfaces = files.surfaces(min(arguments.num_samples or len(real.reference), len(real.reference)))
        return _compared(arguments, {"": surfaces}, real, data, splits)

    return Measurement(_inputs(data, files.fingerprint()), metrics)


def _check_count(arguments: EvalArguments) -> None:
    if arguments.num_samples is not None and arguments.num_samples < LEAST:
        raise UserError(f"--num_samples {arguments.num_samples}: at least {LEAST} shapes are needed")
    if arguments.emd_points < 0:
        raise UserError(f"--emd_points {arguments.emd_points}: at least 0 is needed")


def _compared(
    arguments: EvalArguments, drawn: Mapping[str, Surfaces], real: RealShapes, data: VoxelData, splits: np.ndarray
) -> dict[str, Any]:
    """The figures of sets of drawn shapes with their protocol, and a picture of some above the nearest real ones."""
    samples = drawn[""]
    if len(samples) < LEAST:
        raise UserError(f"{len(samples)} drawn shapes; at least {LEAST} are needed")
    points = {ending: surfaces.points for ending, surfaces in drawn.items()}
    found: dict[str, Any] = {}
    for ending, surfaces in drawn.items():
        found |= {f"empty_shapes{ending}": surfaces.empty, f"full_shapes{ending}": surfaces.full}
    found |= comparison_metrics(points, real, "chamfer")
    if arguments.emd_points:
        found |= comparison_metrics(points, real, "emd", min(arguments.emd_points, POINTS))
    if (splits == Split.TRAIN).any():
        novelty = novelty_of(samples.points, data, splits)
        found |= novelty.metrics
        nearest = data.occupancy(novelty.nearest[:SHOWN])
        nearest[~samples.present[:SHOWN]] = False  # what has no surface has no neighbour
        below = [occupancy_preview(shape, PIXELS) for shape in nearest]
        above = [mesh_preview(*mesh, PIXELS) for mesh in samples.meshes]
        save_image(arguments.output_dir / "nearest.png", image_grid([*above, *below], columns=len(above)))
    protocol = _protocol(arguments, data, splits) | {
        "reference_part": real.part,
        "shapes_of_each_set": set_size(points, real),
        "real_shapes_without_surface": real.left_out,
        "emd_points": min(arguments.emd_points, POINTS),
    }
    return found | {"protocol": protocol, "warnings": _warnings(samples, set_size(points, real))}


def _surfaces(run: LoadedRun, latents: Tensor, name: str) -> Surfaces:
    """Of what latents draw."""
    decoder = run.decoder

    @torch.no_grad()
    def grids(some: Tensor) -> np.ndarray:
        return decoder(some.to(decoder.device))[..., 0].float().cpu().numpy()

    every = (grid for some in latents.split(_BATCH) for grid in grids(some))
    return surfaces_of_grids(every, [f"{name} {row}" for row in range(len(latents))], level=0.0)


def _gaussian_pca(pca: PCA, data: VoxelData, train: np.ndarray, count: int, seed: int) -> Surfaces:
    """What a Gaussian over principal components draws, with the surface where its values are 0."""
    spread = np.zeros(len(pca.components))
    for rows in np.array_split(train, -(-len(train) // 256)):
        values = data.occupancy(rows).reshape(len(rows), -1).astype(np.float32) * 2 - 1
        spread += np.square((values - pca.mean) @ pca.components.T).sum(axis=0)
    drawn = np.random.default_rng([seed, 2]).standard_normal((count, len(spread))) * np.sqrt(spread / len(train))
    grids = ((row @ pca.components + pca.mean).reshape((data.resolution,) * 3) for row in drawn)
    return surfaces_of_grids(grids, [f"PCA {row}" for row in range(count)], level=0.0)


def _protocol(arguments: EvalArguments, data: VoxelData, splits: np.ndarray) -> dict[str, Any]:
    """All that another number must share to be comparable."""
    return {
        "reference": arguments.reference,
        "resolution": f"{data.resolution}³",
        "surface": f"marching cubes at one half, {POINTS} points by area, coordinates of the grid in [-1, 1]",
        "chamfer": "sum of the two mean squared distances",
        "occupancy": PROTOCOL,
        "seed": arguments.seed,
        "train_shapes": int((splits == Split.TRAIN).sum()),
        "held_out_shapes": int((splits == Split.HELD_OUT).sum()),
        "test_shapes": int((splits == Split.TEST).sum()),
    }


def _warnings(samples: Surfaces, count: int) -> list[str]:
    lines = []
    if samples.empty or samples.full:
        lines.append(f"{samples.empty} samples are empty and {samples.full} full; they cover and match nothing")
    if count < 100:
        lines.append(f"{count} shapes in each set: coverage and 1-NNA move by some {50 / count**0.5:.0f} % by chance")
    return lines


def _inputs(data: VoxelData, measured: str) -> dict[str, str]:
    return {"measured": measured, "reference_fingerprint": data.fingerprint()}
