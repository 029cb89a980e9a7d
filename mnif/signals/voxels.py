"""Shapes as a signal: occupancy on a cube, with the surface where values are 0."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mnif.data.dataset import Dataset
from mnif.data.images import IMAGE_SUFFIXES
from mnif.data.source import DataSource
from mnif.data.voxels import ARRAY_SUFFIXES, VOXEL_SUFFIXES, VoxelData, load_voxels
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import (
    Augmentation,
    Change,
    GridSignal,
    Observation,
    OutputWriter,
    Signal,
    intersection_over_union,
    mirror,
    mirror_half,
)
from mnif.signals.output_flags import Animation, MeshFormat
from mnif.signals.outputs import (
    ELEVATION,
    check_camera,
    check_resolution,
    decode_grid,
    decode_volumes,
)
from mnif.utils.errors import UserError
from mnif.utils.files import was_written
from mnif.utils.json_files import Size
from mnif.utils.meshes import mesh_from_values, mesh_preview, occupancy_preview, save_mesh
from mnif.utils.pixels import save_animation, save_image

_IMAGE_PIXELS = 256  # of a shaded shape
_AZIMUTH = 35.0  # degrees from +z towards +x, of the camera of a shape's first image


@dataclass(frozen=True)
class MeshWriter(OutputWriter):
    """Writes the surface where the values of a cube are 0, as a mesh in [-1, 1]³ and shaded.

    Args:
        resolution: values per axis, one number; default: the training resolution.
        mesh: format.
        turntable: format of an animation, if there is to be one.
        frames: of the animation.
        elevation: of the camera, in degrees above the horizon.
    """

    array_name = "voxels"
    resolution: list[int] | None = None
    mesh: MeshFormat = "glb"
    turntable: Animation | None = None
    frames: int = 48
    elevation: float = ELEVATION

    def __post_init__(self) -> None:
        check_resolution(self.resolution, 1, "voxels are cubes; give one number")
        check_camera(self.elevation, frames=self.frames)

    def files(self, name: str) -> list[str]:
        """Names an image, a mesh and, where flags ask for it, an animation."""
        suffixes = ["png", self.mesh, *([self.turntable] if self.turntable else [])]
        return [f"{name}.{suffix}" for suffix in suffixes]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes image, mesh and animation, unless the shape has no surface."""
        values = decode_grid(decoder, latent, self.resolution)[0, ..., 0].float().cpu().numpy()
        if values.max() <= 0 or values.min() > 0:
            return "empty" if values.max() <= 0 else "full"
        mesh = mesh_from_values(values)
        image, surface, *animation = (output / file for file in self.files(name))
        if not was_written(image):
            save_image(image, mesh_preview(*mesh, _IMAGE_PIXELS, _AZIMUTH, self.elevation))
        if not was_written(surface):
            save_mesh(surface, *mesh)
        if animation and not was_written(animation[0]):
            save_animation(animation[0], np.stack(_turntable(mesh, self.frames, self.elevation)))
        return None

    def to_array(self, decoder: MNIFModel, signal: Signal, latents: Tensor, count: int, batch_size: int) -> np.ndarray:
        """Stacks occupancies: [count, R, R, R] bool."""
        cubes = (decode_grid(decoder, latent, self.resolution)[..., 0] for latent in latents[:count].split(1))
        return np.concatenate([(cube > 0).cpu().numpy() for cube in cubes])

    def images(self, decoder: MNIFModel, signal: Signal, latents: Tensor) -> np.ndarray:
        """Shades the surfaces."""
        if self.resolution is None:
            return signal.images(decoder, latents)
        return np.concatenate([_shaded(decode_grid(decoder, latent, self.resolution)) for latent in latents.split(1)])


class Voxels(GridSignal):
    """Occupancy on a cube: 1 inside and -1 outside, with the surface at 0."""

    name = "voxels"
    noun = "shape"
    dimensions = 3
    mirror_axis: ClassVar[int] = 1
    output_writer = MeshWriter
    output_types = ("volume", "mesh", "views")
    values_note = (
        "A value above 0 is inside the shape, below is outside. Coordinate k runs along axis k; the centre of "
        "voxel r of n lies at (r + 1/2) / n."
    )

    def __init__(self, resolution: Size, channels: Size = 1, stride: Size = 1):
        super().__init__(resolution, channels, stride)

    @classmethod
    def recognizes(cls, source: DataSource) -> bool:
        """Recognizes HDF5 files, folders of ``.binvox`` files, meshes or arrays alone, and arrays: by name, or of
        cubes."""
        names, suffixes = source.array_names, source.file_suffixes
        return (
            source.suffix in (".hdf5", ".h5")
            or (bool(names & {"voxels", "occupancy", "packed"}) and "images" not in names)
            or _of_cubes(source.array_shape or ())
            or any(suffix in suffixes for suffix in VOXEL_SUFFIXES)
            or (bool(suffixes.keys() & {*ARRAY_SUFFIXES}) and not suffixes.keys() & {*IMAGE_SUFFIXES})
        )

    @classmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads shapes (:func:`mnif.data.voxels.load_voxels`), at ``resolution`` if it is given."""
        return load_voxels(source, _one_number(options["resolution"]))

    @classmethod
    def from_data(cls, data: VoxelData, options: Mapping[str, Any]) -> "Voxels":
        """Takes ``stride``."""
        return cls(data.resolution, stride=options["stride"])

    def load_like(self, source: str) -> Dataset:
        """Reads shapes at the model's resolution."""
        return load_voxels(source, self.cube)

    @property
    def cube(self) -> int:
        """Voxels per axis."""
        assert isinstance(self.resolution, int)
        return self.resolution

    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """Maps ``packed`` [B, R, R, R/8] bits to -1 and 1, [B, R, R, R, 1]."""
        bits = torch.arange(7, -1, -1, device=batch["packed"].device)
        occupied = (batch["packed"][..., None] >> bits & 1).flatten(-2)[..., : self.cube]
        return self.on_grid(occupied[..., None].float() * 2 - 1)

    def augmentations(self) -> dict[str, Augmentation]:
        """``random_flip`` mirrors half of the shapes along x."""
        return {"random_flip": partial(mirror_half, axis=self.mirror_axis)}

    def changes(self) -> dict[str, list[Change]]:
        """Mirrored."""
        return {"random_flip": [partial(mirror, axis=self.mirror_axis)]}

    def compare(self, predictions: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Gives PSNR of the occupancy on [0, 1], and intersection over union of what lies above one half."""
        return super().compare(predictions, values) | {"iou": intersection_over_union(predictions, values)}

    def images(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """Shades the surfaces."""
        return _shaded(decoder(latents))

    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Shades the originals' surfaces."""
        return _shaded(self.observe(batch).values)

    def decode_as(
        self, output_type: str, decoder: MNIFModel, latents: Tensor, resolution: int | None, views: int
    ) -> Any:
        """Decodes volumes, meshes of them, or shaded views of the meshes."""
        volumes = decode_volumes(decoder, latents, resolution)
        if output_type == "volume":
            return np.stack([*volumes])
        meshes = [_mesh(volume) for volume in volumes]
        if output_type == "mesh":
            return meshes
        return [[Image.fromarray(view) for view in _turntable(mesh, views, ELEVATION)] for mesh in meshes]


def _of_cubes(shape: tuple[int, ...]) -> bool:
    """Whether an array may be one grid, several, or a volume with a channel."""
    without_channel = shape[:-1] if shape[-1:] == (1,) else shape
    return any(len(each) in (3, 4) and len(set(each[-3:])) == 1 for each in (shape, without_channel))


def _one_number(resolution: Sequence[int] | None) -> int | None:
    if resolution and len(resolution) > 1:
        raise UserError(f"--resolution {' '.join(map(str, resolution))}: voxels are cubes; give one number")
    return resolution[0] if resolution else None


def _shaded(values: Tensor) -> np.ndarray:
    """Values [B, R, R, R, 1] → images of what lies above 0, [B, 96, 96, 3] uint8."""
    return np.stack([occupancy_preview(shape, 96) for shape in (values[..., 0] > 0).cpu().numpy()])


def _mesh(volume: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Finds vertices and faces of the surface at 0; None if nothing or everything is above it."""
    inside = volume > 0
    return mesh_from_values(volume) if inside.any() and not inside.all() else None


def _turntable(mesh: tuple[np.ndarray, np.ndarray] | None, frames: int, elevation: float) -> list[np.ndarray]:
    """Shades a mesh as seen from cameras evenly spaced on a circle; images are white where there is no mesh."""
    vertices, faces = mesh if mesh is not None else (np.empty((0, 3)), np.empty((0, 3), dtype=np.int64))
    azimuths = np.arange(frames) * (360 / frames)
    return [mesh_preview(vertices, faces, _IMAGE_PIXELS, azimuth, elevation) for azimuth in azimuths]
