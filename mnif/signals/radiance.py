"""Radiance fields: density and colour in space, observed as posed pictures (NeRF; Mildenhall et al., ECCV 2020)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from PIL import Image
from torch import Tensor, nn

from mnif.data.batches import evenly_spaced
from mnif.data.dataset import Dataset
from mnif.data.source import DataSource
from mnif.data.view_formats import SRN_MARKER, TRANSFORMS_MARKERS
from mnif.data.views import ViewData, default_bound, load_views
from mnif.models.encoders import ViewsEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, OutputWriter, Signal, psnr
from mnif.signals.image import height_and_width
from mnif.signals.output_flags import Animation
from mnif.signals.outputs import ELEVATION, check_camera, check_resolution, decode_volumes
from mnif.signals.volume_rendering import box_intersection, camera_rays, composite, stratified_depths, turntable_poses
from mnif.utils.devices import sent
from mnif.utils.errors import UserError
from mnif.utils.files import was_written
from mnif.utils.json_files import Size
from mnif.utils.pixels import as_axes, save_animation, save_image, to_uint8

_RAYS_AT_ONCE = 1 << 15

Length = Annotated[float, Meta(gt=0)]


@dataclass(frozen=True)
class Cameras:
    """Cameras of whole images: poses [B, V, 4, 4], intrinsics [B, 4] or [B, V, 4], and the images' size."""

    poses: Tensor
    intrinsics: Tensor
    height: int
    width: int

    def rays(self) -> tuple[Tensor, Tensor]:
        """Computes origins and directions of all pixels' rays, both [B, V, H, W, 3]."""
        return camera_rays(self.poses, self.of_each_view(), self.height, self.width)

    def of_each_view(self) -> Tensor:
        """Gives the intrinsics of every view, [B, V, 4]."""
        same = self.intrinsics.ndim == 2
        return self.intrinsics[:, None].expand(-1, self.poses.shape[1], -1) if same else self.intrinsics


@dataclass(frozen=True)
class Rays:
    """Single rays: origins and directions [B, rays, 3], and where in their intervals the depths lie, [rays, S]."""

    origins: Tensor
    directions: Tensor
    jitter: Tensor | None = None


@dataclass(frozen=True)
class ViewWriter(OutputWriter):
    """Writes views of radiance fields from cameras on the turntable's circle.

    Args:
        resolution: the height of a view in pixels, one number; default: the training resolution.
        views: how many.
        turntable: format of an animation, if there is to be one.
        frames: of the animation.
        elevation: of the cameras, in degrees above the horizon.
    """

    array_name = "views"
    resolution: list[int] | None = None
    views: int = 8
    turntable: Animation | None = None
    frames: int = 48
    elevation: float = ELEVATION

    def __post_init__(self) -> None:
        check_resolution(self.resolution, 1, "give one number, the height of a view")
        check_camera(self.elevation, frames=self.frames, views=self.views)

    def files(self, name: str) -> list[str]:
        """Names views in a folder and, where flags ask for it, an animation."""
        animation = [f"{name}/turntable.{self.turntable}"] if self.turntable else []
        return [*(f"{name}/{view:03d}.png" for view in range(self.views)), *animation]

    def write(self, decoder: MNIFModel, signal: Signal, latent: Tensor, output: Path, name: str) -> str | None:
        """Writes views and animation."""
        paths = [output / file for file in self.files(name)]
        views, animation = paths[: self.views], paths[self.views :]
        if not all(map(was_written, views)):
            for path, image in zip(views, self._frames(decoder, signal, latent, self.views)[0], strict=True):
                if not was_written(path):
                    save_image(path, image)
        if animation and not was_written(animation[0]):
            save_animation(animation[0], self._frames(decoder, signal, latent, self.frames)[0])
        return None

    def to_array(self, decoder: MNIFModel, signal: Signal, latents: Tensor, count: int, batch_size: int) -> np.ndarray:
        """Stacks the views: [count, views, H, W, 3] uint8."""
        each = latents[:count].split(1)
        return np.concatenate([self._frames(decoder, signal, latent, self.views) for latent in each])

    def images(self, decoder: MNIFModel, signal: Signal, latents: Tensor) -> np.ndarray:
        """Renders the view of :meth:`RadianceField.images`, at the height and from the elevation asked for."""
        return self._frames(decoder, signal, latents, 8, slice(1, 2))[:, 0]

    def _frames(
        self, decoder: MNIFModel, signal: Signal, latents: Tensor, count: int, chosen: slice = slice(None)
    ) -> np.ndarray:
        assert isinstance(signal, RadianceField)
        height = self.resolution[0] if self.resolution else None
        return signal.turntable(decoder, latents, count, self.elevation, height, chosen)


class RadianceField(Signal):
    """Density and colour in the cube [-bound, bound]³, seen by pinhole cameras.

    A field gives four numbers per point: three colours (no activation, [-1, 1]) and one that a softplus turns into
    density. Depths are stratified between where a ray enters and leaves the cube.

    Args:
        resolution: pixels per axis of the views, one number or height and width.
        bound: half the edge of the cube that holds the object, in world units.
        near, far: depths nothing lies outside of, in world units.
        background: ``"white"`` or ``"black"``.
        samples: depths per ray.
        rays: rays of each instance in one step of learning.
        held_out_views: the last views of each instance are never learned from, but measured on.
        camera_distance: of the turntable, in world units.
        intrinsics: of the turntable: fx, fy, cx, cy in pixels.
        camera_convention: of the poses in files of data (:func:`mnif.data.views.load_views`).
        center_views: whether the point that the cameras of data look at is moved to the origin.
    """

    name = "radiance"
    noun = "object"
    encoder_class = ViewsEncoder
    dimensions = 3
    channels = 4
    output_writer = ViewWriter
    output_types = ("volume", "views")
    values_note = (
        "Colours lie in about [-1, 1], densities are per unit of the world; the fourth channel of raw values "
        "becomes a density in *points* and *rays* alone."
    )

    def __init__(
        self,
        resolution: Size | list[Size],
        bound: Length = 1.0,
        near: Annotated[float, Meta(ge=0)] = 0.0,
        far: Length = 10.0,
        background: str = "white",
        samples: Size = 32,
        rays: Size = 512,
        held_out_views: Annotated[int, Meta(ge=0)] = 0,
        camera_distance: Length = 2.5,
        intrinsics: Annotated[list[float], Meta(min_length=4, max_length=4)] | None = None,
        camera_convention: str = "auto",
        center_views: bool = False,
    ):
        self.resolution, self.bound, self.near, self.far = resolution, bound, near, far
        self.background, self.samples, self.rays = background, samples, rays
        self.held_out_views, self.camera_distance = held_out_views, camera_distance
        self.camera_convention, self.center_views = camera_convention, center_views
        height, width = self.size
        self.intrinsics = intrinsics or [float(width), float(width), width / 2, height / 2]

    @classmethod
    def recognizes(cls, source: DataSource) -> bool:
        """Recognizes folders in which a file of poses or intrinsics lies."""
        return any(name in source.file_names for name in (SRN_MARKER, *TRANSFORMS_MARKERS))

    @classmethod
    def load(cls, source: str, options: Mapping[str, Any]) -> Dataset:
        """Reads posed views (:func:`mnif.data.views.load_views`); takes ``resolution``, ``near``, ``far``,
        ``max_views``, ``background``, ``bound``, ``camera_convention`` and ``center_views``."""
        resolution = height_and_width(options["resolution"]) if options["resolution"] else None
        _check_bound(options)
        names = ("near", "far", "max_views", "background", "bound", "camera_convention", "center_views")
        return load_views(source, resolution, **{name: options[name] for name in names if name in options})

    @classmethod
    def from_data(cls, data: ViewData, options: Mapping[str, Any]) -> "RadianceField":
        """Takes ``bound``, ``samples_per_ray``, ``rays_per_step`` and ``held_out_views``.

        Unless ``bound`` is given, the cube is as large as near and far allow around the centre of the cameras.
        """
        views, height, width = data.images.shape[1:4]
        if not 0 <= options["held_out_views"] < views:
            raise UserError(f"--held_out_views {options['held_out_views']}: each object has {views} views")
        _check_bound(options)
        distance = float(np.median(np.linalg.norm(np.asarray(data.poses[:, :, :3, 3]), axis=-1)))
        return cls(
            resolution=height if height == width else [height, width],
            bound=options["bound"] or default_bound(np.asarray(data.poses), data.near, data.far),
            near=data.near,
            far=data.far,
            background=data.background,
            samples=options["samples_per_ray"],
            rays=options["rays_per_step"],
            held_out_views=options["held_out_views"],
            camera_distance=distance,
            intrinsics=[float(n) for n in np.median(np.atleast_2d(data.intrinsics[0]), axis=0)],
            camera_convention=options.get("camera_convention", "auto"),
            center_views=options.get("center_views", False),
        )

    def load_like(self, source: str) -> Dataset:
        """Reads views at the model's size, with its depths and background."""
        forms: Any = (self.background, self.bound, self.camera_convention, self.center_views)
        data = load_views(source, self.size, self.near, self.far, None, *forms)
        views = data.images.shape[1]
        if views <= self.held_out_views:
            reason = f"the model keeps {self.held_out_views} of each object for measuring"
            raise UserError(f"--data {source}: each object has {views} views; {reason}")
        return data

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a view."""
        height, width = as_axes(self.resolution, 2)
        return height, width

    @property
    def grid_resolution(self) -> int:
        """The resolution of the volume of colours and densities."""
        return 32

    def settings(self) -> dict[str, Any]:
        """Returns everything the constructor takes."""
        names = ("resolution", "bound", "near", "far", "background", "samples", "rays", "held_out_views")
        more = ("camera_distance", "intrinsics", "camera_convention", "center_views")
        return {name: getattr(self, name) for name in (*names, *more)}

    def observe(self, batch: Mapping[str, Tensor]) -> Observation:
        """Observes all views but the held-out ones: ``images`` [B, V, H, W, 3] uint8, ``poses``, ``intrinsics``."""
        return self.observe_views(batch, slice(0, self.num_views(batch) - self.held_out_views))

    def novel_views(self, batch: Mapping[str, Tensor]) -> Observation:
        """Observes the held-out views."""
        views = self.num_views(batch)
        return self.observe_views(batch, slice(views - self.held_out_views, views))

    def num_views(self, batch: Mapping[str, Tensor]) -> int:
        """Counts the views of each object, held-out ones too."""
        return batch["images"].shape[1]

    def observe_views(self, batch: Mapping[str, Tensor], views: slice | list[int]) -> Observation:
        """Observes some of the views, by number."""
        values = batch["images"][:, views].float() / 127.5 - 1
        intrinsics = batch["intrinsics"].float()
        intrinsics = intrinsics if intrinsics.ndim == 2 else intrinsics[:, views]
        cameras = Cameras(batch["poses"][:, views].float(), intrinsics, *values.shape[2:4])
        return Observation(values, cameras)

    def points_per_step(self, decoder: MNIFModel) -> int:
        """Counts the depths along the rays of a step."""
        return self.rays * self.samples

    def subsample(self, observation: Observation, generator: torch.Generator | None = None) -> Observation:
        """Takes random rays of random views, the same of every instance, with random depths."""
        cameras, values = observation.query, observation.values
        flat = values.flatten(1, 3)
        chosen = sent(torch.randint(flat.shape[1], (self.rays,), generator=generator), flat.device)
        jitter = sent(torch.rand(self.rays, self.samples, generator=generator), flat.device)
        views, pixels = chosen // (cameras.height * cameras.width), chosen % (cameras.height * cameras.width)
        origins, directions = _rays_of(cameras, views, pixels)
        mask = None if observation.mask is None else observation.mask.flatten(1)[:, chosen]
        return Observation(flat[:, chosen], Rays(origins, directions, jitter), mask)

    def predict(self, decoder: MNIFModel, coefficients: Tensor, observation: Observation) -> Tensor:
        """Renders the colours [B, ..., 3] of rays or of whole images."""
        query = observation.query
        if isinstance(query, Rays):
            return self.render(decoder, coefficients, query)
        return self.render_views(decoder, coefficients, query)

    def render_views(self, decoder: MNIFModel, coefficients: Tensor, cameras: Cameras) -> Tensor:
        """Renders whole images [B, V, H, W, 3], some rays at a time."""
        rays = cameras.rays()
        some = max(_RAYS_AT_ONCE // len(rays[0]), 1)
        chunks = zip(*(ends.flatten(1, 3).split(some, dim=1) for ends in rays), strict=True)
        colours = [self.render(decoder, coefficients, Rays(*chunk)) for chunk in chunks]
        return torch.cat(colours, dim=1).view(rays[0].shape)

    def render(self, decoder: MNIFModel, coefficients: Tensor, rays: Rays) -> Tensor:
        """Renders the colours of rays, [B, rays, 3]."""
        near, far = box_intersection(rays.origins, rays.directions, self.bound)
        near, far = near.clamp(self.near, self.far), far.clamp(self.near, self.far)
        depths = stratified_depths(near, far, self.samples, tuple(near.shape), rays.jitter)
        points = rays.origins[..., None, :] + rays.directions[..., None, :] * depths[..., None]
        values = decoder.values_at(coefficients, (points / self.bound).flatten(1, 2)).view(*depths.shape, 4)
        background = 1.0 if self.background == "white" else -1.0
        colour, _, _ = composite(values[..., :3], self.density(values[..., 3]), depths, far, background)
        return colour

    def density(self, raw: Tensor) -> Tensor:
        """Turns a field's fourth value, of any shape, into a density per unit of the world, above 0."""
        # Scaled so that a field of zeros is a thin fog: light reaches every sample when learning starts.
        return F.softplus(10 * raw - 3) * (2 / self.bound)

    def encoder(self, latent_dim: int, width: int) -> nn.Module:
        """Makes a network over patches of the views, averaged over the views."""
        return ViewsEncoder(self.resolution, latent_dim, width=width)

    def encode(self, encoder: nn.Module, observation: Observation) -> Tensor:
        """Infers latents [B, D] from whole views."""
        return encoder(observation.values, observation.query.poses, observation.mask)

    def metrics(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives the PSNR of up to four of the views learned from, and of all that were held out."""
        chosen = evenly_spaced(self.num_views(batch) - self.held_out_views, 4)
        views = {"psnr": self.observe_views(batch, chosen.tolist())}
        if self.held_out_views:
            views["psnr_novel_views"] = self.novel_views(batch)
        coefficients = decoder.coefficients(latents)
        return {
            name: psnr(self.render_views(decoder, coefficients, observation.query), observation.values)
            for name, observation in views.items()
        }

    def turntable(
        self,
        decoder: MNIFModel,
        latents: Tensor,
        frames: int,
        elevation: float = ELEVATION,
        resolution: int | None = None,
        chosen: slice = slice(None),
    ) -> np.ndarray:
        """Renders images, ``resolution`` high, from cameras on a circle around the object: [B, frames, H, W, 3] uint8.

        Args:
            decoder: the model.
            latents: [B, D].
            frames: cameras, evenly spaced.
            elevation: of the cameras, in degrees above the horizon.
            resolution: pixels along the height; default: the training resolution.
            chosen: which of the frames are rendered; default: all.
        """
        height, width = self.size
        scale = (resolution or height) / height
        height, width = round(height * scale), round(width * scale)
        poses = turntable_poses(frames, self.camera_distance, elevation)[chosen].to(latents.device)
        intrinsics = torch.tensor(self.intrinsics, device=latents.device) * scale
        cameras = Cameras(poses.expand(len(latents), -1, -1, -1), intrinsics.expand(len(latents), -1), height, width)
        return to_uint8(self.render_views(decoder, decoder.coefficients(latents), cameras))

    def images(self, decoder: MNIFModel, latents: Tensor) -> np.ndarray:
        """Renders one view of each object, the second of eight on the turntable's circle."""
        return self.turntable(decoder, latents, frames=8, chosen=slice(1, 2))[:, 0]

    def original_images(self, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Takes the last view of each object, which is a held-out one if there are any."""
        return batch["images"][:, -1].cpu().numpy()

    def reconstruction_images(self, decoder: MNIFModel, latents: Tensor, batch: Mapping[str, Tensor]) -> np.ndarray:
        """Renders the last view of each object."""
        cameras = self.observe_views(batch, slice(-1, None)).query
        return to_uint8(self.render_views(decoder, decoder.coefficients(latents), cameras)[:, 0])

    def decode_as(
        self, output_type: str, decoder: MNIFModel, latents: Tensor, resolution: int | None, views: int
    ) -> Any:
        """Decodes volumes, or views from cameras evenly spaced on a circle."""
        if output_type == "volume":
            return np.stack([*decode_volumes(decoder, latents, resolution)])
        objects = [self.turntable(decoder, latent, views, ELEVATION, resolution)[0] for latent in latents.split(1)]
        return [[Image.fromarray(view) for view in images] for images in objects]


def _check_bound(options: Mapping[str, Any]) -> None:
    bound = options.get("bound")
    if bound is not None and not 0 < bound < math.inf:
        raise UserError(f"--bound {bound:g}: must be above 0")


def _rays_of(cameras: Cameras, views: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Computes origins and directions [B, n, 3] of chosen pixels, without those of all the others."""
    intrinsics = cameras.of_each_view()[:, views].clone()
    # An image of one pixel whose principal point is moved, so that its centre is the pixel meant.
    intrinsics[..., 2] -= (pixels % cameras.width).to(intrinsics)
    intrinsics[..., 3] -= (pixels // cameras.width).to(intrinsics)
    origins, directions = camera_rays(cameras.poses[:, views], intrinsics, 1, 1)
    return origins[:, :, 0, 0], directions[:, :, 0, 0]
