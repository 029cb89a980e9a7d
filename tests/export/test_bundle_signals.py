"""Bundles of radiance fields and of voxels."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.commands.export import ExportArguments, export_bundle
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import RadianceField, Rays
from mnif.utils.json_files import read_json
from tests.fakes.onnx_rules import run


@pytest.fixture
def options(tmp_path: Path) -> ExportArguments:
    return ExportArguments(
        model=tmp_path,
        output_dir=tmp_path / "bundle",
        num_baked=1,
        num_inference_steps=[2],
        sampler_precision=["fp32"],
        compile_rtx="off",
    )


@torch.no_grad()
def test_noise_becomes_coefficients_become_the_light_of_rays(options: ExportArguments) -> None:
    torch.manual_seed(0)
    settings = {"resolution": [6, 8], "bound": 0.9, "near": 0.5, "far": 4.0, "background": "black", "samples": 7}
    decoder = MNIFModel(
        channels=4,
        dimensions=3,
        resolution=5,
        num_bases=4,
        width=8,
        depth=1,
        latent_dim=12,
        cells=1,
        signal="radiance",
        signal_settings=settings,
    ).eval()
    denoiser = ResMLPDenoiser(latent_dim=12, width=16, depth=1, decoder_fingerprint=decoder.fingerprint()).eval()
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipeline = MNIFPipeline(decoder, denoiser, sampling_scheduler("x0"))
    export_bundle(pipeline, options)

    manifest = read_json(options.output_dir / "manifest.json")
    graphs = manifest["graphs"]
    kinds = {name: graph["kind"] for name, graph in graphs.items() if graph["precision"] == "fp32"}
    baked = {"baked_0000": "baked", "baked_0000_rays": "rays", "baked_0000_points": "points"}
    assert kinds == {"decoder": "decoder", "sampler_2": "sampler", "rays": "rays", "points": "points"} | baked
    assert all(f"{name}_mixed" in graphs for name in kinds if name != "sampler_2")
    signal = RadianceField(**settings)
    assert manifest["radiance"] == {
        "bound": 0.9,
        "near": 0.5,
        "far": 4.0,
        "background": -1.0,
        "samples": 7,
        "size": [6, 8],
        "intrinsics": signal.intrinsics,
        "camera_distance": 2.5,
    }

    def answers(name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return run(onnx.load(options.output_dir / graphs[name]["file"]), inputs)

    noise = initial_noise(0, range(3), 12)
    (coefficients,) = answers("sampler_2", noise=noise)
    latents = pipeline(latents=torch.from_numpy(noise), num_inference_steps=2, output_type="latent").images
    np.testing.assert_allclose(coefficients, decoder.coefficients(latents), atol=1e-5)
    reference = np.load(options.output_dir / "reference.npz")
    rays = {name: reference[f"baked_0000_rays.{name}"] for name in ("origins", "directions")}
    batch = {name: np.repeat(each[None], 3, axis=0) for name, each in rays.items()}
    (colours,) = answers("rays", coefficients=coefficients, **batch)
    arguments = Rays(*(torch.from_numpy(each) for each in batch.values()))
    np.testing.assert_allclose(colours, signal.render(decoder, decoder.coefficients(latents), arguments), atol=1e-5)
    (alone,) = answers("baked_0000_rays", **rays)
    np.testing.assert_allclose(alone, colours[0], atol=1e-5)
    assert colours.std() > 0.02


@torch.no_grad()
def test_shapes_on_a_grid_of_odd_size(options: ExportArguments) -> None:
    torch.manual_seed(0)
    decoder = MNIFModel(
        channels=1, dimensions=3, resolution=8, num_bases=4, width=8, depth=1, latent_dim=6, cells=2, signal="voxels"
    ).eval()
    options.resolution = [9, 7, 10]
    export_bundle(decoder, options)
    manifest = read_json(options.output_dir / "manifest.json")
    assert manifest["sampling"] is manifest["radiance"] is None
    assert manifest["grid"]["resolution"] == [9, 7, 10]
    latents = torch.randn(3, 6)
    coefficients = decoder.coefficients(latents).numpy()
    (values,) = run(onnx.load(options.output_dir / "onnx" / "decoder.onnx"), {"coefficients": coefficients})
    np.testing.assert_allclose(values, decoder(latents, (9, 7, 10)), atol=1e-5)
