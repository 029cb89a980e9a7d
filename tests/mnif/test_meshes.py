from pathlib import Path

import numpy as np
import pytest

from mnif.utils import meshes
from mnif.utils.errors import UserError
from mnif.utils.meshes import WRITTEN_SUFFIXES, mesh_from_values, mesh_preview, occupancy_preview, save_mesh

trimesh = pytest.importorskip("trimesh")
pytest.importorskip("skimage")


def centres(resolution: int) -> np.ndarray:
    """Voxel centres [R, R, R, 3]."""
    axis = (2 * np.arange(resolution) + 1) / resolution - 1
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)


def sphere(resolution: int = 32, radius: float = 0.7, middle: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    return radius - np.linalg.norm(centres(resolution) - middle, axis=-1)


def box(low: tuple[int, int, int], high: tuple[int, int, int], resolution: int = 16) -> np.ndarray:
    """Occupancy of the voxels from ``low`` up to, not including, ``high``."""
    occupancy = np.zeros((resolution,) * 3, dtype=bool)
    occupancy[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return occupancy


def shown(picture: np.ndarray) -> tuple[float, float]:
    """Mean row and column of what is not white, as fractions of the picture."""
    rows, columns = np.nonzero(picture[..., 0] < 255)
    return rows.mean() / len(picture), columns.mean() / len(picture)


@pytest.mark.parametrize("level", [0.0, -0.1])
def test_sphere_has_the_volume_and_area_of_one(level: float) -> None:
    vertices, faces = mesh_from_values(sphere(48), level)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    radius = 0.7 - level
    assert vertices.dtype == np.float32
    assert faces.dtype == np.int64
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.005)
    assert mesh.area == pytest.approx(4 * np.pi * radius**2, rel=0.005)
    np.testing.assert_allclose(np.linalg.norm(vertices, axis=1), radius, atol=0.002)


def test_axes_keep_their_order() -> None:
    vertices, _ = mesh_from_values(sphere(radius=0.2, middle=(0.5, -0.25, 0.1)))
    np.testing.assert_allclose((vertices.min(axis=0) + vertices.max(axis=0)) / 2, [0.5, -0.25, 0.1], atol=0.01)


def test_box_at_the_border_is_closed_on_the_face_of_the_cube() -> None:
    vertices, faces = mesh_from_values(box((0, 4, 4), (8, 16, 12)), level=0.5)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    np.testing.assert_allclose(mesh.bounds, [[-1, -0.5, -0.5], [0, 1, 0.5]], atol=1e-6)
    assert mesh.volume == pytest.approx(1 * 1.5 * 1, rel=0.02)  # the edges are cut off by half a voxel


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9])
def test_noise_is_closed_too(share: float) -> None:
    """Binary noise has every ambiguous case of marching cubes, inside and on the border."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        mesh = trimesh.Trimesh(*mesh_from_values(generator.random((9, 9, 9)) < share, level=0.5), process=False)
        assert mesh.is_watertight
        assert mesh.volume > 0
        assert np.abs(mesh.bounds).max() <= 1


@pytest.mark.parametrize("suffix", [*WRITTEN_SUFFIXES, ".GLB"])
def test_a_file_holds_the_mesh_that_was_saved(suffix: str, tmp_path: Path) -> None:
    vertices, faces = mesh_from_values(sphere(16, middle=(0.1, 0.2, 0.3)))
    path = tmp_path / f"folder/sphere{suffix}"
    save_mesh(path, vertices, faces)
    save_mesh(path, vertices, faces)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    before, after = trimesh.Trimesh(vertices, faces, process=False), trimesh.load(path, force="mesh")
    assert after.is_watertight
    assert after.volume == pytest.approx(before.volume, rel=1e-5)
    np.testing.assert_allclose(after.bounds, before.bounds, atol=1e-6)
    np.testing.assert_allclose(after.center_mass, before.center_mass, atol=1e-5)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.txt: a mesh is written as one of \.glb, \.obj, \.ply, \.stl"):
        save_mesh(tmp_path / "a.txt", *mesh_from_values(sphere(8)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((4, 4, 4)), "none of the values are above 0"),
        (np.ones((4, 4, 4)), "all of the values are above 0"),
        (np.full((4, 4, 4), np.nan), "NaN"),
        (np.ones((4, 4)), r"\[4, 4\]; \[R, R, R\]"),
        (np.ones((4, 4, 5)), r"\[4, 4, 5\]; \[R, R, R\]"),
        (np.ones((0, 0, 0)), r"\[0, 0, 0\]; \[R, R, R\]"),
    ],
)
def test_values_without_a_surface_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mesh_from_values(values)


def test_preview_shows_things_where_they_are() -> None:
    kwargs = {"azimuth": 0.0, "elevation": 0.0, "size": 64}  # from +z: x is right and y is up
    row, column = shown(occupancy_preview(box((6, 12, 6), (10, 16, 10)), **kwargs))
    assert (row, column) == pytest.approx((1 / 8, 1 / 2), abs=0.02)
    row, column = shown(occupancy_preview(box((12, 0, 6), (16, 4, 10)), **kwargs))
    assert (row, column) == pytest.approx((7 / 8, 7 / 8), abs=0.02)
    kwargs["azimuth"] = 90.0  # from +x: what is near +z is left
    row, column = shown(occupancy_preview(box((6, 6, 12), (10, 10, 16)), **kwargs))
    assert (row, column) == pytest.approx((1 / 2, 1 / 8), abs=0.02)
    kwargs["elevation"] = 90.0  # from above: what is near +x is below
    row, column = shown(occupancy_preview(box((12, 6, 6), (16, 10, 10)), **kwargs))
    assert (row, column) == pytest.approx((7 / 8, 1 / 2), abs=0.02)


def test_preview_shows_what_is_in_front() -> None:
    """A slanted face in front of one that faces the light: each shade tells which is seen."""
    triangle = np.array([[-1.0, -1, 0], [1, -1, 0], [0, 1, 0]])
    slanted = triangle * 0.4 + triangle[:, :1] * [0, 0, 0.3]
    alone = [
        mesh_preview(part, np.array([[0, 1, 2]]), size=32, azimuth=0, elevation=0)[18, 16, 0]
        for part in (triangle, slanted)
    ]
    assert alone[0] != alone[1]
    for behind in (0, 1):
        stack = np.concatenate([triangle, slanted + np.array([0, 0, -0.6 if behind else 0.6])])
        for order in ([[0, 1, 2], [3, 4, 5]], [[5, 4, 3], [2, 1, 0]]):
            picture = mesh_preview(stack, np.array(order), size=32, azimuth=0, elevation=0)
            assert picture[18, 16, 0] == alone[0 if behind else 1]


def test_preview_has_no_cracks_and_does_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    vertices, faces = mesh_from_values(sphere())
    picture = mesh_preview(vertices, faces, size=200)
    rows, columns = np.mgrid[0:200, 0:200]
    extent = 2 * np.sin(np.radians(25)) * np.cos(np.radians(45 - 35)) / np.sqrt(2) + np.cos(np.radians(25))
    distance = np.hypot(rows - 99.5, columns - 99.5) / 100 * extent
    assert (picture[distance < 0.68] < 255).all()
    assert (picture[distance > 0.72] == 255).all()
    monkeypatch.setattr(meshes, "_PIXELS_AT_ONCE", 1000)
    np.testing.assert_array_equal(mesh_preview(vertices, faces, size=200), picture)


def test_preview_fits_the_whole_cube_from_everywhere() -> None:
    everything = np.ones((8, 8, 8), dtype=bool)
    for azimuth in range(0, 360, 40):
        picture = occupancy_preview(everything, size=64, azimuth=azimuth, elevation=azimuth / 4)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all() or azimuth == 0
        assert 0.3 < (picture[..., 0] < 255).mean() <= 1


def test_preview_of_nothing_is_white() -> None:
    assert (occupancy_preview(np.zeros((8, 8, 8), dtype=bool), size=20) == 255).all()
    assert mesh_preview(np.empty((0, 3)), np.empty((0, 3), dtype=int), size=20).shape == (20, 20, 3)


def test_preview_cuts_off_what_is_outside() -> None:
    triangle = np.array([[-50.0, -50, 0], [50, -50, 0], [0, 50, 0]])
    assert (mesh_preview(triangle, np.array([[0, 1, 2]]), size=16, azimuth=0, elevation=0) < 255).all()
    assert (mesh_preview(triangle + np.array([0, 900, 0]), np.array([[0, 1, 2]]), size=16) == 255).all()


def test_a_preview_without_pixels_is_refused() -> None:
    with pytest.raises(UserError, match="size 0"):
        occupancy_preview(np.ones((4, 4, 4), dtype=bool), size=0)
