"""Volume rendering: rays of a pinhole camera, depths along them, and the light that comes back.

World coordinates are right-handed with y up; the signal fills the cube [-1, 1]³. Cameras follow OpenGL and Blender: a
camera looks along its own -z, x is right and y is up in its picture. Directions have length one, so depths are
distances in world units and densities are per world unit. Everything that is computed from colours, densities, poses
and rays can be differentiated twice, as meta-learning needs.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mnif.utils.errors import UserError


def camera_rays(
    poses: Float[Tensor, "*views 4 4"], intrinsics: Float[Tensor, "*cameras 4"], height: int, width: int
) -> tuple[Float[Tensor, "*all {height} {width} 3"], Float[Tensor, "*all {height} {width} 3"]]:
    """Computes the ray through the centre of every pixel.

    Args:
        poses: [..., 4, 4] camera-to-world, rotation and translation.
        intrinsics: [..., 4] focal lengths fx, fy and principal point cx, cy, in pixels; the centre of the pixel in
            row r and column c lies at (c + 1/2, r + 1/2), as everywhere in this project.
        height: rows.
        width: columns.

    Returns:
        Origins and directions of length one, both [..., height, width, 3], in world coordinates.

    Raises:
        UserError: the picture has no pixels.
    """
    if height < 1 or width < 1:
        raise UserError(f"a picture of {height} by {width}: at least 1 pixel is needed")
    columns = torch.arange(width, dtype=intrinsics.dtype, device=intrinsics.device) + 0.5
    rows = torch.arange(height, dtype=intrinsics.dtype, device=intrinsics.device)[:, None] + 0.5
    fx, fy, cx, cy = intrinsics[..., None, None, :].unbind(-1)
    right, up = torch.broadcast_tensors((columns - cx) / fx, (cy - rows) / fy)  # rows count downwards, y is up
    in_camera = torch.stack([right, up, -torch.ones_like(right)], dim=-1)
    directions = torch.einsum("...ij,...hwj->...hwi", poses[..., :3, :3], in_camera)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return poses[..., None, None, :3, 3].expand_as(directions), directions


def turntable_poses(
    count: int, radius: float, elevation: float, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "{count} 4 4"]:
    """Places cameras evenly on a circle around the y axis, all looking at the origin.

    Args:
        count: cameras; the first stands over +z, the next ones turn towards +x.
        radius: distance to the origin, above 0.
        elevation: degrees above the plane y = 0; ±90 looks straight down or up.
        dtype: of the poses.

    Returns:
        [count, 4, 4] camera-to-world.

    Raises:
        UserError: no cameras, or a radius that is not positive.
    """
    if count < 1 or not radius > 0:
        raise UserError(f"a turntable of {count} cameras at radius {radius}: at least 1, at a distance, are needed")
    azimuth = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    sin, cos, zero = azimuth.sin(), azimuth.cos(), torch.zeros_like(azimuth)
    rise, reach = math.sin(math.radians(elevation)), math.cos(math.radians(elevation))
    # In closed form and not by cross products with "up", which vanish for a camera straight above.
    right = torch.stack([cos, zero, -sin], dim=-1)
    up = torch.stack([-rise * sin, zero + reach, -rise * cos], dim=-1)
    backward = torch.stack([reach * sin, zero + rise, reach * cos], dim=-1)
    poses = torch.eye(4, dtype=torch.float64).repeat(count, 1, 1)
    poses[:, :3] = torch.stack([right, up, backward, radius * backward], dim=-1)
    return poses.to(dtype)


def box_intersection(
    origins: Float[Tensor, "*rays 3"], directions: Float[Tensor, "*rays 3"], bound: float = 1.0
) -> tuple[Float[Tensor, "*rays"], Float[Tensor, "*rays"]]:
    """Finds where rays enter and leave the cube [-bound, bound]³ (slab test; Kay and Kajiya, SIGGRAPH 1986).

    Args:
        origins: [..., 3].
        directions: [..., 3], length one.
        bound: half the cube's edge.

    Returns:
        ``near`` and ``far`` [...], 0 ≤ near ≤ far; near is 0 for a camera inside the cube. For a ray that misses, or
        whose cube lies behind it, both are the depth at which it passes closest to the origin: finite, and of length
        zero, so :func:`composite` finds the background there.
    """
    tiny = 1e-10  # instead of an exact zero: 1/0 would put NaN into values and gradients
    slope = torch.where(directions.abs() < tiny, torch.full_like(directions, tiny), directions)
    low, high = (-bound - origins) / slope, (bound - origins) / slope
    near = torch.minimum(low, high).amax(dim=-1).clamp(min=0)
    far = torch.maximum(low, high).amin(dim=-1)
    closest = -(origins * directions).sum(dim=-1).clamp(max=0)
    hit = far > near
    return torch.where(hit, near, closest), torch.where(hit, far, closest)


def stratified_depths(
    near: Tensor | float,
    far: Tensor | float,
    samples: int,
    rays_shape: tuple[int, ...],
    jitter: Float[Tensor, "*jittered {samples}"] | None = None,
) -> Float[Tensor, "*rays {samples}"]:
    """Takes one depth in each of ``samples`` equal intervals between near and far (NeRF, equation 2).

    Args:
        near: depth where the first interval starts, a number or a tensor that broadcasts to ``rays_shape``.
        far: depth where the last interval ends, likewise.
        samples: S, intervals per ray.
        rays_shape: [...], the shape of the rays.
        jitter: [..., S] in [0, 1), where in its interval each depth lies; None takes the middles.

    Returns:
        [..., S], increasing, with the type and device of the first tensor among near, far and jitter.

    Raises:
        UserError: no samples.
    """
    if samples < 1:
        raise UserError(f"{samples} samples along a ray: at least 1 is needed")
    like = next((given for given in (near, far, jitter) if isinstance(given, Tensor)), torch.empty(0))
    near, far = (torch.as_tensor(end, dtype=like.dtype, device=like.device) for end in (near, far))
    place = torch.arange(samples, dtype=like.dtype, device=like.device) + (0.5 if jitter is None else jitter)
    depths = near[..., None] + (far - near)[..., None] * (place / samples)
    return depths.expand(*rays_shape, samples)


def ray_weights(
    density: Float[Tensor, "*rays samples"], depths: Float[Tensor, "*rays samples"], far: Tensor | float
) -> tuple[Float[Tensor, "*rays samples"], Float[Tensor, "*rays"]]:
    """Computes the share of a ray's light from each sample, and the share from behind all of them.

    Alpha compositing with alpha = 1 - exp(-density · length), where a sample's length reaches to the next sample and
    the last one's to ``far`` (Max, 1995; NeRF, equation 3). What passes is a product of exp(-density · length), taken
    as a sum of exponents: a product of 1 - alpha would round to zero, and its gradient divides by it.

    Args:
        density: [..., S] per unit length, at least 0.
        depths: [..., S], increasing.
        far: depth where the last sample ends, a number or [...].

    Returns:
        Weights [..., S] and transmittance [...]; together they sum to 1.
    """
    end = torch.as_tensor(far, dtype=depths.dtype, device=depths.device).expand(depths.shape[:-1])
    lengths = torch.diff(depths, dim=-1, append=end[..., None])
    thickness = density * lengths
    through = thickness.cumsum(dim=-1)
    # Shifted and not `through - thickness`, which cancels behind an opaque sample.
    before = torch.cat([torch.zeros_like(through[..., :1]), through[..., :-1]], dim=-1)
    return -torch.exp(-before) * torch.expm1(-thickness), torch.exp(-through[..., -1])


def composite(
    colour: Float[Tensor, "*rays samples 3"],
    density: Float[Tensor, "*rays samples"],
    depths: Float[Tensor, "*rays samples"],
    far: Tensor | float,
    background: float,
) -> tuple[Float[Tensor, "*rays 3"], Float[Tensor, "*rays"], Float[Tensor, "*rays"]]:
    """Computes what a ray sees (Max, 1995; NeRF, equation 3).

    Args:
        colour: [..., S, 3] of each sample, in any range.
        density: [..., S] per unit length, at least 0.
        depths: [..., S], increasing.
        far: depth where the last sample ends, a number or [...].
        background: colour behind everything, in the range of ``colour``: 1 is white; black is -1 or 0.

    Returns:
        Colour [..., 3]; opacity [...] in [0, 1]; depth [...], the mean depth at which light starts, where light from
        behind everything counts as starting at ``far`` (a mean over the opaque part alone is undefined in empty
        space).
    """
    weights, transmittance = ray_weights(density, depths, far)
    seen = (weights[..., None] * colour).sum(dim=-2) + transmittance[..., None] * background
    return seen, 1 - transmittance, (weights * depths).sum(dim=-1) + transmittance * far
