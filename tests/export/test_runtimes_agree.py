"""PyTorch, ONNX Runtime and OpenVINO on the same float32 graphs."""

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
import torch

from export.graphs.fields import baked_graph, decoder_graph
from export.graphs.radiance import rays_graph
from export.graphs.sampler import sampler_graph
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from latent_prior.scheduler_table import linear_scheduler_table
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import RadianceField, Rays
from tests.fakes import onnx_rules

openvino = pytest.importorskip("openvino", reason="OpenVINO (extra `openvino`) is not installed")


class OpenVino:
    """A graph as OpenVINO itself runs it, in float32."""

    def __init__(self, model: onnx.ModelProto):
        core = openvino.Core()
        read = core.read_model(model.SerializeToString())
        self.compiled = core.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        return next(iter(self.compiled(dict(inputs)).values()))


def check(model: onnx.ModelProto, runs: list[tuple[Mapping[str, torch.Tensor], torch.Tensor]]) -> None:
    compiled = OpenVino(model)
    for tensors, expected in runs:
        inputs = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}
        (theirs,), ours = onnx_rules.run(model, inputs), compiled(inputs)
        for answer in (theirs, ours):
            np.testing.assert_allclose(answer, expected.numpy(), atol=1e-5, rtol=0)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("resolution", [16, (9, 14)])
def test_decoder_and_sampler(pipeline: MNIFPipeline, resolution: int | tuple[int, int]) -> None:
    decoder = pipeline.decoder
    noises = [torch.from_numpy(initial_noise(0, range(batch), 12)) for batch in (1, 3, 8)]
    latents = [pipeline(latents=noise, num_inference_steps=2, output_type="latent").images for noise in noises]
    values = [decoder(latent, resolution) for latent in latents]
    steps = linear_scheduler_table(pipeline.scheduler, 2)
    runs = [({"noise": noise}, value) for noise, value in zip(noises, values, strict=True)]
    check(sampler_graph(pipeline, steps, resolution), runs)
    coefficients = [decoder.coefficients(latent) for latent in latents]
    runs = [({"coefficients": each}, value) for each, value in zip(coefficients, values, strict=True)]
    check(decoder_graph(decoder, resolution), runs)


@torch.no_grad()
def test_baked(decoder: MNIFModel) -> None:
    field = decoder.bake(decoder.coefficients(torch.randn(1, 12)))
    grids = [decoder.grid(size).coordinates.expand(4, -1, -1) for size in (16, 7, 31)]
    check(baked_graph(field), [({"coordinates": grid}, field(grid)) for grid in grids])


@torch.no_grad()
@pytest.mark.parametrize("cells", [1, 2])
def test_rays(cells: int) -> None:
    torch.manual_seed(0)
    decoder = MNIFModel(
        channels=4, dimensions=3, num_bases=4, width=8, depth=1, latent_dim=6, cells=cells, signal="radiance"
    ).eval()
    signal, runs = RadianceField(8, near=0.5, far=4.0, samples=7), []
    for batch, count in ((1, 5), (3, 2), (8, 9)):
        origins = torch.nn.functional.normalize(torch.randn(batch, count, 3), dim=-1) * 2
        directions = torch.nn.functional.normalize(torch.randn(batch, count, 3) * 0.4 - origins, dim=-1)
        coefficients = decoder.coefficients(torch.randn(batch, 6))
        inputs = {"coefficients": coefficients, "origins": origins, "directions": directions}
        runs.append((inputs, signal.render(decoder, coefficients, Rays(origins, directions))))
    check(rays_graph(decoder, signal), runs)
