import sys
from pathlib import Path

import numpy as np
import pytest

from mnif.data.voxel_formats import read_binvox, voxelise_mesh, write_binvox
from mnif.data.voxels import VoxelData, load_voxels
from mnif.utils.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def blobs(count: int, resolution: int) -> np.ndarray:
    """Random boxes, which have no symmetry that could hide swapped axes."""
    generator = np.random.default_rng(0)
    grids = np.zeros((count,) + (resolution,) * 3, dtype=bool)
    for grid in grids:
        low = generator.integers(0, resolution // 2, 3)
        high = low + generator.integers(1, resolution // 2 + 1, 3)
        grid[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = True
    return grids


@pytest.mark.parametrize("resolution", [8, 10])
def test_npz_and_npy(tmp_path: Path, resolution: int) -> None:
    grids = blobs(4, resolution)
    np.savez(tmp_path / "a.npz", voxels=grids.astype(np.uint8), ids=list("wxyz"), groups=list("aabb"))
    data = load_voxels(str(tmp_path / "a.npz"))
    assert data.packed.shape == (4, resolution, resolution, -(-resolution // 8))
    assert (data.ids, data.groups, data.resolution) == (list("wxyz"), list("aabb"), resolution)
    np.testing.assert_array_equal(data.occupancy(), grids)
    np.testing.assert_array_equal(data.occupancy(np.array([2, 0])), grids[[2, 0]])
    np.savez(tmp_path / "b.npz", packed=data.packed, resolution=resolution)
    np.savez(tmp_path / "c.npz", occupancy=grids.astype(np.float32))
    np.save(tmp_path / "d.npy", grids)
    for name in ("b.npz", "c.npz", "d.npy"):
        np.testing.assert_array_equal(load_voxels(str(tmp_path / name)).packed, data.packed)


def test_reduced_by_half_of_the_cells_but_nothing_vanishes(tmp_path: Path) -> None:
    grids = np.zeros((3, 8, 8, 8), dtype=bool)
    grids[0, :2, :2, :1] = True  # half of a coarse cell
    grids[0, 4:6, 4:6, 4] = True
    grids[0, 4, 4, 4] = False  # three of eight
    grids[1, 7, 0, 3] = True  # one cell alone
    grids[2, 1:7, 2:8, 0:5] = True
    np.save(tmp_path / "a.npy", grids)
    data = load_voxels(str(tmp_path / "a.npy"), 4)
    first, lone, box = data.occupancy()
    assert np.argwhere(first).tolist() == [[0, 0, 0]]
    assert np.argwhere(lone).tolist() == [[3, 0, 1]]
    means = [[[grids[2, x : x + 2, y : y + 2, z : z + 2].mean() for z in range(0, 8, 2)] for y in range(0, 8, 2)]
             for x in range(0, 8, 2)]  # fmt: skip
    np.testing.assert_array_equal(box, np.array(means) >= 0.5)
    with pytest.raises(UserError, match="have 8 cells per axis"):
        load_voxels(str(tmp_path / "a.npy"), 3)
    with pytest.raises(UserError, match="have 8 cells per axis"):
        load_voxels(str(tmp_path / "a.npy"), 16)


def test_over_the_limit_grids_are_memory_mapped(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grids = blobs(6, 8)
    np.save(tmp_path / "a.npy", grids)
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "0")
    data = load_voxels(str(tmp_path / "a.npy"))
    assert isinstance(data.packed, np.memmap)
    assert len(list(cache.iterdir())) == 1
    chosen = data.rows(np.arange(6) % 2 == 1)
    assert len(chosen) == 3
    np.testing.assert_array_equal(chosen.occupancy(slice(1, 3)), grids[[3, 5]])


def test_binvox_as_its_specification_orders_cells(tmp_path: Path) -> None:
    header = b"#binvox 1\ndim 2 2 2\ntranslate -0.5 0 0\nscale 2.5\ndata\n"
    # y runs fastest, then z, then x: cell number x·4 + z·2 + y. Occupied are 1 (x0 z0 y1), 6 and 7 (x1 z1).
    (tmp_path / "a.binvox").write_bytes(header + bytes([0, 1, 1, 1, 0, 4, 1, 2]))
    (tmp_path / "b.binvox").write_bytes(header.replace(b"x 1", b"x 2") + bytes([0, 1, 9, 1, 0, 4, 3, 2]))
    data = load_voxels(str(tmp_path))
    assert data.ids == ["a.binvox", "b.binvox"]
    for grid in data.occupancy():
        assert np.argwhere(grid).tolist() == [[0, 1, 0], [1, 0, 1], [1, 1, 1]]


@pytest.mark.parametrize("resolution", [1, 7, 32])
def test_binvox_there_and_back(tmp_path: Path, resolution: int) -> None:
    trimesh = pytest.importorskip("trimesh")
    grid = np.random.default_rng(0).random((resolution,) * 3) < 0.02
    grid[0, 0, 0] = True
    write_binvox(tmp_path / "a.binvox", grid)
    np.testing.assert_array_equal(read_binvox(tmp_path / "a.binvox"), grid)
    if resolution > 1:
        with (tmp_path / "a.binvox").open("rb") as file:
            other = trimesh.exchange.binvox.load_binvox(file, axis_order="xzy")
        np.testing.assert_array_equal(other.matrix, grid)


@pytest.mark.parametrize("suffix", [".obj", ".glb", ".stl", ".ply", ".off"])
def test_a_box_fills_as_many_cells_as_it_measures(tmp_path: Path, suffix: str) -> None:
    trimesh = pytest.importorskip("trimesh")
    box = trimesh.creation.box(extents=(18, 12, 6))
    box.apply_translation((5, -40, 3))
    box.export(tmp_path / f"box{suffix}")
    grid = voxelise_mesh(tmp_path / f"box{suffix}", 20)
    expected = np.zeros((20, 20, 20), dtype=bool)
    expected[1:19, 4:16, 7:13] = True  # 0.9 of 20 cells is 18: a unit is a cell
    np.testing.assert_array_equal(grid, expected)


@pytest.mark.parametrize("resolution", [16, 33])
def test_a_ball_has_its_volume_and_no_hole(tmp_path: Path, resolution: int) -> None:
    trimesh = pytest.importorskip("trimesh")
    ball = trimesh.creation.icosphere(subdivisions=3)
    ball.export(tmp_path / "ball.ply")
    grid = voxelise_mesh(tmp_path / "ball.ply", resolution)
    scale = 0.9 * resolution / ball.extents.max()
    assert grid.sum() == pytest.approx(ball.volume * scale**3, rel=0.01)
    distance = np.linalg.norm(np.mgrid[0:resolution, 0:resolution, 0:resolution] + 0.5 - resolution / 2, axis=0)
    assert grid[distance < scale - 0.6].all()
    assert not grid[distance > scale + 0.6].any()


def test_mesh_folder_is_voxelised_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trimesh = pytest.importorskip("trimesh")
    folder = tmp_path / "meshes"
    folder.mkdir()
    trimesh.creation.box(extents=(2, 1, 1)).export(folder / "a.obj")
    scene = trimesh.Scene([trimesh.creation.box(), trimesh.creation.icosphere().apply_translation((3, 0, 0))])
    scene.export(folder / "b.glb")
    data = load_voxels(str(folder))
    assert (data.resolution, data.ids) == (32, ["a.obj", "b.glb"])
    monkeypatch.setitem(sys.modules, "trimesh", None)
    np.testing.assert_array_equal(load_voxels(str(folder)).packed, data.packed)  # from the cache


def imnet_points(grid: np.ndarray, cells: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """A point in each of these cells, somewhere inside, and whether the cell is occupied."""
    offsets = np.random.default_rng(1).integers(0, step, cells.shape)
    return (cells * step + offsets).astype(np.uint8), grid[tuple(cells.T)][:, None].astype(np.uint8)


def test_imnet_hdf5(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    voxels = blobs(2, 64)
    with h5py.File(tmp_path / "all_vox256_img_train.hdf5", "w") as file:
        file.create_dataset("voxels", data=voxels[..., None].astype(np.uint8), compression=9)
        file.create_dataset("pixels", data=np.zeros((2, 24, 137, 137), np.uint8), compression=9)
        file.create_dataset("points_16", data=np.zeros((2, 4096, 3), np.uint8))
        file.create_dataset("values_16", data=np.zeros((2, 4096, 1), np.uint8))
    data = load_voxels(str(tmp_path / "all_vox256_img_train.hdf5"))
    assert data.ids == ["000000", "000001"]
    np.testing.assert_array_equal(data.occupancy(), voxels)
    (tmp_path / "all_vox256_img_train.txt").write_text("03001627/a\n03001627/b\n")
    assert load_voxels(str(tmp_path / "all_vox256_img_train.hdf5"), 32).ids == ["03001627/a", "03001627/b"]
    (tmp_path / "all_vox256_img_train.txt").write_text("03001627/a\n")
    with pytest.raises(UserError, match="1 names for the 2 shapes"):
        load_voxels(str(tmp_path / "all_vox256_img_train.hdf5"))


def test_imnet_points_alone_give_the_grid_they_cover(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    coarse = blobs(2, 16)
    every = np.argwhere(np.ones((16, 16, 16)))
    some = np.argwhere(np.ones((64, 64, 64)))[::16]
    path = tmp_path / "points.h5"
    with h5py.File(path, "w") as file:
        for name, cells, step in (("16", every, 16), ("64", some, 4)):
            pairs = [imnet_points(grid.repeat(16 // step, 0).repeat(16 // step, 1).repeat(16 // step, 2), cells, step)
                     for grid in coarse]  # fmt: skip
            file[f"points_{name}"] = np.stack([points for points, _ in pairs])
            file[f"values_{name}"] = np.stack([values for _, values in pairs])
    np.testing.assert_array_equal(load_voxels(str(path)).occupancy(), coarse)
    assert load_voxels(str(path), 8).resolution == 8
    with pytest.raises(UserError, match=r'covers? no whole grid: "points_64" has a point in 6% of the 64³ cells'):
        load_voxels(str(path), 64)
    with h5py.File(path, "r+") as file:
        file["points_16"][1, 1] = file["points_16"][1, 0]
    with pytest.raises(UserError, match="shape 1 has no point in 0% of the 16³ cells"):
        load_voxels(str(path))


def test_bad_hdf5_names_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"

    def refused(match: str, **arrays: np.ndarray) -> None:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array
        with pytest.raises(UserError, match=match):
            load_voxels(str(path))

    refused('"points" and "values"; found pixels', pixels=np.zeros((1, 2)))
    refused(r'"voxels" is \[2, 4, 4, 4, 3\]', voxels=np.zeros((2, 4, 4, 4, 3)))
    refused(r'"points" is float64', points=np.zeros((1, 8, 3)), values=np.zeros((1, 8, 1)))
    refused('"values" is', points=np.zeros((1, 8, 3), int), values=np.zeros((1, 7, 1)))
    refused("points from 0 to 300", points=np.full((1, 8, 3), [0, 0, 300]), values=np.zeros((1, 8, 1)))
    path.write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="not a readable HDF5 file"):
        load_voxels(str(path))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(UserError, match=r"mnif-diffusion\[voxels\]"):
        load_voxels(str(path))


def test_bad_grids_name_themselves(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"

    def refused(match: str, **arrays: np.ndarray) -> None:
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=match):
            load_voxels(str(path))

    grids = blobs(2, 4).astype(np.float32)
    grids[1] = 0
    refused("shape 'y' is empty", voxels=grids, ids=np.array(["x", "y"]))
    grids[1, 0, 0, 0] = np.inf
    refused("shape '000001' holds NaN or infinity", voxels=grids)
    grids[1, 0, 0, 0] = 2
    refused(r"shape '000001' holds values other than 0 and 1 \(up to 2\)", voxels=grids)
    refused(r'"voxels" is \[2, 4, 4, 5\]; cubes', voxels=np.ones((2, 4, 4, 5), bool))
    refused(r'"voxels" is \[\]', voxels=np.ones((), bool))
    refused(r'"packed" is uint8 \[1, 9, 9, 1\]', packed=np.ones((1, 9, 9, 1), np.uint8), resolution=np.array(9))
    refused('"packed" is', packed=np.ones((1, 8, 8, 1), np.uint8))
    refused("found images", images=np.ones(3))
    refused("duplicate id 'x' in", voxels=np.ones((2, 4, 4, 4), bool), ids=np.array(["x", "x"]))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_voxels("nowhere")
    with pytest.raises(UserError, match="resolution 0"):
        load_voxels(str(path), 0)


def test_bad_files_name_themselves(tmp_path: Path) -> None:
    trimesh = pytest.importorskip("trimesh")
    with pytest.raises(UserError, match="no voxels or meshes here"):
        load_voxels(str(tmp_path))

    def refused(match: str, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=match):
            load_voxels(str(tmp_path))
        (tmp_path / name).unlink()

    write_binvox(tmp_path / "a.binvox", np.ones((4, 4, 4), bool))
    header = b"#binvox 1\ndim 2 2 2\ndata\n"
    refused(r"b\.binvox: its runs give 7 cells where dim says 2³", "b.binvox", header + bytes([1, 7]))
    refused(r"b\.binvox: 2³ cells where a\.binvox has 4³", "b.binvox", header + bytes([1, 8]))
    refused(r"b\.binvox: the grid is 2×2×3", "b.binvox", header.replace(b"2 2 2", b"2 2 3"))
    refused(r"b\.binvox: not a binvox file", "b.binvox", b"#binvox 1\n")
    refused("both", "b.ply", b"")
    (tmp_path / "a.binvox").unlink()
    refused(r"b\.ply: unreadable mesh", "b.ply", b"nonsense")
    refused(r"b\.obj: has no faces", "b.obj", b"v 0 0 0\nv 1 0 0\n")
    refused(r"b\.obj: all its corners are one point", "b.obj", b"v 0 0 0\nv 0 0 0\nv 0 0 0\nf 1 2 3\n")
    refused(r"b\.obj: a corner is NaN", "b.obj", b"v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    trimesh.PointCloud(np.eye(3)).export(tmp_path / "c.ply")
    with pytest.raises(UserError, match=r"c\.ply: has no faces"):
        load_voxels(str(tmp_path))


def test_fingerprint_tells_shapes_apart() -> None:
    grids = blobs(2, 8)
    first = VoxelData("x", np.packbits(grids, axis=-1), 8, ["a", "b"], ["a", "b"])
    second = VoxelData("x", np.packbits(grids[::-1], axis=-1), 8, ["a", "b"], ["a", "b"])
    assert first.fingerprint() != second.fingerprint()
    assert first.rows(np.array([1, 0])).fingerprint() != first.fingerprint()
    assert first.rows(np.array([0, 1])).fingerprint() == first.fingerprint()
