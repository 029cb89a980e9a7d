import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from export import runtime
from export.bundle import ExportArguments, export_bundle
from export.runtime import BundleError, load_bundle, manifest_digest
from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.cells import axis_cells
from mnif.pictures import to_pixels


@pytest.fixture
def folder(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    output = tmp_path / "bundle"
    export_bundle(
        pipeline,
        ExportArguments(
            model=tmp_path, output_dir=output, num_baked=2, num_inference_steps=3, resolution=15, compile_rtx="off"
        ),
    )
    return output


def pictures(pipeline: MNIFPipeline, seed: int, indices: range) -> np.ndarray:
    noise = torch.from_numpy(initial_noise(seed, indices, 12))
    latents = pipeline(latents=noise, num_inference_steps=3, output_type="latent").images
    return to_pixels(pipeline.decoder(latents, 15).detach())


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object], sign: bool = True) -> None:
    """Changes a manifest; ``sign`` makes its digest fit again, as someone who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_samples_are_the_pipelines(pipeline: MNIFPipeline, folder: Path) -> None:
    images = load_bundle(folder).sample(5, seed=7, batch_size=2)
    assert images.shape == (5, 15, 15, 3)
    assert images.dtype == np.uint8
    assert np.abs(images.astype(int) - pictures(pipeline, 7, range(5))).max() <= 1


def test_a_sample_depends_on_seed_and_number_alone(folder: Path) -> None:
    bundle = load_bundle(folder, threads=1)
    images = bundle.sample(6, seed=3, batch_size=6)
    later = bundle.sample(2, seed=3, start=4, batch_size=1)
    assert np.abs(images[4:].astype(int) - later).max() <= 1
    assert not np.array_equal(images, bundle.sample(6, seed=4, batch_size=6))


def test_decode_is_the_decoders(pipeline: MNIFPipeline, folder: Path) -> None:
    latents = torch.randn(4, 12)
    values = load_bundle(folder).decode(pipeline.decoder.coefficients(latents).detach().numpy())
    np.testing.assert_allclose(values, pipeline.decoder(latents, 15).detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("resolution", [1, 15, 16, 40])
def test_a_baked_sample_at_any_resolution(pipeline: MNIFPipeline, folder: Path, resolution: int) -> None:
    noise = torch.from_numpy(initial_noise(0, range(2), 12))
    latents = pipeline(latents=noise, num_inference_steps=3, output_type="latent").images
    values = load_bundle(folder).baked("baked_0001", resolution)
    np.testing.assert_allclose(values, pipeline.decoder(latents, resolution)[1].detach().numpy(), atol=1e-5)


def test_noise_is_the_samplers() -> None:
    np.testing.assert_array_equal(runtime.initial_noise(5, range(3, 9), 12), initial_noise(5, range(3, 9), 12))


@pytest.mark.parametrize("overlap", [0.0, 0.1, 0.1875, 0.5])
@pytest.mark.parametrize("cells", [1, 2, 3, 4, 7])
def test_cells_are_the_models(cells: int, overlap: float) -> None:
    for resolution in (1, 2, 3, 5, 15, 16, 32, 33, 64, 100):
        ours, theirs = runtime.axis_cells(resolution, cells, overlap), axis_cells(resolution, cells, overlap)
        for array, name in zip(ours, ("coordinates", "first", "second", "weight"), strict=True):
            np.testing.assert_array_equal(array, getattr(theirs, name))


def test_the_bundle_runs_by_itself_without_torch(pipeline: MNIFPipeline, folder: Path, tmp_path: Path) -> None:
    script = (
        "import runtime, sys; code = runtime.main(sys.argv[1:]); "
        "heavy = {'torch', 'diffusers', 'PIL', 'mnif', 'export'} & set(sys.modules); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    flags = ["--bundle", folder, "--num_samples", 3, "--seed", 7, "--threads", 1, "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-W", "error", "-c", script, *map(str, flags)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "3 pictures drawn" in done.stdout
    assert "images/s" in done.stdout
    paths = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in paths] == ["000000.png", "000001.png", "000002.png"]
    images = np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int)
    assert np.abs(images - pictures(pipeline, 7, range(3))).max() <= 1


def test_the_source_is_python_3_8() -> None:
    ast.parse(Path(runtime.__file__).read_text(), feature_version=(3, 8))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_png_of_every_kind(tmp_path: Path, channels: int, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    runtime.write_png(tmp_path / "a.png", pixels)
    image = Image.open(tmp_path / "a.png")
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(image).reshape(pixels.shape), pixels)


def test_a_changed_file_is_refused(folder: Path) -> None:
    path = folder / "onnx" / "sampler.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    bundle = load_bundle(folder)
    with pytest.raises(BundleError, match=r"sampler\.onnx: differs from what was exported"):
        bundle.sample(1)
    assert bundle.baked("baked_0000", 4).shape == (4, 4, 3)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "onnx" / "sampler.onnx").unlink()
    with pytest.raises(BundleError, match=r"sampler\.onnx: No such file"):
        load_bundle(folder).sample(1)


def test_an_edited_manifest_is_refused(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["grid"].update(overlap=0.3), sign=False)
    with pytest.raises(BundleError, match=r"manifest\.json: was changed"):
        load_bundle(folder)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 2}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        load_bundle(tmp_path)


def test_paths_out_of_the_bundle_are_refused(folder: Path) -> None:
    secret = folder.parent / "secret.onnx"
    secret.write_bytes((folder / "onnx" / "sampler.onnx").read_bytes())
    (folder / "link.onnx").symlink_to(secret)
    for path in ("../secret.onnx", str(secret), "link.onnx"):

        def point_outside(manifest: dict[str, Any], path: str = path) -> None:
            manifest["files"][path] = manifest["files"]["onnx/sampler.onnx"]
            manifest["graphs"]["sampler"]["file"] = path

        rewrite(folder, point_outside)
        with pytest.raises(BundleError, match="points outside the bundle"):
            load_bundle(folder).sample(1)


@pytest.mark.parametrize("part", ["files", "graphs", "sampling"])
def test_a_manifest_with_a_part_missing_is_refused(folder: Path, part: str) -> None:
    rewrite(folder, lambda manifest: manifest.pop(part))
    with pytest.raises(BundleError, match=f"manifest has no usable {part}"):
        load_bundle(folder).sample(1)


def test_a_graph_that_is_none_is_refused(folder: Path) -> None:
    def swap(manifest: dict[str, Any]) -> None:
        manifest["graphs"]["sampler"]["file"] = "README.md"

    rewrite(folder, swap)
    with pytest.raises(BundleError, match=r"README\.md: not a usable graph"):
        load_bundle(folder).sample(1)


def test_impossible_wishes_are_one_line(folder: Path) -> None:
    bundle = load_bundle(folder)
    with pytest.raises(BundleError, match="num_samples 0"):
        bundle.sample(0)
    with pytest.raises(BundleError, match="seed -1"):
        bundle.sample(1, seed=-1)
    with pytest.raises(BundleError, match="resolution 0"):
        bundle.baked("baked_0000", 0)
    with pytest.raises(BundleError, match=r"no graph baked_0009; there are baked_0000, baked_0001, decoder, sampler"):
        bundle.baked("baked_0009", 8)
    with pytest.raises(BundleError, match="sampler is not a baked sample"):
        bundle.baked("sampler", 8)
    with pytest.raises(BundleError, match=r"decoder: coefficients must be of shape \['batch', 4, "):
        bundle.decode(np.zeros((1, 2, 3)))


@pytest.mark.parametrize(
    "flags", [["--bundle", "/nowhere"], ["--num_samples", "0"], ["--num_samples", "many"], ["--threads", "-1"]]
)
def test_command_line_mistakes_are_one_line_and_exit_2(
    folder: Path, tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = runtime.main(["--bundle", str(folder), "--output_dir", str(tmp_path / "out"), *flags])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("runtime.py: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
