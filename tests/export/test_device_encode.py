"""device/encode.py: a board finds in an observation what `mnif encode` finds, and thinks the same of it."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.commands.export import ExportArguments, export_bundle
from export.device import encode, pictures, surprise
from export.device.bundle import BundleError, manifest_digest
from export.device.latent_file import write_latents
from export.device.observations import Form, read_mask, read_observations
from export.device.pictures import write_png
from export.device.runtime import Encoder, Field, load_bundle
from mnif.cli import main
from mnif.data.batches import array_dataset
from mnif.data.images import load_images
from mnif.latents import calibration
from mnif.latents import surprise as surprise_of_mnif
from mnif.latents.calibration import TrainingInstances, fit_profile
from mnif.latents.inference import infer_latents
from mnif.latents.table import LatentTable
from mnif.models.encoders import PatchEncoder, TokenEncoder, ViewsEncoder
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model
from mnif.utils.pixels import crop_and_resize, open_image
from tests.conftest import small_encoder
from tests.export.test_device import run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A model of 12×16 pictures with tokens and an encoder for them, and its profile on 38 of 48 pictures."""
    folder = tmp_path_factory.mktemp("run") / "model"
    torch.manual_seed(0)
    settings: dict[str, Any] = {"resolution": [12, 16], "latent_dim": 16, "tokens": 2}
    decoder = MNIFModel(num_bases=6, width=8, depth=1, cells=2, **settings).eval()
    encoder = TokenEncoder(3, **settings, patch_width=16, width=32, depth=1).eval()
    save_component(folder, "decoder", decoder)
    save_component(folder, "encoder", encoder)
    data, signal = load_images(str(picture_folder), (12, 16)), signal_of_model(decoder)
    trained = TrainingInstances(array_dataset(data.arrays()), data.ids)
    rows = trained.rows.subset(np.arange(10, 48))
    latents = torch.cat([*infer_latents(decoder, signal, rows, encoder, 0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "_NETWORK_FROM", 48)
        profile = fit_profile(decoder, signal, trained, rows, data.ids[10:], latents, "pictures")
    assert profile.record.network
    profile.save(folder)
    return folder


@pytest.fixture(scope="module")
def bundle(model: Path) -> Path:
    output = model.parent / "bundle"
    flags = ["--encoder", "--num_baked", "0", "--precision", "fp32", "--compile_rtx", "off"]
    assert main(["export", "--model", str(model), "--output_dir", str(output), *flags]) == 0
    return output


@pytest.fixture
def strange(tmp_path: Path, picture_folder: Path) -> Path:
    """The ten other pictures, and three of noise."""
    folder = Path(shutil.copytree(picture_folder, tmp_path / "strange"))
    for path in sorted(folder.iterdir())[10:]:
        path.unlink()
    for number in range(3):
        noise = np.random.default_rng(number).integers(0, 256, (16, 20, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"noise {number}.png")
    return folder


def on_board(bundle: Path, data: Path, output: Path, *flags: str) -> int:
    return encode.main(["--bundle", str(bundle), "--data", str(data), "--output_dir", str(output), *flags])


def test_latents_and_verdicts_are_those_of_mnif_encode(
    model: Path, bundle: Path, strange: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["encode", "--model", str(model), "--data", str(strange), "--preset", "fast", "--gate"]
    assert main([*command, "--output_dir", str(tmp_path / "here")]) == 0
    gate = json.loads((tmp_path / "here/metrics.json").read_text())["gate"]
    theirs = LatentTable.load(tmp_path / "here/latents.safetensors")
    capsys.readouterr()
    for backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend)
        assert on_board(bundle, strange, tmp_path / backend, "--backend", backend, "--batch_size", "5") == 0
        told = capsys.readouterr().out
        ours = LatentTable.load(tmp_path / backend / "latents.safetensors", theirs.fingerprint, 16)
        assert ours.ids == theirs.ids
        torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)
        scores = json.loads((tmp_path / backend / "scores.json").read_text())
        assert (scores["counts"], scores["false_alarm_rate"]) == (gate["counts"], gate["false_alarm_rate"])
        for name, found in gate["instances"].items():
            mine = scores["instances"][name]
            assert {key: mine[key] for key in ("verdict", "reason", "patches")} == {
                key: found[key] for key in ("verdict", "reason", "patches")
            }
            assert mine["p_value"] == pytest.approx(found["p_value"], abs=1e-5)
            assert mine["scores"] == pytest.approx(found["scores"], abs=2e-3)
        assert scores["instances"]["noise 1.png"]["verdict"] != "in"
        assert "noise 1.png" in told
    decoder = MNIFModel.from_pretrained(model, subfolder="decoder")
    coefficients = np.load(tmp_path / "onnxruntime/coefficients.npy")
    expected = decoder.coefficients(theirs.latents).detach().numpy()
    np.testing.assert_allclose(coefficients, expected, atol=1e-5)
    manifest, fields = load_bundle(bundle).manifest, np.load(tmp_path / "onnxruntime/fields.npy")
    for size in ((12, 16), (7, 30)):
        drawn = Field(manifest, fields[2])(list(size))
        np.testing.assert_allclose(drawn, decoder(theirs.latents[2:3], size)[0].detach().numpy(), atol=1e-4)
    with pytest.raises(BundleError, match="not those of a field"):
        Field(manifest, fields[2, :1])


def test_the_boards_scores_are_the_same_code() -> None:
    assert Path(surprise.__file__).read_bytes() == Path(surprise_of_mnif.__file__).read_bytes()


def test_masks_are_those_of_mnif_encode(model: Path, bundle: Path, picture_folder: Path, tmp_path: Path) -> None:
    mask = np.zeros((12, 16, 1), np.uint8)
    mask[:, :9] = 255
    write_png(tmp_path / "mask.png", mask)
    np.save(tmp_path / "mask.npy", mask[..., 0] > 0)
    command = ["encode", "--model", str(model), "--data", str(picture_folder), "--preset", "fast"]
    command += ["--mask", str(tmp_path / "mask.png"), "--output_dir", str(tmp_path / "here")]
    assert main(command) == 0
    theirs = LatentTable.load(tmp_path / "here/latents.safetensors").latents
    for name in ("mask.png", "mask.npy"):
        assert on_board(bundle, picture_folder, tmp_path / name[-3:], "--mask", str(tmp_path / name)) == 0
        ours = LatentTable.load(tmp_path / name[-3:] / "latents.safetensors").latents
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    scores = json.loads((tmp_path / "npy/scores.json").read_text())
    assert set(scores) == {"instances"}  # the profile is of what was seen whole
    assert scores["instances"]["000.png"]["cell_residuals"][0] > 0


def test_a_board_needs_neither_mnif_nor_pillow(bundle: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "seen").mkdir()
    for number in range(2):
        write_png(tmp_path / f"seen/{number}.png", random.integers(0, 256, (12, 16, 3)).astype(np.uint8))
    code = (
        "import sys; sys.modules['PIL'] = None; sys.path.insert(0, 'device'); sys.argv[0] = 'encode'; "
        "from export.device.encode import main; code = main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'diffusers', 'mnif', 'onnx', 'safetensors'} & set(sys.modules)))"
    )
    flags = ["--data", str(tmp_path / "seen"), "--output_dir", str(tmp_path / "bare"), "--backend", "onnxruntime"]
    bare = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=bundle, capture_output=True, text=True, check=False
    )
    assert bare.stdout.endswith("0 []\n"), bare.stdout + bare.stderr
    whole = run(bundle, sys.executable, "encode", *flags[:3], str(tmp_path / "whole"), *flags[4:])
    assert whole.returncode == 0, whole.stderr
    for name in ("latents.safetensors", "coefficients.npy", "fields.npy", "scores.json"):
        assert (tmp_path / "bare" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_table_is_mnifs_to_the_byte(tmp_path: Path) -> None:
    latents, ids = torch.randn(5, 7) * 3, ["a.png", "ü.png", "", "b", "c"]
    LatentTable(latents, ids, torch.zeros(5, dtype=torch.bool), "f" * 64, "pictures").save(tmp_path / "theirs")
    write_latents(tmp_path / "ours", latents.numpy(), ids, "f" * 64, "pictures")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def drawing(mode: str) -> Image.Image:
    """20×30 of soft colours, in one of Pillow's modes."""
    rows, columns = np.mgrid[0:30, 0:20]
    colours = np.stack([rows * 8, columns * 12, (rows + columns) * 5, 255 - rows * 8], axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray((rows * 2000 + columns).astype(np.uint16))
    image = Image.fromarray(colours)
    return image.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "I;16", "CMYK"])
def test_pictures_become_what_the_data_loader_makes_of_them(mode: str, channels: int, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{'jpg' if mode == 'CMYK' else 'png'}"
    image, exif = drawing(mode), Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif)
    for size in ((12, 16), (30, 20), (20, 30), (5, 40)):
        with open_image(path) as opened:
            expected = crop_and_resize(opened, size, channels)
        np.testing.assert_array_equal(pictures.read_picture(path, size, channels), expected)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_png_files_without_pillow(mode: str, tmp_path: Path) -> None:
    """Pillow chooses among all of PNG's filters."""
    pixels = np.asarray(drawing(mode)).reshape(30, 20, -1)
    noisy = pixels + np.random.default_rng(0).integers(0, 9, pixels.shape).astype(np.uint8)
    for number, each in enumerate((pixels, noisy, np.ascontiguousarray(pixels[::-1]))):
        Image.fromarray(each.squeeze()).save(tmp_path / f"{number}.png")
        np.testing.assert_array_equal(pictures.read_png(tmp_path / f"{number}.png", each.shape), each)


def test_png_files_that_only_pillow_reads_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, palette = tmp_path / "picture.png", tmp_path / "palette.png"
    drawing("RGB").save(path)
    drawing("P").save(palette)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for each, words in ((palette, "a palette"), (path, r"30 × 20 of 3, not 12 × 16 × 3")):
        with pytest.raises(BundleError, match=words):
            pictures.read_picture(each, (12, 16), 3)
    whole = path.read_bytes()
    for content in (b"", b"no picture", whole[:40], whole[:60] + b"\xff" * 20 + whole[80:]):
        path.write_bytes(content)
        with pytest.raises(BundleError, match="python3-pil") as refusal:
            pictures.read_picture(path, (30, 20), 3)
        assert "\n" not in str(refusal.value)


PICTURE, SHAPE = Form("image", (12, 16), 3), Form("voxels", (4, 4, 4), 1)


def test_arrays_mean_what_they_mean_to_mnif(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 12, 16, 3)).astype(np.uint8)
    path = tmp_path / "some.npy"
    for array in (pixels, pixels / 255):
        np.save(path, array)
        found = read_observations([path], PICTURE)
        assert found.ids == ["000000", "000001", "000002"]
        np.testing.assert_allclose(found.values, pixels / 127.5 - 1, atol=1e-6)
    np.save(tmp_path / "one.npy", pixels[0])
    assert read_observations([path, tmp_path / "one.npy"], PICTURE).ids[2:] == ["some.npy/000002", "one.npy"]
    grids = random.random((2, 4, 4, 4)) < 0.5
    for array in (grids, grids.astype(float), grids[..., None] * 2.0 - 1, grids.astype(np.uint8)[..., None]):
        np.save(path, array)
        np.testing.assert_array_equal(read_observations([path], SHAPE).values[..., 0], grids * 2 - 1)
    np.save(path, grids[0])
    assert read_observations([path], SHAPE).values.shape == (1, 4, 4, 4, 1)
    np.save(path, random.random((3, 9, 1)))
    assert read_observations([path], Form("sound", (9,), 1)).values.shape == (3, 9, 1)


@pytest.mark.parametrize(
    ("array", "form", "words"),
    [
        (np.zeros((16, 12, 3), np.uint8), PICTURE, r"the array is \[16, 12, 3\]; \[12, 16, 3\] or \[N, 12, 16, 3\]"),
        (np.full((12, 16, 3), 2.0), PICTURE, "from 2 to 2"),
        (np.zeros((12, 16, 3), np.int64), PICTURE, "uint8, or floats"),
        (np.full((12, 16, 3), np.nan), PICTURE, "NaN"),
        (np.array(["a"]), PICTURE, "not an .npy array of numbers"),
        (np.full((4, 4, 4), 0.5), SHAPE, "other than 0 and 1"),
        (np.zeros((4, 4, 4)), SHAPE, "no cell of a shape is occupied"),
        (np.ones((8, 8, 8)), SHAPE, r"\[4, 4, 4, 1\]"),
        (np.zeros(0), SHAPE, "not an .npy array"),
    ],
)
def test_arrays_of_something_else_are_one_line(array: np.ndarray, form: Form, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "some.npy", array)
    with pytest.raises(BundleError, match=words):
        read_observations([tmp_path / "some.npy"], form)


def test_masks_of_something_else_are_one_line(tmp_path: Path) -> None:
    for array, words in (
        (np.ones((16, 12)), r"\[1, 16, 12\]"),
        (np.zeros((12, 16)), "nothing is observed"),
        (np.ones((2, 12, 16)), "or 3 of these"),
    ):
        np.save(tmp_path / "mask.npy", array)
        with pytest.raises(BundleError, match=words):
            read_mask(tmp_path / "mask.npy", PICTURE, 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere.png"], "nowhere.png"),
        (["--data", "empty"], "no pictures and no .npy files are in it"),
        (["--data", "text.png"], "unreadable picture"),
        (["--data", "twice/a.png", "a.png"], "two instances are called a.png"),
        (["--data", "a.png", "--output_dir", "others"], "is of something else"),
        (["--data", "a.png", "--false_alarm_rate", "0.00001"], "the profile allows 0.0"),
        (["--data", "a.png", "--precision", "mixed"], "no graph of kind encoder, precision mixed; there are encoder"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str],
    words: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "twice", "others"):
        Path(name).mkdir()
    for name in ("a.png", "twice/a.png"):
        write_png(Path(name), np.zeros((12, 16, 3), np.uint8))
    Path("text.png").write_text("no picture")
    Path("others/latents.safetensors").write_text("somebody's")
    assert encode.main(["--bundle", str(bundle), *flags]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert Path("others/latents.safetensors").read_text() == "somebody's"
    assert not Path("latents").exists()


def test_models_and_bundles_without_an_encoder_say_so(
    decoder: MNIFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_component(tmp_path / "model", "decoder", decoder)
    export = ["export", "--compile_rtx", "off", "--num_baked", "0", "--precision", "fp32"]
    export += ["--output_dir", str(tmp_path / "bundle"), "--model"]
    assert main([*export, str(tmp_path / "model"), "--encoder_storage", "int8"]) == 2
    assert "--encoder_storage int8: is for the graph of --encoder; say that too" in capsys.readouterr().err
    assert main([*export, str(tmp_path / "model"), "--encoder"]) == 2
    assert "--encoder: " in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    assert main([*export, str(tmp_path / "model")]) == 0
    capsys.readouterr()
    (tmp_path / "a.npy").touch()
    assert on_board(tmp_path / "bundle", tmp_path / "a.npy", tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "no graph of kind encoder; none was exported: `mnif export --encoder` adds it" in told


def test_encoders_of_views_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"signal": "radiance", "signal_settings": {"resolution": 8, "samples": 4}}
    decoder = MNIFModel(channels=4, dimensions=3, num_bases=2, width=4, depth=0, latent_dim=6, cells=1, **settings)
    save_component(tmp_path / "model", "decoder", decoder)
    views = ViewsEncoder(resolution=8, latent_dim=6, patches=2, patch_width=4, patch_features=2, width=8)
    save_component(tmp_path / "model", "encoder", views)
    command = ["export", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "bundle"), "--encoder"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "--encoder: that of posed views takes any number of them" in told
    assert told.count("\n") == 1


def test_an_encoder_without_a_profile_judges_nothing(exported: Path, tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)
    encoder = Encoder(load_bundle(exported, "onnxruntime"))
    found = encoder(values, batch_size=2)
    assert found.patch_residuals is None
    with torch.no_grad():
        expected = small_encoder()(torch.from_numpy(values)).numpy()
    np.testing.assert_allclose(found.latents, expected, atol=1e-5)
    np.testing.assert_allclose(
        Encoder(load_bundle(exported, "onnxruntime"), "mixed")(values).latents, expected, atol=0.02
    )
    np.save(tmp_path / "some.npy", np.zeros((2, 16, 16, 3), np.uint8))
    assert on_board(exported, tmp_path / "some.npy", tmp_path / "out") == 0
    assert set(json.loads((tmp_path / "out/scores.json").read_text())) == {"instances"}


def test_damaged_profiles_are_one_line(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_png(tmp_path / "a.png", np.zeros((12, 16, 3), np.uint8))
    with np.load(bundle / "profile.npz") as stored:
        arrays = dict(stored)
    for number, (name, array) in enumerate(sorted(arrays.items())):
        wrongs = (array[:-1], array[..., None], np.full_like(array, np.nan), None, -np.abs(array) - 1)
        for wrong in (wrongs[number % 4], wrongs[4] if name in ("weights", "residual_std") else None):
            if name in ("alarms", "ranks") and wrong is not None and wrong.shape == array[:-1].shape:
                continue  # as good as another
            folder = Path(shutil.copytree(bundle, tmp_path / "damaged"))
            np.savez(folder / "profile.npz", **{k: v for k, v in (arrays | {name: wrong}).items() if v is not None})
            manifest = json.loads((folder / "manifest.json").read_text())
            content = (folder / "profile.npz").read_bytes()
            manifest["files"]["profile.npz"] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
            manifest["digest"] = manifest_digest(manifest)
            (folder / "manifest.json").write_text(json.dumps(manifest))
            assert on_board(folder, tmp_path / "a.png", tmp_path / "out") == 2, (name, wrong)
            told = capsys.readouterr().err
            assert "damaged" in told
            assert told.count("\n") == 1
            shutil.rmtree(folder)


@torch.no_grad()
def test_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"channels": 1, "resolution": 6, "latent_dim": 6, "dimensions": 3}
    decoder = MNIFModel(**settings, num_bases=4, width=8, depth=1, cells=2, signal="voxels").eval()
    encoder = PatchEncoder(**settings, patches=2, patch_width=8, patch_features=4, width=16).eval()
    options = ExportArguments(
        model=tmp_path, output_dir=tmp_path / "bundle", num_baked=0, precision=["fp32"], compile_rtx="off"
    )
    export_bundle(decoder, options, encoder=encoder)
    grids = np.random.default_rng(0).random((3, 6, 6, 6)) < 0.4
    np.save(tmp_path / "shapes.npy", grids)
    assert on_board(tmp_path / "bundle", tmp_path / "shapes.npy", tmp_path / "out") == 0
    values = torch.from_numpy(grids[..., None] * 2.0 - 1).float()
    found = LatentTable.load(tmp_path / "out/latents.safetensors").latents
    torch.testing.assert_close(found, encoder(values), atol=1e-5, rtol=1e-5)
    scores = json.loads((tmp_path / "out/scores.json").read_text())["instances"]
    errors = (decoder(found) - values).square().flatten(1).mean(dim=1).tolist()
    assert [scores[f"00000{row}"]["residual"] for row in range(3)] == pytest.approx(errors, rel=1e-4)
