import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F

from export.graphs.radiance import points_graph, rays_graph
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import Cameras, RadianceField, Rays
from mnif.signals.volume_rendering import turntable_poses
from tests.fakes import onnx_rules
from tests.fakes.onnx_rules import FIELDS, RENDERING, check_output_type

SETTINGS = {"resolution": [5, 7], "bound": 0.8, "near": 0.5, "far": 3.1, "samples": 9}
FORMS = {
    "one cell": {"cells": 1},
    "one cell, the paper's mixing, output sine": {"cells": 1, "mixing": "average", "output_sine": True},
    "two cells": {"cells": 2},
    "three cells, the paper's mixing": {"cells": 3, "mixing": "average"},
    "two cells without overlap": {"cells": 2, "overlap": 0.0},
    "three cells that overlap in all of their parts": {"cells": 3, "overlap": 0.5},
}


@pytest.fixture(params=FORMS)
def model(request: pytest.FixtureRequest) -> tuple[MNIFModel, RadianceField]:
    torch.manual_seed(0)
    decoder = MNIFModel(
        channels=4,
        dimensions=3,
        num_bases=4,
        width=8,
        depth=1,
        latent_dim=6,
        signal="radiance",
        **FORMS[request.param],
    ).eval()
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.3)
    for parameter in decoder.means:
        parameter.data *= 2
    return decoder, RadianceField(**SETTINGS, background="white" if decoder.config.cells == 1 else "black")


def run(model: onnx.ModelProto, **arrays: torch.Tensor) -> list[torch.Tensor]:
    check_output_type(model, FIELDS | RENDERING)
    answers = onnx_rules.run(model, {name: np.ascontiguousarray(array.numpy()) for name, array in arrays.items()})
    return [torch.from_numpy(answer) for answer in answers]


def cameras_rays(batch: int, signal: RadianceField) -> tuple[torch.Tensor, torch.Tensor]:
    """Rays of whole pictures, some of which miss the cube, one of which runs along an axis."""
    poses = turntable_poses(batch, 2.0, elevation=25.0)[:, None]
    intrinsics = torch.tensor([[4.0, 4.0, 3.5, 2.5]]).expand(batch, -1)
    origins, directions = (each.flatten(1, 3).clone() for each in Cameras(poses, intrinsics, 5, 7).rays())
    origins[:, 0], directions[:, 0] = torch.tensor([0.1, 0.2, 2.0]), torch.tensor([0.0, 0.0, -1.0])
    origins[:, 1], directions[:, 1] = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 1.0, 0.0])
    return origins, directions


@torch.no_grad()
def test_rays_equal_the_signals_rendering(model: tuple[MNIFModel, RadianceField]) -> None:
    decoder, signal = model
    graph = rays_graph(decoder, signal)
    for batch in (1, 3, 8):
        coefficients = decoder.coefficients(torch.randn(batch, 6))
        origins, directions = cameras_rays(batch, signal)
        expected = signal.render(decoder, coefficients, Rays(origins, directions))
        (colours,) = run(graph, coefficients=coefficients, origins=origins, directions=directions)
        torch.testing.assert_close(colours, expected, atol=1e-5, rtol=0)
        assert colours.std() > 0.02
        field = decoder.bake(coefficients[:1])
        (baked,) = run(rays_graph(decoder, signal, field), origins=origins[0], directions=directions[0])
        torch.testing.assert_close(baked, expected[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_points_equal_the_models_values(model: tuple[MNIFModel, RadianceField]) -> None:
    decoder, signal = model
    graph = points_graph(decoder, signal)
    for batch, count in ((1, 1), (3, 50), (8, 7)):
        coefficients = decoder.coefficients(torch.randn(batch, 6))
        points = (torch.rand(batch, count, 3) * 2.2 - 1.1) * signal.bound
        points[:, 0] = 0.0  # on the borders of two cells
        values = decoder.values_at(coefficients, points / signal.bound)
        colours, density = run(graph, coefficients=coefficients, points=points)
        torch.testing.assert_close(colours, values[..., :3], atol=1e-5, rtol=1e-5)
        expected = F.softplus(10 * values[..., 3:] - 3) * (2 / signal.bound)
        torch.testing.assert_close(density, expected, atol=1e-4, rtol=1e-5)
        baked = run(points_graph(decoder, signal, decoder.bake(coefficients[:1])), points=points[0])
        torch.testing.assert_close(baked[0], colours[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(baked[1], density[0], atol=1e-4, rtol=1e-5)
