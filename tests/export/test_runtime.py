"""The bundle at work: what it draws is what the pipeline draws, whatever runs it."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export.commands.export import ExportArguments, export_bundle
from export.device import runtime, sample
from export.device.backends import BackendMissing
from export.device.bundle import BundleError, manifest_digest
from export.device.pictures import write_png
from export.device.runtime import BakedInstance, Camera, Decoder, Sampler, load_bundle, turntable_rays
from export.device.runtime import initial_noise as runtime_noise
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from mnif.models.cell_grid import axis_cells
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import Cameras, RadianceField
from mnif.signals.volume_rendering import camera_rays, turntable_poses
from mnif.utils.pixels import to_uint8


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def values(pipeline: MNIFPipeline, seed: int, indices: range, resolution: int = 15) -> np.ndarray:
    noise = torch.from_numpy(initial_noise(seed, indices, 12))
    latents = pipeline(latents=noise, num_inference_steps=3, output_type="latent").images
    drawn: np.ndarray = pipeline.decoder(latents, resolution).detach().numpy()
    return drawn


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Changes a manifest; ``sign`` makes its digest fit again, as someone who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_samples_are_the_pipelines(pipeline: MNIFPipeline, exported: Path, backend: str) -> None:
    pytest.importorskip(backend)
    drawn = Sampler(load_bundle(exported, backend), "fp32")(5, seed=7, batch_size=2)
    np.testing.assert_allclose(drawn, values(pipeline, 7, range(5)), atol=1e-4)


def test_a_sample_depends_on_seed_and_number_alone(exported: Path) -> None:
    sampler = Sampler(load_bundle(exported, threads=1))
    drawn = sampler(6, seed=3, batch_size=6)
    np.testing.assert_allclose(drawn[4:], sampler(2, seed=3, start=4, batch_size=1), atol=1e-5)
    assert not np.array_equal(drawn, sampler(6, seed=4, batch_size=6))


def test_samplers_are_chosen_by_precision_and_steps(exported: Path) -> None:
    bundle = load_bundle(exported)
    assert Sampler(bundle).name == "sampler_3"
    assert Sampler(bundle, steps=1).name == "sampler_1"
    assert Sampler(bundle, "mixed").name == "sampler_3_mixed"
    with pytest.raises(
        BundleError, match=r"no graph of kind sampler, steps 4; there are sampler_1, sampler_1_mixed, "
    ):
        Sampler(bundle, steps=4)
    graphs = bundle.folder.manifest["graphs"]
    for name in [name for name in graphs if name.startswith("sampler")]:
        del graphs[name]
    with pytest.raises(BundleError, match="no graph of kind sampler; none was exported: samplers need "):
        Sampler(bundle)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_decode_is_the_decoders(pipeline: MNIFPipeline, exported: Path, backend: str, batch: int) -> None:
    pytest.importorskip(backend)
    latents = torch.randn(batch, 12, generator=torch.Generator().manual_seed(batch))
    decoded = Decoder(load_bundle(exported, backend))(pipeline.decoder.coefficients(latents).detach().numpy())
    np.testing.assert_allclose(decoded, pipeline.decoder(latents, 15).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("resolution", [1, 15, 16, 40, [9, 14]])
def test_a_baked_sample_at_any_resolution(
    pipeline: MNIFPipeline, exported: Path, backend: str, resolution: int | list[int]
) -> None:
    pytest.importorskip(backend)
    found = BakedInstance(load_bundle(exported, backend), "baked_0001")(resolution)
    size = resolution if isinstance(resolution, int) else tuple(resolution)
    np.testing.assert_allclose(found, values(pipeline, 0, range(2), size)[1], atol=1e-5)


def test_noise_is_the_samplers() -> None:
    np.testing.assert_array_equal(runtime_noise(5, range(3, 9), 12), initial_noise(5, range(3, 9), 12))


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.1875, 0.5])
@pytest.mark.parametrize("cells", [1, 2, 3, 4, 7])
def test_cells_are_the_models(cells: int, overlap: float) -> None:
    for resolution in (1, 2, 3, 5, 15, 16, 32, 33, 64, 100):
        ours, theirs = runtime.axis_cells(resolution, cells, overlap), axis_cells(resolution, cells, overlap)
        for name in ("coordinates", "first", "second", "weight"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))


def test_rays_are_the_renderers() -> None:
    intrinsics = [21.0, 20.0, 8.5, 5.0]
    origins, directions = turntable_rays(90.0, 20.0, 2.5, intrinsics, [10, 16])
    pose = turntable_poses(4, 2.5, 20.0, torch.float64)[1]
    expected = camera_rays(pose, torch.tensor(intrinsics, dtype=torch.float64), 10, 16)
    np.testing.assert_allclose(origins, expected[0].reshape(-1, 3), atol=1e-12)
    np.testing.assert_allclose(directions, expected[1].reshape(-1, 3), atol=1e-12)


def test_views_are_the_renderers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    settings = {"resolution": [9, 12], "bound": 0.8, "samples": 6, "camera_distance": 2.0}
    signal = RadianceField(**settings)
    decoder = MNIFModel(
        channels=4, dimensions=3, num_bases=4, width=8, depth=1, latent_dim=6, cells=2, resolution=6,
        signal="radiance", signal_settings=signal.settings(),
    ).eval()  # fmt: skip
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.5)
    options = ExportArguments(
        model=tmp_path, output_dir=tmp_path / "bundle", num_baked=0, precision=["fp32"], compile_rtx="off"
    )
    export_bundle(decoder, options)
    bundle = load_bundle(tmp_path / "bundle", "onnxruntime")
    coefficients = decoder.coefficients(torch.randn(1, 6)).detach()
    pose = turntable_poses(4, 2.0, 20.0)[1]
    cameras = Cameras(pose[None, None], torch.tensor([signal.intrinsics]), 9, 12)
    with torch.no_grad():
        expected = signal.render_views(decoder, coefficients, cameras)[0, 0].numpy()
    found = Camera(bundle)(coefficients.numpy(), azimuth=90.0, elevation=20.0)
    assert found.std() > 1e-3
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_only_radiance_fields_have_views(exported: Path) -> None:
    with pytest.raises(BundleError, match="no bundle of radiance fields"):
        Camera(load_bundle(exported))


def test_the_best_backend_is_taken_and_the_log_says_why(exported: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mnif.runtime"):
        Sampler(load_bundle(exported))(1)
    (record,) = caplog.records
    assert record.message.startswith("sampler_3 runs in onnxruntime ")
    assert "not tensorrt: " in record.message


def test_a_backend_that_is_not_there_is_named(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendMissing, match="openvino is not installed"):
        Sampler(load_bundle(exported, "openvino"))(1)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendMissing, match=r"nothing here can run sampler_3: not tensorrt: .*; not onnxruntime: "):
        Sampler(load_bundle(exported))(1)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_of_every_kind(tmp_path: Path, channels: int, mode: str) -> None:
    content = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    write_png(tmp_path / "a.png", content)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image).reshape(content.shape), content)


def test_the_command_draws_the_pipelines_pictures(pipeline: MNIFPipeline, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--bundle", str(exported), "--num", "3", "--seed", "7", "--threads", "1", "--output_dir", str(out)]
    assert sample.main(flags) == 0
    assert sorted(path.name for path in out.iterdir()) == ["000000.png", "000001.png", "000002.png"]
    images = np.stack([np.asarray(Image.open(path)) for path in sorted(out.iterdir())]).astype(int)
    assert np.abs(images - to_uint8(torch.from_numpy(values(pipeline, 7, range(3))))).max() <= 1


def test_a_changed_or_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "onnx" / "sampler_3.onnx"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:100] + bytes([whole[100] ^ 1]) + whole[101:], b""):
        path.write_bytes(damaged)
        bundle = load_bundle(folder)
        with pytest.raises(BundleError, match=r"sampler_3\.onnx: differs from what was exported"):
            Sampler(bundle)(1)
    assert BakedInstance(bundle, "baked_0000")(4).shape == (4, 4, 3)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "onnx" / "sampler_3.onnx").unlink()
    with pytest.raises(BundleError, match=r"sampler_3\.onnx: No such file"):
        Sampler(load_bundle(folder))(1)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["grid"].update(overlap=0.3), sign=False)
    with pytest.raises(BundleError, match=r"manifest\.json: was changed"):
        load_bundle(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(tmp_path)


def test_paths_out_of_the_bundle_are_refused(folder: Path) -> None:
    secret = folder.parent / "secret.onnx"
    secret.write_bytes((folder / "onnx" / "sampler_3.onnx").read_bytes())
    (folder / "link.onnx").symlink_to(secret)
    for path in ("../secret.onnx", str(secret), "link.onnx"):

        def point_outside(manifest: dict[str, Any], path: str = path) -> None:
            manifest["files"][path] = manifest["files"]["onnx/sampler_3.onnx"]
            manifest["graphs"]["sampler_3"]["file"] = path

        rewrite(folder, point_outside)
        with pytest.raises(BundleError, match="points outside the bundle"):
            Sampler(load_bundle(folder))(1)


@pytest.mark.parametrize("name", ["../engine", "a/b", "", ".hidden", "a\\b"])
def test_a_graph_cannot_be_named_like_a_path(folder: Path, name: str) -> None:
    rewrite(folder, lambda manifest: manifest["graphs"].update({name: manifest["graphs"]["decoder"]}))
    with pytest.raises(BundleError, match="a graph cannot be named"):
        load_bundle(folder)


@pytest.mark.parametrize("part", ["files", "graphs", "sampling"])
def test_a_manifest_with_a_part_missing_is_refused(folder: Path, part: str) -> None:
    rewrite(folder, lambda manifest: manifest.pop(part))
    with pytest.raises(BundleError, match=f"the manifest has no {part}"):
        Sampler(load_bundle(folder))(1)


def test_a_graph_that_is_none_is_refused(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["graphs"]["sampler_3"].update(file="README.md"))
    with pytest.raises(BundleError, match=r"README\.md: not a usable graph"):
        Sampler(load_bundle(folder))(1)


def test_impossible_wishes_are_one_line(exported: Path) -> None:
    bundle = load_bundle(exported)
    sampler = Sampler(bundle)
    with pytest.raises(BundleError, match="num_samples 0"):
        sampler(0)
    with pytest.raises(BundleError, match="seed -1"):
        sampler(1, seed=-1)
    with pytest.raises(BundleError, match="resolution 0"):
        BakedInstance(bundle, "baked_0000")(0)
    with pytest.raises(BundleError, match="no graph baked_0009; there are baked_0000, "):
        BakedInstance(bundle, "baked_0009")
    with pytest.raises(BundleError, match="decoder is not a baked instance"):
        BakedInstance(bundle, "decoder")
    with pytest.raises(BundleError, match=r"decoder: coefficients must be of shape \['batch', 4, "):
        bundle.run("decoder", np.zeros((1, 2, 3)))
    with pytest.raises(BundleError, match="decoder takes coefficients, not 2 arrays"):
        bundle.run("decoder", np.zeros(1), np.zeros(1))


@pytest.mark.parametrize(
    "flags",
    [["--bundle", "/nowhere"], ["--num", "0"], ["--num", "many"], ["--threads", "-1"], ["--backend", "abacus"]],
)
def test_command_line_mistakes_are_one_line_and_exit_2(
    exported: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = sample.main(["--bundle", str(exported), "--output_dir", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("mnif sample: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
