"""Shapes as `mnif eval` measures them: the room of the signal ``voxels``.

The main process does all of it; the work is bounded by the size of the reference, not by the number of samples.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.arguments import EvalArguments
from evals.controls import gaussian_latents
from evals.metrics.memorisation import memorisation_figures
from evals.metrics.occupancy import PROTOCOL
from evals.metrics.surfaces import POINTS, SHOWN, Surfaces, surfaces_of_grids
from evals.processes import Processes
from evals.rooms import Measurement
from evals.stages import Stages, drawn_latents, load_stages
from evals.voxels.files import shape_files
from evals.voxels.reconstructions import PIXELS, ShapeReconstructions, pca_of_shapes
from evals.voxels.samples import LEAST, RealShapes, comparison_figures, novelty_of, real_shapes, set_size
from mnif.data import Split, VoxelData, load_voxels
from mnif.errors import UserError
from mnif.files import sha256_of_folder
from mnif.meshes import mesh_preview, occupancy_preview
from mnif.pca import PCA
from mnif.pictures import picture_grid, save_picture

_BATCH = 32  # shapes decoded at a time


def of_model(asked: EvalArguments) -> Measurement:
    """Reconstructions of a model of voxels, and its samples if it has a prior.

    Raises:
        UserError: the model or the reference cannot be read, or too few samples are asked for.
    """
    assert asked.model is not None
    _check_count(asked)
    stages = load_stages(asked.model)
    data = stages.signal.load_more(asked.reference)
    assert isinstance(data, VoxelData)

    def figures(processes: Processes) -> dict[str, Any]:
        if not processes.is_main:
            return {}
        stages.to(processes.device)
        sides = stages.sides(data, asked.held_out_fraction, asked.test_fraction)
        train = np.flatnonzero(sides == Split.TRAIN)
        if not len(train):
            raise UserError(f"--reference {asked.reference}: none of it was trained on; lower --held_out_fraction")
        pca = pca_of_shapes(data, train, stages.decoder.config.latent_dim)
        steps, output = asked.refinement_steps, asked.output_dir
        found: dict[str, Any] = ShapeReconstructions(stages, data, sides, pca, steps, output).figures()
        found["warnings"] = [
            f"{found[name]} reconstructions of {part} shapes have no surface; chamfer_{part} leaves them out"
            for part in ("train", "heldout", "test")
            if found.get(name := f"no_surface_{part}")
        ]
        if stages.pipeline is None:
            return found | {"protocol": _protocol(asked, data, sides)}
        real = real_shapes(data, sides)
        count = min(asked.num_samples or len(real.reference), len(real.reference))
        latents = drawn_latents(stages.pipeline, count, asked.seed, asked.num_inference_steps)
        drawn = {"": _surfaces(stages, latents, "sample"), "_pca": _gaussian_pca(pca, data, train, count, asked.seed)}
        if stages.table is not None:
            gaussian = torch.from_numpy(gaussian_latents(stages.table, count, asked.seed))
            drawn["_gaussian"] = _surfaces(stages, gaussian, "Gaussian latent")
            if stages.table.held_out.any():
                found |= memorisation_figures(latents.cpu().numpy(), stages.table)
        compared = _compared(asked, drawn, real, data, sides)
        return found | compared | {"warnings": found["warnings"] + compared["warnings"]}

    return Measurement(_inputs(data, sha256_of_folder(asked.model)), figures)


def of_samples(asked: EvalArguments) -> Measurement:
    """Drawn shapes from files (:mod:`evals.voxels.files`).

    Raises:
        UserError: the samples are not such, too few are asked for, or the reference cannot be read.
    """
    assert asked.samples is not None
    _check_count(asked)
    files = shape_files(asked.samples)
    data = load_voxels(asked.reference)

    def figures(processes: Processes) -> dict[str, Any]:
        if not processes.is_main:
            return {}
        sides = data.split(asked.held_out_fraction, asked.test_fraction)
        real = real_shapes(data, sides)
        surfaces = files.surfaces(min(asked.num_samples or len(real.reference), len(real.reference)))
        return _compared(asked, {"": surfaces}, real, data, sides)

    return Measurement(_inputs(data, files.fingerprint()), figures)


def _check_count(asked: EvalArguments) -> None:
    if asked.num_samples is not None and asked.num_samples < LEAST:
        raise UserError(f"--num_samples {asked.num_samples}: at least {LEAST} shapes are needed")
    if asked.emd_points < 0:
        raise UserError(f"--emd_points {asked.emd_points}: at least 0 is needed")


def _compared(
    asked: EvalArguments, drawn: Mapping[str, Surfaces], real: RealShapes, data: VoxelData, sides: np.ndarray
) -> dict[str, Any]:
    """The figures of sets of drawn shapes with their protocol, and a picture of some above the nearest real ones."""
    samples = drawn[""]
    if len(samples) < LEAST:
        raise UserError(f"{len(samples)} drawn shapes; at least {LEAST} are needed")
    points = {ending: surfaces.points for ending, surfaces in drawn.items()}
    found: dict[str, Any] = {}
    for ending, surfaces in drawn.items():
        found |= {f"empty_shapes{ending}": surfaces.empty, f"full_shapes{ending}": surfaces.full}
    found |= comparison_figures(points, real, "chamfer")
    if asked.emd_points:
        found |= comparison_figures(points, real, "emd", min(asked.emd_points, POINTS))
    if (sides == Split.TRAIN).any():
        novelty = novelty_of(samples.points, data, sides)
        found |= novelty.figures
        nearest = data.occupancy(novelty.nearest[:SHOWN])
        nearest[~samples.present[:SHOWN]] = False  # what has no surface has no neighbour
        below = [occupancy_preview(shape, PIXELS) for shape in nearest]
        above = [mesh_preview(*mesh, PIXELS) for mesh in samples.meshes]
        save_picture(asked.output_dir / "nearest.png", picture_grid([*above, *below], columns=len(above)))
    protocol = _protocol(asked, data, sides) | {
        "reference_part": real.part,
        "shapes_of_each_set": set_size(points, real),
        "real_shapes_without_surface": real.left_out,
        "emd_points": min(asked.emd_points, POINTS),
    }
    return found | {"protocol": protocol, "warnings": _warnings(samples, set_size(points, real))}


def _surfaces(stages: Stages, latents: Tensor, name: str) -> Surfaces:
    """Of what latents draw."""
    decoder = stages.decoder

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


def _protocol(asked: EvalArguments, data: VoxelData, sides: np.ndarray) -> dict[str, Any]:
    """All that another number must share to be comparable."""
    return {
        "reference": asked.reference,
        "resolution": f"{data.resolution}³",
        "surface": f"marching cubes at one half, {POINTS} points by area, coordinates of the grid in [-1, 1]",
        "chamfer": "sum of the two mean squared distances",
        "occupancy": PROTOCOL,
        "seed": asked.seed,
        "train_shapes": int((sides == Split.TRAIN).sum()),
        "held_out_shapes": int((sides == Split.HELD_OUT).sum()),
        "test_shapes": int((sides == Split.TEST).sum()),
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
