"""Shapes as users have them: several files of one object, wrong indices, volumes, and the volume of a mesh."""

import json
from pathlib import Path

import numpy as np
import pytest

from evals.voxel_sets import shape_files
from mnif.data.dataset import Split
from mnif.data.voxel_formats import cell_coverage, is_closed, read_binvox, voxelise_mesh, write_binvox
from mnif.data.voxels import load_voxels
from mnif.signals.registry import detect_signal
from mnif.utils.errors import UserError
from mnif.utils.meshes import read_mesh

trimesh = pytest.importorskip("trimesh")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))


GRID = np.zeros((8, 8, 8), dtype=bool)
GRID[1:5, 2:4, 3:7] = True


def write_shapenet(folder: Path, objects: int) -> None:
    for number in range(objects):
        models = folder / "02691156" / f"{number:032x}" / "models"
        models.mkdir(parents=True)
        for part in ("solid", "surface"):
            write_binvox(models / f"model_normalized.{part}.binvox", GRID)
        trimesh.creation.box().export(models / "model_normalized.obj")


def test_several_files_of_one_object_need_a_choice_and_are_one_design(tmp_path: Path) -> None:
    folder = tmp_path / "shapenet"
    write_shapenet(folder, 60)
    with pytest.raises(
        UserError, match=r"60 objects have several files .*solid\.binvox.*; say which, such as '.*/\*\*/"
    ):
        load_voxels(str(folder))
    splits = {}
    for pattern in ("*.solid.binvox", "*.surface.binvox", "*.obj"):
        assert detect_signal(f"{folder}/**/{pattern}") == "voxels"
        data = load_voxels(f"{folder}/**/{pattern}", 8)
        assert len(data) == 60
        splits[pattern] = data.split(0.2, 0.2).tolist()
    assert splits["*.solid.binvox"] == splits["*.surface.binvox"] == splits["*.obj"]
    both = load_voxels(f"{folder}/**/*.binvox")
    sides = both.split(0.2, 0.2).reshape(60, 2)
    assert (sides[:, 0] == sides[:, 1]).all()
    assert set(sides.ravel()) == {*Split}


def test_files_beside_each_other_are_designs_unless_words_tell_them_apart(tmp_path: Path) -> None:
    for name in ("a.001.binvox", "a.002.binvox", "b.binvox"):
        write_binvox(tmp_path / "flat" / name, GRID)
    data = load_voxels(str(tmp_path / "flat"))
    assert data.groups == data.ids
    for kind in ("chair", "table"):
        for number in range(3):
            write_binvox(tmp_path / "classes" / kind / f"{number}.binvox", GRID)
    data = load_voxels(str(tmp_path / "classes"))
    assert data.groups == data.ids
    for part in ("solid", "surface"):
        write_binvox(tmp_path / "two" / f"a.{part}.binvox", GRID)
    with pytest.raises(UserError, match=r"\(a: \.solid\.binvox, \.surface\.binvox\); say which, such as"):
        load_voxels(str(tmp_path / "two"))
    assert load_voxels(f"{tmp_path}/two/*.binvox").groups == ["a", "a"]


def test_meshes_beside_binvox_of_other_objects_are_a_choice(tmp_path: Path) -> None:
    write_binvox(tmp_path / "a.binvox", GRID)
    trimesh.creation.box().export(tmp_path / "b.obj")
    with pytest.raises(UserError, match=r"both \.binvox files and meshes; say which, such as '.*/\*\*/\*\.binvox'"):
        load_voxels(str(tmp_path))
    assert load_voxels(f"{tmp_path}/*.obj", 8).ids == ["b.obj"]


def test_binvox_with_other_line_ends(tmp_path: Path) -> None:
    write_binvox(tmp_path / "a.binvox", GRID)
    content, path = (tmp_path / "a.binvox").read_bytes(), tmp_path / "b.binvox"
    header, body = content.split(b"data\n")
    windows = (header + b"data\n").replace(b"\n", b"\r\n")
    for good in (
        content + b"\n",
        content + b"\r\n",
        windows + body,
        windows + body + b"\r\n",
        header + b"data \n" + body,
    ):
        path.write_bytes(good)
        np.testing.assert_array_equal(read_binvox(path), GRID)
    for bad in (content[:-2], content[:-1], content + b"\1\4", content + b"\1", content + b"\n\1"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"b\.binvox: its runs give \d+ cells where dim says 8³"):
            read_binvox(path)
    for bad in (b"", b"\n" + content, content.replace(b"8 8 8", b"9" * 20 + b" 8 8"), b"#binvox 1\ndim 8 8 8\ndata"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="not a binvox file"):
            read_binvox(path)


CORNERS = "0 0 0\n1 0 0\n0 1 0\n0 0 1\n"
OBJ = "".join(f"v {line}\n" for line in CORNERS.splitlines())
PLY = (
    "ply\nformat ascii 1.0\nelement vertex 4\nproperty float x\nproperty float y\nproperty float z\n"
    f"element face 1\nproperty list uchar int vertex_indices\nend_header\n{CORNERS}"
)
OFF = f"OFF\n4 1 0\n{CORNERS}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zero.obj", f"{OBJ}f 0 1 2\n"),
        ("zero2.obj", f"{OBJ}vt 0 0\nf 1/1 2/1 0/1\n"),
        ("beyond.obj", f"{OBJ}f 1 2 5\n"),
        ("back.obj", f"{OBJ}f -1 -2 -5\n"),
        ("minus.ply", f"{PLY}3 0 1 -1\n"),
        ("beyond.ply", f"{PLY}3 0 1 4\n"),
        ("minus.off", f"{OFF}3 0 1 -1\n"),
        ("beyond.off", f"{OFF}3 0 1 4\n"),
    ],
)
def test_a_corner_that_is_not_there_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name.replace(".", r"\.")) as error:
        read_mesh(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["nan", "inf", "1e308"])
def test_a_corner_out_of_reach_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "a.obj").write_text(f"v {place} 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    with pytest.raises(UserError, match=r"a\.obj: a corner is NaN, infinite or beyond 1e\+100"):
        voxelise_mesh(tmp_path / "a.obj", 8)


def test_an_obj_that_counts_backwards_means_the_corners_so_far(tmp_path: Path) -> None:
    more = "v 5 5 5\nv 6 5 5\nv 5 6 5\n"
    (tmp_path / "a.obj").write_text(f"v 0 0 0\nv 1 0 0\nv 0 1 0\nf -3//1 -2 -1 # 0\n{more}f -3 5 -1\n")
    vertices, faces = read_mesh(tmp_path / "a.obj")
    assert vertices[faces].tolist() == [[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[5, 5, 5], [6, 5, 5], [5, 6, 5]]]


def gltf(folder: Path) -> Path:
    """A box and a ball beside it, in a .gltf with buffers of its own."""
    scene = trimesh.Scene([trimesh.creation.box(), trimesh.creation.icosphere().apply_translation((3, 0, 0))])
    for name, content in scene.export(file_type="gltf").items():
        (folder / name).write_bytes(content)
    (folder / "scene.glb").write_bytes(scene.export(file_type="glb"))
    return folder / "model.gltf"


def test_gltf_is_read_like_glb_and_its_indices_are_checked_part_by_part(tmp_path: Path) -> None:
    path = gltf(tmp_path)
    assert detect_signal(str(tmp_path)) == "voxels"
    np.testing.assert_array_equal(voxelise_mesh(path, 16), voxelise_mesh(tmp_path / "scene.glb", 16))
    tree = json.loads(path.read_text())
    accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["indices"]]
    buffer = tree["buffers"][tree["bufferViews"][accessor["bufferView"]]["buffer"]]["uri"]
    indices = bytearray((tmp_path / buffer).read_bytes())
    indices[:4] = (40).to_bytes(4, "little")  # a corner of the ball, were the two put together first
    (tmp_path / buffer).write_bytes(indices)
    with pytest.raises(UserError, match=r"model\.gltf: a face names corner 40 where there are 0 to 7"):
        read_mesh(path)
    (tmp_path / buffer).unlink()
    with pytest.raises(UserError, match=r"model\.gltf: unreadable mesh"):
        read_mesh(path)


def angle(thickness: float, depth: float) -> "trimesh.Trimesh":
    """A thin L."""
    corners = np.array([[0, 0], [1, 0], [1, thickness], [thickness, thickness], [thickness, 1], [0, 1]])
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5]])
    return trimesh.creation.extrude_triangulation(corners, faces, depth)


SHAPES = {
    "ball": lambda: trimesh.creation.icosphere(4),
    "cube": trimesh.creation.box,
    "L": lambda: angle(0.1, 0.1),
    "turned L": lambda: angle(0.1, 0.1).apply_transform(trimesh.transformations.rotation_matrix(0.7, [1, 2, 3])),
    "ring": lambda: trimesh.creation.torus(1, 0.2),
    "pipe": lambda: trimesh.creation.annulus(0.7, 1, 0.3),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("resolution", [16, 32, 64])
@pytest.mark.parametrize("suffix", ["ply", "stl"])  # of which the latter has no corner in common
def test_a_closed_mesh_keeps_its_volume(tmp_path: Path, name: str, resolution: int, suffix: str) -> None:
    mesh = SHAPES[name]()
    mesh.export(tmp_path / f"a.{suffix}")
    grid = voxelise_mesh(tmp_path / f"a.{suffix}", resolution)
    volume = abs(mesh.volume) * (0.9 * resolution / mesh.extents.max()) ** 3
    assert grid.sum() == pytest.approx(volume, rel=0.0101, abs=0.5)  # a cell is one or none


def test_mirrored_shapes_stay_mirrored(tmp_path: Path) -> None:
    trimesh.creation.icosphere(4).export(tmp_path / "a.ply")
    grid = voxelise_mesh(tmp_path / "a.ply", 32)
    for axis in range(3):
        assert (grid == np.flip(grid, axis)).mean() > 0.999
    centres = np.linalg.norm(np.mgrid[0:32, 0:32, 0:32] + 0.5 - 16, axis=0)
    assert grid[centres < 13.8].all()
    assert not grid[centres > 15].any()


def test_coverage_of_a_box_is_what_it_measures() -> None:
    box = trimesh.creation.box(extents=(4, 2, 1.5)).apply_translation((4, 4, 4.25)).triangles
    coverage, volume = cell_coverage(box, 8)
    expected = np.zeros((8, 8, 8))
    expected[2:6, 3:5, 3] = 0.5
    expected[2:6, 3:5, 4] = 1
    np.testing.assert_allclose(coverage, expected, atol=1e-6)
    assert volume == pytest.approx(12)
    twice, volume = cell_coverage(np.concatenate([box, box + np.array([0, 0, 0.5])]), 8)
    assert volume == pytest.approx(twice.sum())  # not the sum of both
    assert volume == pytest.approx(16, rel=1e-4)


def test_a_hollow_ball_is_hollow_and_an_open_one_a_filled_surface(tmp_path: Path) -> None:
    inner, outer = trimesh.creation.icosphere(3, radius=0.6), trimesh.creation.icosphere(3)
    inner.invert()
    hollow = trimesh.util.concatenate([outer, inner])
    hollow.export(tmp_path / "hollow.ply")
    grid = voxelise_mesh(tmp_path / "hollow.ply", 32)
    assert not grid[16, 16, 16]
    assert grid[16, 16, 4]
    opened = trimesh.Trimesh(outer.vertices, outer.faces[1:])
    assert is_closed(outer.triangles)
    assert not is_closed(opened.triangles)
    opened.export(tmp_path / "opened.ply")
    assert voxelise_mesh(tmp_path / "opened.ply", 8).sum() > outer.volume * 3.6**3


def test_volumes_that_a_bundle_draws_are_read(tmp_path: Path) -> None:
    values = np.where(GRID, 0.9, -1.05).astype(np.float32)[..., None]
    folder = tmp_path / "drawn"
    folder.mkdir()
    for number, each in enumerate((values, values[::-1])):
        np.save(folder / f"{number:06d}.npy", each)
    assert detect_signal(str(folder)) == "voxels"
    data = load_voxels(str(folder))
    assert data.ids == ["000000.npy", "000001.npy"]
    np.testing.assert_array_equal(data.occupancy(), [GRID, GRID[::-1]])
    occupied = tmp_path / "occupied.npy"
    np.save(occupied, np.stack([GRID, GRID[::-1]]))
    drawn, real = shape_files(str(folder)).surfaces(2).points, shape_files(str(occupied)).surfaces(2).points
    assert np.abs(np.sort(drawn[0], axis=0) - np.sort(real[0], axis=0)).max() < 0.2  # the surface lies at 0
    values[0, 0, 0] = np.nan
    np.save(folder / "000000.npy", values)
    with pytest.raises(UserError, match="holds NaN"):
        load_voxels(str(folder))
    with pytest.raises(UserError, match=r"000000\.npy: holds something other than finite numbers"):
        shape_files(str(folder)).surfaces(2)


def test_one_grid_alone_is_a_shape(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    for array in (GRID, GRID.astype(np.float32), GRID[None], GRID[None, ..., None].astype(np.float32)):
        np.save(path, array)
        assert detect_signal(str(path)) == "voxels"
        np.testing.assert_array_equal(load_voxels(str(path)).occupancy(), GRID[None])
    np.save(path, GRID.astype(np.uint8))
    with pytest.raises(UserError, match="say which with --signal image or voxels"):
        detect_signal(str(path))
    np.testing.assert_array_equal(load_voxels(str(path)).occupancy(), GRID[None])
    np.savez(tmp_path / "b.npz", voxels=GRID, ids=["x"])
    assert load_voxels(str(tmp_path / "b.npz")).ids == ["x"]


def test_a_folder_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", voxels=GRID)
    np.savez(tmp_path / "b.npz", occupancy=np.stack([GRID, GRID]), ids=["p", "q"], groups=["g", "g"])
    data = load_voxels(str(tmp_path))
    assert data.ids == ["a.npz", "b.npz/p", "b.npz/q"]
    assert data.groups == ["a.npz", "b.npz/g", "b.npz/g"]
    np.save(tmp_path / "c.npy", np.ones((4, 4, 4), dtype=bool))
    with pytest.raises(UserError, match=r"c\.npy: 4³ cells where a\.npz has 8³"):
        load_voxels(str(tmp_path))
