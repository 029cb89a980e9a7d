"""Shapes as a signal: occupancy on a cube, with the surface where values are 0."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mnif.data.dataset import Dataset
from mnif.data.voxels import VoxelData, load_voxels
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Observation, _mirrored, intersection_over_union, psnr
from mnif.utils.errors import UserError


class Voxels(GridSignal):
    """Occupancy on a cube: 1 inside and -1 outside, with the surface at 0."""

    name = "voxels"
    noun = "shape"
    dimensions = 3
    mirror_axis: ClassVar[int] = 1

    def __init__(self, resolution: int, channels: int = 1, stride: int = 1):
        super().__init__(resolution, channels, stride)

    @classmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads shapes (:func:`mnif.data.voxels.load_voxels`), at ``resolution`` if it is given."""
        return load_voxels(source, _one_number(options["resolution"]))

    @classmethod
    def from_data(cls, data: VoxelData, options: Mapping[str, Any]) -> "Voxels":
        """Takes ``stride``."""
        return cls(data.resolution, stride=options["stride"])

    def load_like(self, source: str) -> Dataset:
        """Shapes of the model's resolution."""
        return load_voxels(source, self.cube)

    @property
    def cube(self) -> int:
        """Voxels per axis."""
        assert isinstance(self.resolution, int)
        return self.resolution

    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """``packed`` [B, R, R, R/8] bits → -1 and 1."""
        bits = torch.arange(7, -1, -1, device=batch["packed"].device)
        occupied = (batch["packed"][..., None] >> bits & 1).flatten(-2)[..., : self.cube]
        return self.on_grid(occupied[..., None].float() * 2 - 1)

    def augmentations(self) -> dict[str, Callable[[Observation], Observation]]:
        """``random_flip`` mirrors half of the shapes along x."""
        return {"random_flip": partial(_mirrored, axis=self.mirror_axis)}

    def metrics(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """PSNR of the occupancy on [0, 1], and intersection over union of what lies above one half."""
        observation = self.observe(batch)
        predictions = self.predict(decoder, decoder.coefficients(latents), observation)
        return {
            "psnr": psnr(predictions, observation.values),
            "iou": intersection_over_union(predictions, observation.values),
        }

    def pictures(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """Shaded surfaces."""
        return _surfaces(decoder(latents))

    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """The originals' surfaces."""
        return _surfaces(self.observe(batch).values)


def _one_number(resolution: Sequence[int] | None) -> int | None:
    if resolution and len(resolution) > 1:
        raise UserError(f"--resolution {' '.join(map(str, resolution))}: voxels are cubes; give one number")
    return resolution[0] if resolution else None


def _surfaces(values: Tensor) -> np.ndarray:
    from mnif.utils.meshes import occupancy_preview

    return np.stack([occupancy_preview(shape, 96) for shape in (values[..., 0] > 0).cpu().numpy()])
