import math

import pytest
import torch
from torch import Tensor

from mnif.signals.volume_rendering import (
    box_intersection,
    camera_rays,
    composite,
    ray_weights,
    stratified_depths,
    turntable_poses,
)
from mnif.utils.errors import UserError


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_rays(generator: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Rays from around and inside the cube to around the origin: about half of them hit it."""
    origins = torch.randn(count, 3, generator=generator, dtype=torch.float64) * 2
    towards = torch.randn(count, 3, generator=generator, dtype=torch.float64) - origins
    return origins, towards / towards.norm(dim=-1, keepdim=True)


def test_points_on_rays_project_to_pixel_centres(generator: torch.Generator) -> None:
    poses = turntable_poses(5, 2.5, 30, dtype=torch.float64)
    intrinsics = torch.tensor([70.0, 75.0, 11.0, 8.5], dtype=torch.float64).expand(5, 4)
    origins, directions = camera_rays(poses, intrinsics, height=16, width=24)
    assert origins.shape == directions.shape == (5, 16, 24, 3)
    torch.testing.assert_close(directions.norm(dim=-1), torch.ones(5, 16, 24, dtype=torch.float64))
    depth = torch.rand(5, 16, 24, 1, generator=generator, dtype=torch.float64) + 0.5
    world = origins + depth * directions
    homogeneous = torch.cat([world, torch.ones_like(depth)], dim=-1)
    camera = torch.einsum("nij,nhwj->nhwi", torch.linalg.inv(poses), homogeneous)
    fx, fy, cx, cy = intrinsics[0]
    columns = cx + fx * camera[..., 0] / -camera[..., 2]
    rows = cy - fy * camera[..., 1] / -camera[..., 2]
    assert (camera[..., 2] < 0).all()
    torch.testing.assert_close(columns, (torch.arange(24.0).double() + 0.5).expand(5, 16, 24))
    torch.testing.assert_close(rows, (torch.arange(16.0).double() + 0.5)[:, None].expand(5, 16, 24))


def test_one_camera_serves_many_poses_and_none() -> None:
    intrinsics = torch.tensor([10.0, 10.0, 4.0, 4.0])
    poses = turntable_poses(6, 2.0, 10)
    many, _ = camera_rays(poses.view(2, 3, 4, 4), intrinsics, 8, 8)
    one, _ = camera_rays(poses[4], intrinsics, 8, 8)
    assert many.shape == (2, 3, 8, 8, 3)
    torch.testing.assert_close(many[1, 1], one)


def test_the_first_pixel_is_up_and_left() -> None:
    _, directions = camera_rays(torch.eye(4), torch.tensor([4.0, 4.0, 4.0, 4.0]), 8, 8)
    assert directions[0, 0, 0] < 0 < directions[0, 0, 1]
    assert (directions[..., 2] < 0).all()


@pytest.mark.parametrize("elevation", [-90.0, -20.0, 0.0, 35.0, 90.0])
def test_turntable_cameras_are_rotations_that_face_the_origin(elevation: float) -> None:
    poses = turntable_poses(7, 3.0, elevation, dtype=torch.float64)
    rotations, positions = poses[:, :3, :3], poses[:, :3, 3]
    torch.testing.assert_close(rotations.mT @ rotations, torch.eye(3, dtype=torch.float64).expand(7, 3, 3))
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(positions, 3.0 * rotations[:, :, 2])  # it looks along -z, so +z points away
    torch.testing.assert_close(positions[:, 1], torch.full((7,), 3 * math.sin(math.radians(elevation))).double())
    assert (rotations[:, 1, 1] > -1e-12).all()  # never upside down
    torch.testing.assert_close(rotations[:, 1, 0], torch.zeros(7, dtype=torch.float64))  # the horizon is level


def test_turntable_starts_over_z_and_turns_towards_x() -> None:
    positions = turntable_poses(4, 2.0, 0.0)[:, :3, 3]
    torch.testing.assert_close(positions, torch.tensor([[0.0, 0, 2], [2, 0, 0], [0, 0, -2], [-2, 0, 0]]))


def test_box_is_where_points_on_the_ray_are_inside(generator: torch.Generator) -> None:
    origins, directions = random_rays(generator, 500)
    near, far = box_intersection(origins, directions, bound=0.8)
    depths = torch.linspace(0, 12, 6001, dtype=torch.float64)
    inside = (origins[:, None] + depths[:, None] * directions[:, None]).abs().amax(dim=-1) <= 0.8
    hit = inside.any(dim=-1)
    assert 100 < hit.sum() < 400
    assert (hit <= (far > near)).all()
    assert (far - near)[~hit].max() < 0.002  # a corner between two of the samples
    first = depths[inside.int().argmax(dim=-1)]
    last = depths[6000 - inside.flip(-1).int().argmax(dim=-1)]
    torch.testing.assert_close(near[hit], first[hit], atol=0.002, rtol=0)
    torch.testing.assert_close(far[hit], last[hit], atol=0.002, rtol=0)
    assert (origins[hit].abs().amax(dim=-1) < 0.8).any()  # some cameras stand inside


def test_box_along_the_axes_and_past_the_cube() -> None:
    origins = torch.tensor([[0.0, 0, 3], [0.5, -0.5, 3], [-1.0, 0, 3], [2.0, 0, 3], [0.0, 0, -3], [0.0, 0, 0]])
    directions = torch.tensor([0.0, 0.0, -1.0]).expand(6, 3).clone().requires_grad_()
    near, far = box_intersection(origins, directions)
    assert near.tolist() == [2, 2, 2, 3, 0, 0]
    assert far.tolist() == [4, 4, 4, 3, 0, 1]
    (gradient,) = torch.autograd.grad((near + far).sum(), directions)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("jittered", [False, True])
def test_one_depth_in_every_interval(generator: torch.Generator, jittered: bool) -> None:
    near = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    far = near + 1 + torch.rand(3, 4, generator=generator, dtype=torch.float64)
    jitter = torch.rand(3, 4, 10, generator=generator, dtype=torch.float64) if jittered else None
    depths = stratified_depths(near, far, 10, (3, 4), jitter)
    interval = (depths - near[..., None]) / (far - near)[..., None] * 10
    assert interval.floor().equal(torch.arange(10.0).double().expand(3, 4, 10))
    if not jittered:
        torch.testing.assert_close(interval - interval.floor(), torch.full_like(depths, 0.5))


def test_depths_between_numbers() -> None:
    depths = stratified_depths(1.0, 2.0, 4, (2, 3))
    assert depths.shape == (2, 3, 4)
    assert depths.dtype == torch.float32
    assert depths[1, 2].tolist() == [1.125, 1.375, 1.625, 1.875]
    assert stratified_depths(1.0, torch.tensor([2.0, 3.0]).double(), 4, (2,)).dtype == torch.float64


def test_slab_of_constant_density_follows_beer_lambert() -> None:
    """Light from d deep in a slab of density σ starts there with density σ·exp(-σd)."""
    sigma, near, far, samples = 1.7, 0.5, 2.5, 100_000
    depths = stratified_depths(near, torch.tensor(far, dtype=torch.float64), samples, ())
    density = torch.full((samples,), sigma, dtype=torch.float64)
    colour = (depths[:, None] - near).expand(-1, 3)  # grows with depth, so its mean is known too
    seen, opacity, depth = composite(colour, density, depths, far, background=0.0)
    length = far - near
    passed = math.exp(-sigma * length)
    assert opacity.item() == pytest.approx(1 - passed, abs=1e-5)
    mean = (1 - passed * (1 + sigma * length)) / sigma  # ∫ d σ exp(-σd)
    assert seen.tolist() == pytest.approx([mean] * 3, abs=1e-5)
    assert depth.item() == pytest.approx(near * (1 - passed) + mean + passed * far, abs=1e-5)


def test_two_slabs_hide_each_other_in_order() -> None:
    depths = torch.tensor([1.0, 2.0], dtype=torch.float64)
    density = torch.tensor([0.5, 2.0], dtype=torch.float64)
    colour = torch.eye(3, dtype=torch.float64)[:2]
    seen, _, _ = composite(colour, density, depths, far=2.5, background=1.0)
    front, back = 1 - math.exp(-0.5), 1 - math.exp(-2.0 * 0.5)
    behind = (1 - front) * (1 - back)
    assert seen.tolist() == pytest.approx([front + behind, (1 - front) * back + behind, behind])


def test_opaque_wall_gives_its_colour_and_depth() -> None:
    depths = stratified_depths(0.0, 4.0, 64, (2,))
    density = torch.where(depths > 2, 1e6, 0.0)
    colour = torch.where(depths[..., None] > 2, torch.tensor([0.2, -0.4, 0.6]), torch.tensor(9.0))
    seen, opacity, depth = composite(colour, density, depths, 4.0, background=1.0)
    torch.testing.assert_close(seen, torch.tensor([0.2, -0.4, 0.6]).expand(2, 3))
    assert opacity.tolist() == [1, 1]
    assert depth.tolist() == [2.03125, 2.03125]  # the first sample behind the wall's face


@pytest.mark.parametrize("background", [1.0, 0.0, -1.0])
def test_empty_space_shows_the_background(generator: torch.Generator, background: float) -> None:
    depths = stratified_depths(0.0, 4.0, 16, (5,))
    colour = torch.randn(5, 16, 3, generator=generator)
    seen, opacity, depth = composite(colour, torch.zeros(5, 16), depths, 4.0, background)
    assert (seen == background).all()
    assert (opacity == 0).all()
    assert (depth == 4).all()


def test_ray_that_misses_the_cube_shows_the_background() -> None:
    near, far = box_intersection(torch.tensor([[3.0, 3, 3]]), torch.tensor([[0.0, 1, 0]]))
    depths = stratified_depths(near, far, 8, (1,))
    seen, opacity, _ = composite(torch.zeros(1, 8, 3), torch.full((1, 8), 1e4), depths, far, background=1.0)
    assert seen.tolist() == [[1, 1, 1]]
    assert opacity.tolist() == [0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_weights_and_transmittance_sum_to_one(generator: torch.Generator, scale: float) -> None:
    depths = torch.rand(50, 40, generator=generator).sort(dim=-1).values
    density = torch.rand(50, 40, generator=generator) * scale
    weights, transmittance = ray_weights(density, depths, 1.0)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(dim=-1) + transmittance, torch.ones(50))


def test_opaque_samples_keep_gradients_finite() -> None:
    density = torch.tensor([0.0, 1e8, 1e8, 1.0], requires_grad=True)
    seen, _, _ = composite(torch.rand(4, 3), density, torch.arange(4.0), 4.0, background=1.0)
    (gradient,) = torch.autograd.grad(seen.sum(), density)
    assert gradient.isfinite().all()


def test_rendering_can_be_differentiated_twice(generator: torch.Generator) -> None:
    def tensor(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    intrinsics = torch.tensor([4.0, 4.0, 1.0, 1.0], dtype=torch.float64)

    def render(colour: Tensor, density: Tensor, pose: Tensor) -> tuple[Tensor, ...]:
        origins, directions = camera_rays(pose, intrinsics, 2, 2)
        near, far = box_intersection(origins, directions)
        depths = stratified_depths(near, far, 3, (2, 2))
        return composite(colour, density, depths, far, background=1.0)

    inputs = (tensor(2, 2, 3, 3), tensor(2, 2, 3) * 3, turntable_poses(1, 2.5, 20, dtype=torch.float64)[0])
    inputs = tuple(part.requires_grad_() for part in inputs)
    assert torch.autograd.gradcheck(render, inputs)
    assert torch.autograd.gradgradcheck(render, inputs)


def test_what_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(UserError, match="0 by 4"):
        camera_rays(torch.eye(4), torch.ones(4), 0, 4)
    with pytest.raises(UserError, match="0 samples"):
        stratified_depths(0.0, 1.0, 0, (2,))
    with pytest.raises(UserError, match="0 cameras"):
        turntable_poses(0, 1.0, 0.0)
    with pytest.raises(UserError, match="radius 0"):
        turntable_poses(2, 0.0, 0.0)
