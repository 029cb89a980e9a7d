from pathlib import Path

import numpy as np
import pytest

from evals.metrics.shapes import POINTS, chamfer_distance, distance_matrix, surface_points, surfaces_of_grids
from evals.voxel_sets import real_shapes, shape_files
from mnif.data.dataset import Split
from mnif.data.voxel_formats import write_binvox
from mnif.data.voxels import load_voxels
from mnif.utils.errors import UserError
from mnif.utils.meshes import mesh_from_values, save_mesh

pytest.importorskip("trimesh")
pytest.importorskip("skimage")


def ball(radius: float = 0.6, resolution: int = 24, x: float = 0.0) -> np.ndarray:
    """Occupancies in [0, 1], one half on the sphere."""
    axis = (2 * np.arange(resolution) + 1) / resolution - 1
    distance = np.linalg.norm(np.stack(np.meshgrid(axis - x, axis, axis, indexing="ij")), axis=0)
    return np.clip(0.5 + (radius - distance) * 4, 0, 1).astype(np.float32)


def test_points_lie_on_the_surface_evenly() -> None:
    points = surfaces_of_grids([ball(x=0.1)], ["a"], level=0.5).points[0] - [0.1, 0, 0]
    assert points.shape == (POINTS, 3)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 0.6, atol=0.01)
    octants = np.unique(points > 0, axis=0, return_counts=True)[1]
    assert len(octants) == 8
    assert octants.min() > 0.8 * POINTS / 8


def test_points_depend_on_name_and_seed_alone() -> None:
    grids = [ball(), ball(0.4)]
    both = surfaces_of_grids(grids, ["a", "b"], level=0.5).points
    np.testing.assert_array_equal(surfaces_of_grids(grids[1:], ["b"], level=0.5).points[0], both[1])
    mesh = mesh_from_values(ball(), 0.5)
    assert not np.array_equal(surface_points(mesh, "a"), surface_points(mesh, "b"))
    assert not np.array_equal(surface_points(mesh, "a"), surface_points(mesh, "a", seed=1))


def test_a_second_look_is_nearer_than_another_shape() -> None:
    mesh, other = mesh_from_values(ball(), 0.5), mesh_from_values(ball(0.5), 0.5)
    again = chamfer_distance(surface_points(mesh, "a"), surface_points(mesh, "b"))
    assert 0 < again < 0.003
    assert chamfer_distance(surface_points(mesh, "a"), surface_points(other, "b")) > 2 * 0.1**2


def test_empty_and_full_shapes_are_counted() -> None:
    grids = [np.zeros((8, 8, 8)), ball(resolution=8), np.ones((8, 8, 8)), np.full((8, 8, 8), 0.5)]
    surfaces = surfaces_of_grids(grids, list("abcd"), level=0.5)
    assert (surfaces.empty, surfaces.full, len(surfaces)) == (2, 1, 4)
    np.testing.assert_array_equal(surfaces.present, [False, True, False, False])
    assert np.isinf(distance_matrix(surfaces.points)).all()
    with pytest.raises(UserError, match="a: the values hold NaN"):
        surfaces_of_grids([np.full((8, 8, 8), np.nan)], ["a"], level=0.5)


def test_grids_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    grids = np.stack([ball(0.3), ball(0.6), np.zeros((24, 24, 24), np.float32)])
    np.save(tmp_path / "all.npy", grids)
    np.savez(tmp_path / "all.npz", voxels=grids)
    (tmp_path / "folder").mkdir()
    for index, grid in enumerate(grids):
        np.savez(tmp_path / f"folder/{index}.npz", occupancy=grid)
    (tmp_path / "folder/readme.txt").touch()
    expected = surfaces_of_grids(grids, ["drawn 0", "drawn 1", "drawn 2"], level=0.5)
    for source in ("all.npy", "all.npz", "folder"):
        surfaces = shape_files(str(tmp_path / source)).surfaces(10)
        np.testing.assert_array_equal(surfaces.points, expected.points)
        assert surfaces.empty == 1
    assert len(shape_files(str(tmp_path / "all.npy")).surfaces(2)) == 2

    (tmp_path / "binvox").mkdir()
    write_binvox(tmp_path / "binvox/a.binvox", grids[1] > 0.5)
    found = shape_files(str(tmp_path / "binvox")).surfaces(10)
    np.testing.assert_allclose(np.linalg.norm(found.points[0], axis=1), 0.6, atol=0.05)


def test_meshes_are_taken_where_they_stand(tmp_path: Path) -> None:
    vertices, faces = mesh_from_values(ball(0.3, x=0.4), 0.5)
    save_mesh(tmp_path / "000.glb", vertices, faces)
    (tmp_path / "000.png").touch()  # `mnif decode` puts a picture beside each mesh
    points = shape_files(str(tmp_path)).surfaces(5).points[0]
    np.testing.assert_allclose(np.linalg.norm(points - [0.4, 0, 0], axis=1), 0.3, atol=0.01)
    save_mesh(tmp_path / "001.glb", vertices * 2, faces)
    with pytest.raises(UserError, match=r"001\.glb: a corner has the coordinate 1\.39; drawn meshes lie in the cube"):
        shape_files(str(tmp_path)).surfaces(5)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a.npy": np.zeros((4, 4, 5))}, r"a\.npy: an array is \[4, 4, 5\]; cubes"),
        ({"a.npy": np.full((4, 4, 4), -1.0)}, r"a\.npy: holds values outside \[0, 1\]"),
        ({"a.npy": np.full((4, 4, 4), np.nan)}, r"a\.npy: holds something other than finite numbers"),
        ({"a.npy": np.zeros((4, 4, 4)), "b.npy": np.zeros((8, 8, 8))}, r"b\.npy: 8³ cells where a\.npy has 4³"),
        ({"a.npy": np.zeros((4, 4, 4)), "b.stl": None}, "both grids and meshes"),
        ({"a.stl": None}, r"a\.stl: (unreadable|has no faces)"),
        ({"a.txt": None}, r"no shapes here \(\.npz"),
    ],
)
def test_bad_files_are_refused(arrays: dict[str, np.ndarray | None], message: str, tmp_path: Path) -> None:
    for name, array in arrays.items():
        if array is None:
            (tmp_path / name).touch()
        else:
            np.save(tmp_path / name, array)
    with pytest.raises(UserError, match=message):
        shape_files(str(tmp_path)).surfaces(10)


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder, or file of \.npz, \.npy, \.binvox"):
        shape_files(str(tmp_path / "nowhere"))
    np.savez(tmp_path / "a.npz", other=np.zeros(3))
    with pytest.raises(UserError, match=r'"voxels" or "occupancy".*found other'):
        shape_files(str(tmp_path / "a.npz")).surfaces(1)


def test_real_shapes_that_fill_their_grid_are_left_out_and_counted(tmp_path: Path) -> None:
    voxels = np.zeros((40, 8, 8, 8), dtype=bool)
    voxels[:, 2:6, 2:6, 2:6] = True
    voxels[::10] = True
    np.savez(tmp_path / "boxes.npz", voxels=voxels)
    data = load_voxels(str(tmp_path / "boxes.npz"))
    splits = np.where(np.arange(40) < 20, Split.TRAIN, Split.HELD_OUT)
    real = real_shapes(data, splits)
    assert (len(real.reference), len(real.floor), real.left_out, real.part) == (18, 18, 4, "unseen")
    assert real_shapes(data, np.full(40, Split.TRAIN)).part == "half"
    with pytest.raises(UserError, match="at least 8 each of two parts"):
        real_shapes(data.rows(np.arange(12)), splits[:12])
