"""The vendored furniture: whole, grouped, and the same objects in both files, seen by the cameras as they say."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

import mnif

FOLDER = Path(mnif.__file__).parent / "data" / "files"
# Objects without symmetry: their mirror images fall beside their silhouettes.
LOPSIDED = ["l-shaped-sofa", "pianoaqueue", "televisioncabinet", "sofa", "childhut", "spiralstaircase"]


@pytest.fixture(scope="module")
def shapes() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "furniture.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def views() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "furniture_views.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def pictures(views: dict[str, np.ndarray]) -> np.ndarray:
    """[N, 24, 64, 64, 3] uint8."""
    files = np.split(views["image_bytes"], views["image_offsets"][1:-1])
    decoded = []
    for file in files:
        with Image.open(io.BytesIO(file.tobytes())) as image:
            assert (image.format, image.mode, image.size) == ("WEBP", "RGB", (64, 64))
            decoded.append(np.asarray(image))
    return np.stack(decoded).reshape(len(views["ids"]), len(views["poses"]), 64, 64, 3)


def occupancy(shapes: dict[str, np.ndarray]) -> np.ndarray:
    return np.unpackbits(shapes["packed"], axis=-1).astype(bool)


def test_files_are_small() -> None:
    assert (FOLDER / "furniture.npz").stat().st_size < 300_000
    assert (FOLDER / "furniture_views.npz").stat().st_size < 4_000_000


def test_shapes_are_whole(shapes: dict[str, np.ndarray]) -> None:
    assert shapes["packed"].shape == (820, 32, 32, 4)
    assert shapes["packed"].dtype == np.uint8
    assert int(shapes["resolution"]) == 32
    assert len(set(shapes["ids"])) == 820
    assert all(id.isascii() and id.replace("-", "").isalnum() for id in shapes["ids"])
    assert all(len(shapes[key]) == 820 for key in ("names", "categories", "groups"))
    assert all(shapes["names"])
    assert all(shapes["categories"])


def test_shapes_are_centred_and_as_large_as_they_should_be(shapes: dict[str, np.ndarray]) -> None:
    for grid in occupancy(shapes):
        assert grid.sum() >= 32
        occupied = np.argwhere(grid)
        low, high = occupied.min(axis=0), occupied.max(axis=0)
        np.testing.assert_allclose((low + high) / 2, 15.5, atol=0.51)
        assert 28 <= (high - low + 1).max() <= 30  # 0.9 of 32 voxels, touched in part at either end


def test_no_shape_stands_in_two_groups(shapes: dict[str, np.ndarray]) -> None:
    flat = occupancy(shapes).reshape(820, -1).astype(np.float32)
    shared = flat @ flat.T
    size = flat.sum(axis=1)
    alike = shared > 0.95 * (size[:, None] + size[None] - shared)
    assert alike.diagonal().all()
    groups = shapes["groups"]
    first, second = np.nonzero(alike)
    assert (groups[first] == groups[second]).all()
    assert len(set(groups)) > 600
    assert max(np.unique(groups, return_counts=True)[1]) < 0.02 * 820
    assert set(groups) <= set(shapes["ids"])


def test_views_are_whole(views: dict[str, np.ndarray], pictures: np.ndarray) -> None:
    assert pictures.shape == (173, 24, 64, 64, 3)
    assert len(views["image_offsets"]) == 173 * 24 + 1
    assert views["image_offsets"][-1] == len(views["image_bytes"])
    corners = pictures[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert (corners == 255).all(axis=-1).mean() > 0.99
    drawn = (pictures < 250).any(axis=-1).mean(axis=(2, 3))
    assert drawn.min() > 0.001  # a ruler seen from its end
    assert np.median(drawn) > 0.05


def test_views_are_of_objects_that_are_cc0_and_known(
    shapes: dict[str, np.ndarray], views: dict[str, np.ndarray]
) -> None:
    rows = {str(id): row for row, id in enumerate(shapes["ids"])}
    assert len(set(views["ids"])) == 173
    for id, name, group in zip(views["ids"], views["names"], views["groups"], strict=True):
        assert name == shapes["names"][rows[id]]
        assert group == shapes["groups"][rows[id]]
    table = (FOLDER / "ATTRIBUTION.md").read_text(encoding="utf-8").partition("| id |")[2]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    licence = {cell[0]: cell[3] for cell in cells}
    assert all(cell[2] for cell in cells)  # whom to credit
    assert set(shapes["ids"]) == set(licence)
    assert {licence[id] for id in views["ids"]} == {"CC0 1.0"}
    assert "CC0 1.0" not in {licence[id] for id in set(shapes["ids"]) - set(views["ids"])}


def test_cameras_are_rigid_and_look_at_the_origin(views: dict[str, np.ndarray]) -> None:
    poses = views["poses"].astype(np.float64)
    assert poses.shape == (24, 4, 4)
    rotation, place = poses[:, :3, :3], poses[:, :3, 3]
    np.testing.assert_allclose(rotation @ rotation.transpose(0, 2, 1), np.eye(3)[None].repeat(24, axis=0), atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-6)
    np.testing.assert_allclose(poses[:, 3], [[0, 0, 0, 1]] * 24)
    np.testing.assert_allclose(np.linalg.norm(place, axis=1), 2.5, atol=1e-6)
    np.testing.assert_allclose(-rotation[:, :, 2], -place / 2.5, atol=1e-6)
    assert (rotation[:, 1, 1] > 0).all()  # upright
    np.testing.assert_allclose(rotation[:, 1, 0], 0, atol=1e-6)  # level
    elevation = np.degrees(np.arcsin(place[:, 1] / 2.5))
    assert -10 < elevation.min() < 0 < 50 < elevation.max() < 60
    assert float(views["near"]) == pytest.approx(2.5 - 3**0.5)
    assert float(views["far"]) == pytest.approx(2.5 + 3**0.5)


def silhouette_share(grid: np.ndarray, drawn: np.ndarray, views: dict[str, np.ndarray]) -> tuple[float, float]:
    """Share of voxels on the silhouettes grown by a pixel, and of silhouettes on the grown voxels, mean over views.

    Args:
        grid: [32, 32, 32] bool, which voxels of [-1, 1]³ are occupied.
        drawn: [24, 64, 64] bool, which pixels are not white.
        views: poses and intrinsics.
    """
    fx, fy, cx, cy = views["intrinsics"]
    centres = (np.argwhere(grid) + 0.5) / 16 - 1
    on_silhouette, covered = [], []
    for pose, silhouette in zip(views["poses"], drawn, strict=True):
        local = np.linalg.solve(pose, np.c_[centres, np.ones(len(centres))].T)[:3].T
        depth = -local[:, 2]
        assert (depth > views["near"]).all()
        assert (depth < views["far"]).all()
        column = np.floor(cx + fx * local[:, 0] / depth).astype(int)
        row = np.floor(cy - fy * local[:, 1] / depth).astype(int)
        on_silhouette.append(binary_dilation(silhouette, np.ones((3, 3)))[row, column].mean())
        footprint = np.zeros_like(silhouette)
        footprint[row, column] = True
        covered.append(binary_dilation(footprint, np.ones((5, 5)))[silhouette].mean())
    return float(np.mean(on_silhouette)), float(np.mean(covered))


def test_voxels_fall_on_the_silhouettes(
    shapes: dict[str, np.ndarray], views: dict[str, np.ndarray], pictures: np.ndarray
) -> None:
    drawn = (pictures < 250).any(axis=-1)
    grids = dict(zip(shapes["ids"], occupancy(shapes), strict=True))
    for row in range(0, len(views["ids"]), 8):
        on_silhouette, covered = silhouette_share(grids[views["ids"][row]], drawn[row], views)
        assert on_silhouette > 0.97
        assert covered > 0.99


@pytest.mark.parametrize("name", LOPSIDED)
def test_a_mirrored_or_turned_object_falls_beside_the_silhouettes(
    name: str, shapes: dict[str, np.ndarray], views: dict[str, np.ndarray], pictures: np.ndarray
) -> None:
    row = list(views["ids"]).index(f"blendswap-cc-0-{name}")
    drawn = (pictures[row] < 250).any(axis=-1)
    grid = occupancy(shapes)[list(shapes["ids"]).index(views["ids"][row])]
    true, _ = silhouette_share(grid, drawn, views)
    wrong = [grid[::-1], grid[:, ::-1], grid[:, :, ::-1], grid.transpose(2, 1, 0), grid.transpose(0, 2, 1)]
    shares = [silhouette_share(other, drawn, views)[0] for other in wrong]
    assert true > 0.999
    assert max(shares) < 0.98
    assert np.mean(shares) < 0.9
