"""`mnif decode`: pictures, meshes and views of latents, against the values of the decoder itself."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

import mnif.signals.outputs
from mnif.cli import main
from mnif.commands.decode import safe_names
from mnif.latents.table import LatentTable
from mnif.models.io import load_component, save_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.outputs import decode_grid
from mnif.signals.radiance import RadianceField
from mnif.signals.voxels import Voxels
from mnif.utils import errors

RADII = (0.5, 0.8)


def saved(folder: Path, decoder: MNIFModel, latents: Tensor, ids: list[str]) -> Path:
    """A run folder with a model and latents."""
    save_component(folder / "model", "decoder", decoder)
    held_out = torch.zeros(len(ids), dtype=torch.bool)
    LatentTable(latents, ids, held_out, decoder.fingerprint(), "made here").save(folder / "latents.safetensors")
    return folder


def decode(run: Path, output: Path, *flags: str) -> list[str]:
    """A command on a saved run."""
    latents = ["--latents", f"{run}/latents.safetensors"]
    return ["decode", "--model", f"{run}/model", *latents, "--output_dir", str(output), *flags]


def decoder_of(run: Path) -> tuple[MNIFModel, Tensor]:
    table = LatentTable.load(run / "latents.safetensors")
    return load_component(MNIFModel, run / "model", "decoder"), table.latents


def files_in(folder: Path) -> set[str]:
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if ".seals" not in path.parts}


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    assert main(command) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def frames_of(path: Path) -> int:
    """Pictures in a GIF; equal neighbours count as one."""
    with Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def picture_run(folder: Path, channels: int = 3, count: int = 5) -> Path:
    torch.manual_seed(channels)
    settings = {"resolution": [8, 12], "channels": channels}
    decoder = MNIFModel(
        channels, resolution=[8, 12], num_bases=6, width=8, depth=1, latent_dim=12, cells=2, signal_settings=settings
    )
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    return saved(folder, decoder, torch.randn(count, 12), [f"set/{n}" for n in range(count)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_run(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two balls, nothing and everything, learned as signed distances."""
    torch.manual_seed(0)
    settings = Voxels(16).settings()
    size = {"channels": 1, "dimensions": 3, "resolution": 16, "num_bases": 8, "width": 16, "depth": 1}
    decoder = MNIFModel(**size, latent_dim=4, cells=2, omega=4.0, signal="voxels", signal_settings=settings)
    latents = torch.eye(4).requires_grad_()
    centres = (torch.arange(16) + 0.5) / 8 - 1
    distance = torch.stack(torch.meshgrid(centres, centres, centres, indexing="ij")).norm(dim=0)
    balls = [(radius - distance).clamp(-1, 1) for radius in RADII]
    targets = torch.stack([*balls, torch.full_like(distance, -1), torch.ones_like(distance)])[..., None]
    optimizer = torch.optim.Adam([*decoder.parameters(), latents], lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        (decoder(latents) - targets).square().mean().backward()
        optimizer.step()
    ids = ["balls/small", "balls/large", "nothing", "everything"]
    return saved(tmp_path_factory.mktemp("shapes"), decoder, latents.detach(), ids)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    settings = RadianceField([8, 10], samples=8).settings()
    size = {"channels": 4, "dimensions": 3, "resolution": 8, "num_bases": 4, "width": 8, "depth": 1}
    decoder = MNIFModel(**size, latent_dim=5, cells=1, signal="radiance", signal_settings=settings)
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    return saved(tmp_path_factory.mktemp("objects"), decoder, torch.randn(2, 5), ["chairs/a", "chairs/b"])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_pictures_are_the_decoders_values(channels: int, mode: str, tmp_path: Path) -> None:
    run, output = picture_run(tmp_path / "run", channels, count=2), tmp_path / "out"
    for resolution, flags in (
        ((8, 12), []),
        ((20, 30), ["--resolution", "20", "30"]),
        ((7, 7), ["--resolution", "7"]),
    ):
        assert main(decode(run, output, *flags)) == 0
        assert files_in(output) == {"set_0.png", "set_1.png", "grid.png", "metrics.json", "decode.json"}
        decoder, latents = decoder_of(run)
        with torch.no_grad():
            values = decoder(latents, resolution).clamp(-1, 1).numpy()
        for row in range(2):
            with Image.open(output / f"set_{row}.png") as image:
                assert image.mode == mode
                read = np.asarray(image).reshape(*resolution, channels)
            assert np.abs(read - (values[row] + 1) * 127.5).max() < 0.501
        shutil.rmtree(output)


def test_latents_are_chosen_by_id_or_number(pictures: Path, tmp_path: Path) -> None:
    assert main(decode(pictures, tmp_path / "a", "--ids", "set/3", "set/1", "set/3")) == 0
    assert {"set_1.png", "set_3.png"} == {name for name in files_in(tmp_path / "a") if name.startswith("set")}
    assert main(decode(pictures, tmp_path / "b", "--num", "2")) == 0
    assert {"set_0.png", "set_1.png"} == {name for name in files_in(tmp_path / "b") if name.startswith("set")}
    assert pixels_of(tmp_path / "b/grid.png").shape == (8 * 8 + 4, 2 * 12 * 8 + 6, 3)  # each pixel is drawn 8 wide
    metrics = json.loads((tmp_path / "b/metrics.json").read_text())
    assert metrics.keys() == {"images_per_second", "seconds", "without_surface", "command", "peak_rss_mb"}


def test_same_command_makes_what_is_missing_and_nothing_else(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = decode(pictures, tmp_path / "out", "--num", "3")
    assert main(command) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("set_*.png")}
    second = (tmp_path / "out/set_1.png").read_bytes()
    (tmp_path / "out/set_1.png").unlink()
    assert main([*command[:-1], "4"]) == 0
    assert "2 latents decoded" in capsys.readouterr().out
    assert (tmp_path / "out/set_1.png").read_bytes() == second
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("set_*.png")}
    assert {name for name in before if after[name] == before[name]} == {"set_0.png", "set_2.png"}
    assert len(after) == 4
    assert main(command) == 0
    assert "all 3 are there already" in capsys.readouterr().out
    (tmp_path / "out/set_1.png").write_bytes(second[:-1] + b"x")  # one byte
    assert main(command) == 0
    assert "set_1.png: not known to be as it was written; made anew" in capsys.readouterr().out
    assert (tmp_path / "out/set_1.png").read_bytes() == second


def test_folder_is_not_mixed(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(decode(pictures, output, "--resolution", "16")) == 0
    message = error_of(decode(pictures, output, "--resolution", "32"), capsys)
    assert message.endswith("with resolution [16], not [32]; choose another --output_dir or empty it")
    assert "with resolution [16], not None" in error_of(decode(pictures, output, "--ids", "set/4"), capsys)
    others = picture_run(tmp_path / "run", channels=1)
    assert "decoded with decoder" in error_of(decode(others, output, "--resolution", "16"), capsys)
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "mine/set_2.png")
    mine = (tmp_path / "mine/set_2.png").read_bytes()
    assert "mine/set_2.png is not of `mnif decode`" in error_of(decode(pictures, tmp_path / "mine"), capsys)
    assert files_in(tmp_path / "mine") == {"set_2.png"}
    assert (tmp_path / "mine/set_2.png").read_bytes() == mine


@pytest.mark.parametrize("mesh", ["glb", "obj", "ply", "stl"])
def test_mesh_is_closed_and_lies_where_the_values_change_sign(shapes: Path, tmp_path: Path, mesh: str) -> None:
    assert main(decode(shapes, tmp_path, "--num", "2", "--resolution", "24", "--mesh", mesh)) == 0
    decoder, latents = decoder_of(shapes)
    for name, latent, radius in zip(("balls_small", "balls_large"), latents, RADII, strict=False):
        read = trimesh.load(tmp_path / f"{name}.{mesh}", force="mesh")
        assert read.is_watertight
        assert read.volume == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.15)
        with torch.no_grad():
            coefficients = decoder.coefficients(latent[None])
            outward = torch.tensor(np.array(read.vertices) / np.linalg.norm(read.vertices, axis=1, keepdims=True))
            near = [torch.tensor(np.array(read.vertices)) + step * outward for step in (-0.15, 0.0, 0.15)]
            inside, surface, outside = (decoder.values_at(coefficients, points[None].float()) for points in near)
        assert inside.min() > 0
        assert outside.max() < 0
        assert surface.abs().max() < 0.05
        picture = pixels_of(tmp_path / f"{name}.png")
        assert picture.shape == (256, 256, 3)
        drawn = (picture < 255).any(axis=-1).mean()
        assert drawn == pytest.approx(np.pi * radius**2 / (2 * 1.4) ** 2, rel=0.25)


def test_shapes_without_a_surface_are_skipped(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(decode(shapes, tmp_path)) == 0
        output = capsys.readouterr().out
        assert "nothing: the shape is empty, it has no surface; skipped\n" in output
        assert "everything: the shape is full, it has no surface; skipped\n" in output
    assert "all 2 are there already" in output
    made = {f"balls_{size}.{suffix}" for size in ("small", "large") for suffix in ("png", "glb")}
    assert files_in(tmp_path) == made | {"grid.png", "metrics.json", "decode.json"}
    assert json.loads((tmp_path / "metrics.json").read_text())["without_surface"] == {
        "nothing": "empty",
        "everything": "full",
    }
    message = error_of(decode(shapes, tmp_path / "none", "--ids", "nothing", "everything"), capsys)
    assert "every shape asked for is empty or full" in message
    assert main(decode(shapes, tmp_path / "none", "--mesh", "ply")) == 0  # nothing is there that it could mix with


def test_turntable_of_a_shape(shapes: Path, tmp_path: Path) -> None:
    flags = ["--ids", "balls/small", "--turntable", "gif", "--frames", "5", "--elevation", "-10"]
    assert main(decode(shapes, tmp_path, *flags)) == 0
    assert frames_of(tmp_path / "balls_small.gif") == 5
    with Image.open(tmp_path / "balls_small.gif") as image:
        assert image.size == (256, 256)


def test_large_grid_is_decoded_in_slices(shapes: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for run, resolution in ((shapes, 11), (pictures, (13, 9)), (pictures, None)):
        decoder, latents = decoder_of(run)
        scalar_or_list = decode_grid(decoder, latents[:1], resolution)
        monkeypatch.setattr(mnif.signals.outputs, "_POINTS_AT_ONCE", 50)
        torch.testing.assert_close(decode_grid(decoder, latents[:1], resolution), scalar_or_list, atol=1e-5, rtol=0)
        monkeypatch.undo()


def test_views_are_those_of_the_turntable(objects: Path, tmp_path: Path) -> None:
    flags = ["--views", "3", "--elevation", "35", "--resolution", "16", "--turntable", "gif", "--frames", "4"]
    assert main(decode(objects, tmp_path, *flags)) == 0
    names = {f"chairs_{id}/{file}" for id in "ab" for file in ("000.png", "001.png", "002.png", "turntable.gif")}
    assert files_in(tmp_path) == names | {"grid.png", "metrics.json", "decode.json"}
    decoder, latents = decoder_of(objects)
    signal = RadianceField(**decoder.config.signal_settings)
    with torch.no_grad():
        expected = signal.turntable(decoder, latents, 3, 35.0, 16)
    assert expected.shape == (2, 3, 16, 20, 3)
    assert expected.std() > 1
    for row, view in itertools.product(range(2), range(3)):
        read = pixels_of(tmp_path / f"chairs_{'ab'[row]}/{view:03d}.png").astype(int)
        assert np.abs(read - expected[row, view]).max() <= 1
    assert frames_of(tmp_path / "chairs_a/turntable.gif") == 4
    view = tmp_path / "chairs_b/001.png"
    kept, removed = (tmp_path / "chairs_b/000.png").stat().st_mtime_ns, view.read_bytes()
    view.unlink()
    assert main(decode(objects, tmp_path, *flags)) == 0
    assert view.read_bytes() == removed
    assert (tmp_path / "chairs_b/000.png").stat().st_mtime_ns == kept


def test_objects_have_eight_views_of_the_training_size(objects: Path, tmp_path: Path) -> None:
    assert main(decode(objects, tmp_path, "--num", "1")) == 0
    assert len(list((tmp_path / "chairs_a").iterdir())) == 8
    assert pixels_of(tmp_path / "chairs_a/000.png").shape == (8, 10, 3)


def test_a_missing_package_is_named_before_any_work(
    shapes: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errors, "find_spec", lambda module: None)
    message = error_of(decode(shapes, tmp_path / "out", "--turntable", "mp4"), capsys)
    assert '"imageio-ffmpeg" is missing; run: pip install "mnif-diffusion[video]"' in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "flags", "message"),
    [
        ("pictures", "--mesh glb", "--mesh: not for the signal of this model, image, which takes --resolution"),
        ("pictures", "--turntable gif", "--turntable: not for"),
        ("pictures", "--frames 5", "--frames: not for"),
        ("pictures", "--elevation 5", "--elevation: not for"),
        ("pictures", "--views 5", "--views: not for"),
        ("shapes", "--views 5", "--views: not for the signal of this model, voxels, which takes --resolution, --mesh"),
        ("objects", "--mesh glb", "--mesh: not for the signal of this model, radiance"),
        ("shapes", "--frames 5", "--frames 5: say --turntable gif or mp4 too"),
        ("shapes", "--turntable gif --frames 0", "--frames 0: must be at least 1"),
        ("shapes", "--elevation 91", "--elevation 91: must lie between -90 and 90"),
        ("shapes", "--elevation nan", "--elevation nan: must lie between -90 and 90"),
        ("shapes", "--resolution 8 9", "--resolution 8 9: voxels are cubes; give one number"),
        ("shapes", "--mesh off", "mesh"),
        ("objects", "--views 0", "--views 0: must be at least 1"),
        ("objects", "--resolution 8 9", "--resolution 8 9: give one number, the height of a view"),
        ("pictures", "--resolution 8 9 3", "--resolution 8 9 3: one number, or height and width"),
        ("pictures", "--resolution 0", "--resolution 0: must be at least 1"),
        ("pictures", "--num 0", "--num 0: must be at least 1"),
        ("pictures", "--num 2 --ids set/1", "give either --ids or --num"),
        ("pictures", "--ids set/1 set/9", "--ids set/9: not in"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    kind: str, flags: str, message: str, request: pytest.FixtureRequest, tmp_path: Path, capsys
) -> None:
    run = request.getfixturevalue(kind)
    assert message in error_of(decode(run, tmp_path / "out", *flags.split()), capsys)
    assert not (tmp_path / "out").exists()


def test_latents_that_do_not_fit_are_refused(
    pictures: Path, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = ["--model", f"{pictures}/model", "--latents", f"{shapes}/latents.safetensors"]
    message = error_of(["decode", *mixed, "--output_dir", f"{tmp_path}/out"], capsys)
    assert "these latents belong to decoder" in message
    mixed[-1] = f"{tmp_path}/nowhere"
    assert "nowhere: no latent table" in error_of(["decode", *mixed, "--output_dir", f"{tmp_path}/out"], capsys)
    decoder, latents = decoder_of(pictures)
    latents[2, 3] = torch.nan
    broken = saved(tmp_path / "run", decoder, latents, list("abcde"))
    assert "the latent of c holds NaN" in error_of(decode(broken, tmp_path / "out"), capsys)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_whole_files_and_the_same_command_continues(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(mesh: trimesh.Trimesh, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    command = decode(shapes, tmp_path, "--num", "2")
    with monkeypatch.context() as patch:
        patch.setattr(trimesh.Trimesh, "export", stopped)
        assert main(command) == 130
    assert files_in(tmp_path) == {"balls_small.png", "decode.json"}
    assert main(command) == 0
    assert {"balls_small.glb", "balls_large.glb"} <= files_in(tmp_path)


def test_names_are_safe_and_differ() -> None:
    ids = ["a/b", "a_b", "A:B", "plain-1.5", "..", "", "grid", ".hidden", "ends.", "ünï", "é" * 200, "é" * 201, "x\ny"]
    names = safe_names(ids)
    assert len({name.casefold() for name in names}) == len(ids)
    assert names[3] == "plain-1.5"
    assert names[7:10] == ["_hidden", "ends_", "ünï"]
    assert names[6] != "grid"
    for name in names:
        assert not set(name) & set('/\\:*?"<>|\n')
        assert name not in (".", "..")
        assert 0 < len(name.encode()) < 200
    assert safe_names(["s/1", "s/2"]) == ["s_1", "s_2"]
