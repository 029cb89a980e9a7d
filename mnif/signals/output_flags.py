"""The flags that say in what form samples and decoded latents are written; read without torch."""

from dataclasses import dataclass
from typing import Literal

Animation = Literal["gif", "mp4"]
MeshFormat = Literal["glb", "obj", "ply", "stl"]


@dataclass(kw_only=True)
class OutputFlags:
    """In what form something is written; not every signal takes every flag."""

    resolution: list[int] | None = None
    """Of pictures, of voxels, or the height of views; default: the training resolution."""
    mesh: MeshFormat | None = None
    """The format of meshes (voxels); default: glb."""
    turntable: Animation | None = None
    """Adds an animation of a camera that goes round (voxels, radiance)."""
    frames: int | None = None
    """Of the animation; default: 48."""
    elevation: float | None = None
    """Of the camera, in degrees above the horizon (voxels, radiance); default: 20."""
    views: int | None = None
    """Pictures of each object, from cameras evenly spaced on a circle (radiance); default: 8."""
