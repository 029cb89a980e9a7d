import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from onnx import numpy_helper

from export.bundle import Selection
from export.graphs.fields import baked_graph, decoder_graph
from export.graphs.sampler import sampler_graph
from export.graphs.specs import GraphSpec
from latent_prior.denoisers import Denoiser, ResMLPDenoiser, TransformerDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from latent_prior.scheduler_table import linear_scheduler_table
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from tests.fakes import onnx_rules
from tests.fakes.onnx_rules import DENOISER, FIELDS, SPARSE, check_output_type

SHAPES = {
    "delta, 4 cells": ({"cells": 4}, 32),
    "delta, cells that differ in their points": ({"cells": 4, "overlap": 0.2}, 17),
    "delta, fewer pixels than cells": ({"cells": 4}, 3),
    "delta, no overlap": ({"cells": 3, "overlap": 0.0}, 10),
    "delta, output sine": ({"cells": 2, "output_sine": True}, 9),
    "average, the paper's form": ({"cells": 1, "mixing": "average", "output_sine": True}, 13),
    "average, one cell that needs no blending": ({"cells": 1, "mixing": "average", "overlap": 0.0}, 13),
    "average, 3 cells": ({"cells": 3, "mixing": "average"}, 11),
    "pictures that are not square, with transparency": ({"cells": 2, "channels": 4}, (9, 14)),
    "grey pictures that are not square, in cells that differ": ({"cells": 3, "channels": 1}, (17, 10)),
    "voxels": ({"cells": 2, "dimensions": 3, "channels": 1}, 7),
    "voxels too many to store the first layer's sines of": (
        {"cells": 2, "dimensions": 3, "channels": 1},
        (29, 17, 27),
    ),
    "shared coefficients": ({"cells": 2, "coefficient_form": "shared"}, 9),
    "direct coefficients": ({"cells": 2, "coefficient_form": "direct", "latent_dim": None}, 9),
    "tokens": ({"cells": 4, "tokens": 2, "latent_dim": 8}, 17),
}


def _let_latents_matter(decoder: MNIFModel, spread: float) -> None:
    for name, parameter in decoder.named_parameters():
        if name.startswith("coefficient_map.") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=spread * min(1, (6 / parameter.shape[1]) ** 0.5))


def run(model: onnx.ModelProto, array: np.ndarray) -> np.ndarray:
    (values,) = onnx_rules.run(model, {model.graph.input[0].name: array})
    return values


@pytest.fixture(params=SHAPES)
def spec(request: pytest.FixtureRequest) -> tuple[MNIFModel, int | tuple[int, ...]]:
    settings, resolution = SHAPES[request.param]
    torch.manual_seed(0)
    decoder = MNIFModel(**{"num_bases": 4, "width": 8, "depth": 1, "latent_dim": 6} | settings).eval()
    _let_latents_matter(decoder, 0.2)
    return decoder, resolution


@torch.no_grad()
def test_decoder_graph_equals_the_model(spec: tuple[MNIFModel, int | tuple[int, ...]]) -> None:
    decoder, resolution = spec
    model = decoder_graph(decoder, resolution)
    check_output_type(model)
    for batch in (1, 3, 8):
        latents = torch.randn(batch, decoder.config.latent_dim)
        values = run(model, decoder.coefficients(latents).numpy())
        np.testing.assert_allclose(values, decoder(latents, resolution).numpy(), atol=1e-5)


@torch.no_grad()
def test_baked_graph_blends_to_the_decoders_picture(spec: tuple[MNIFModel, int | tuple[int, ...]]) -> None:
    decoder, resolution = spec
    latents = torch.randn(1, decoder.config.latent_dim)
    field = decoder.bake(decoder.coefficients(latents))
    model = baked_graph(field)
    check_output_type(model)
    fields = decoder.config.cells**decoder.config.dimensions
    larger = 2 * resolution + 1 if isinstance(resolution, int) else tuple(n + 1 for n in resolution)
    for size in (resolution, larger):
        grid = decoder.grid(size)
        coordinates = grid.coordinates.expand(fields, -1, -1)
        values = torch.from_numpy(run(model, np.ascontiguousarray(coordinates.numpy())))
        torch.testing.assert_close(values, field(coordinates), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grid.blend(values[None]), decoder(latents, size), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "count"),
    [
        (DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample=False), 6),
        (sampling_scheduler("x0"), 1),
        (sampling_scheduler("x0"), 20),
        (sampling_scheduler("flow"), 6),
    ],
)
def test_sampler_graph_equals_the_pipeline(pipeline: MNIFPipeline, scheduler: SchedulerMixin, count: int) -> None:
    pipeline.denoiser.register_to_config(prediction_type=None)  # it is random, and may predict anything
    pipeline = MNIFPipeline(pipeline.decoder, pipeline.denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    model = sampler_graph(pipeline, linear_scheduler_table(scheduler, count), resolution=15)
    check_output_type(model)
    for batch in (1, 3, 8):
        noise = initial_noise(0, range(batch), 12)
        pictures = pipeline(
            latents=torch.from_numpy(noise), num_inference_steps=count, resolution=15, output_type="np"
        ).images
        np.testing.assert_allclose((run(model, noise) / 2 + 0.5).clip(0, 1), pictures, atol=1e-4)


FORMS = {
    "shared": {"coefficient_form": "shared"},
    "direct": {"coefficient_form": "direct", "latent_dim": None},
    "one token for each cell": {"tokens": 2, "latent_dim": 12},
    "fewer tokens than cells": {"tokens": 2, "latent_dim": 12, "cells": 6, "coefficient_form": "shared"},
    "grown": {"num_bases": 9, "latent_dim": 11, "growths": [{"num_bases": n, "latent_dim": n} for n in (3, 2)]},
}


@pytest.mark.parametrize("mixing", ["delta", "average", "delta, largest", "delta, place"])
@pytest.mark.parametrize("form", FORMS)
def test_sampler_graph_of_other_forms_of_coefficients(form: str, mixing: str) -> None:
    torch.manual_seed(0)
    settings = {"num_bases": 4, "width": 8, "depth": 1, "cells": 2, "latent_dim": 6, "mixing": mixing}
    mixing, _, rule = mixing.partition(", ")
    if rule:
        settings |= {"mixing": mixing, "coefficient_sparsity": 2, "sparsity_rule": rule}
    decoder = MNIFModel(**settings | FORMS[form]).eval()
    _let_latents_matter(decoder, 0.5)
    size = decoder.config.latent_dim
    denoiser = ResMLPDenoiser(latent_dim=size, width=16, depth=1, decoder_fingerprint=decoder.fingerprint())
    pipeline = MNIFPipeline(decoder, _lively(denoiser), sampling_scheduler("x0"))
    pipeline.set_progress_bar_config(disable=True)
    model = sampler_graph(pipeline, linear_scheduler_table(pipeline.scheduler, 4), resolution=11)
    largest = rule == "largest"
    check_output_type(model, FIELDS | DENOISER | (SPARSE if largest else set()))
    assert sum(node.op_type == "TopK" for node in model.graph.node) == largest * len(decoder.generations)
    for batch in (1, 5):
        noise = initial_noise(0, range(batch), size)
        start = torch.from_numpy(noise)
        pictures = pipeline(latents=start, num_inference_steps=4, resolution=11, output_type="np").images
        np.testing.assert_allclose((run(model, noise) / 2 + 0.5).clip(0, 1), pictures, atol=1e-4)
        assert pictures.std() > 0.05
    if rule:
        coefficients = run(sampler_graph(pipeline, linear_scheduler_table(pipeline.scheduler, 4), None), noise)
        assert coefficients.shape == (5, decoder.num_cells, 2, decoder.config.num_bases)
        assert decoder.active_bases == [2, 2, 1][: len(decoder.generations)]
        of_each = np.split(coefficients != 0, np.cumsum(decoder.generations)[:-1], axis=-1)
        for part, count in zip(of_each, decoder.active_bases, strict=True):
            assert (part.sum(axis=-1) == count).all()


def _lively(denoiser: Denoiser) -> Denoiser:
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser.latent_mean.normal_()
    return denoiser.eval()


@pytest.mark.parametrize(
    ("width", "depth", "scheduler", "count"), [(64, 2, "x0", 4), (16, 1, "flow", 3), (96, 1, "v", 1)]
)
def test_sampler_graph_of_a_transformer_equals_the_pipeline(
    width: int, depth: int, scheduler: str, count: int
) -> None:
    """Of several heads and of one, with attention that is sure of itself."""
    torch.manual_seed(0)
    decoder = MNIFModel(num_bases=4, width=8, depth=1, cells=4, tokens=2, latent_dim=24).eval()
    _let_latents_matter(decoder, 0.5)
    denoiser = _lively(TransformerDenoiser(24, 4, width, depth, decoder_fingerprint=decoder.fingerprint()))
    for block in denoiser.blocks:
        torch.nn.init.normal_(block.attend.weight, std=2 * width**-0.5)
    pipeline = MNIFPipeline(decoder, denoiser, sampling_scheduler(scheduler))
    pipeline.set_progress_bar_config(disable=True)
    model = sampler_graph(pipeline, linear_scheduler_table(pipeline.scheduler, count), resolution=11)
    check_output_type(model)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert sum(node.op_type == "Softmax" for node in model.graph.node) == count * depth
    np.testing.assert_array_equal(stored["denoiser.positions"], denoiser.positions.detach().numpy())
    for batch in (1, 5):
        noise = initial_noise(0, range(batch), 24)
        start = torch.from_numpy(noise)
        pictures = pipeline(latents=start, num_inference_steps=count, resolution=11, output_type="np").images
        np.testing.assert_allclose((run(model, noise) / 2 + 0.5).clip(0, 1), pictures, atol=1e-4)
        assert pictures.std() > 0.05


def test_the_samples_differ_and_the_denoiser_matters(pipeline: MNIFPipeline) -> None:
    noise = initial_noise(0, range(2), 12)
    values = [run(sampler_graph(pipeline, linear_scheduler_table(pipeline.scheduler, n), 8), noise) for n in (1, 5)]
    assert np.abs(values[0] - values[1]).max() > 1e-3
    assert np.abs(values[1][0] - values[1][1]).max() > 1e-3


def test_weights_are_stored_once_under_their_names(pipeline: MNIFPipeline) -> None:
    model = sampler_graph(pipeline, linear_scheduler_table(pipeline.scheduler, 5), resolution=16)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    parts = {"decoder": pipeline.decoder, "denoiser": pipeline.denoiser}
    weights = {
        f"{part}.{name}": value for part, module in parts.items() for name, value in module.state_dict().items()
    }
    named = {name for name in stored if name.startswith(("decoder.", "denoiser."))}
    assert "denoiser.blocks.1.down.weight" in named
    assert "decoder.coefficient_map.weight" in named
    for name in named:
        np.testing.assert_array_equal(stored[name], weights[name].numpy())
    matrices = sum(array.nbytes for name, array in stored.items() if array.ndim == 2 and "block_" not in name)
    assert matrices <= sum(value.nbytes for value in weights.values())


def test_graphs_are_the_same_every_time(pipeline: MNIFPipeline) -> None:
    steps = linear_scheduler_table(pipeline.scheduler, 3)
    first, second = (sampler_graph(pipeline, steps, 16).SerializeToString() for _ in range(2))
    assert first == second


def test_delta_mixing_stores_the_sines_of_its_first_layer(decoder: MNIFModel) -> None:
    model = decoder_graph(decoder, 16)
    sines = [node for node in model.graph.node if node.op_type == "Sin"]
    assert len(sines) == len(decoder.shapes) - 2
    assert sum(node.op_type == "Gemm" for node in model.graph.node) == len(decoder.bases)


def test_a_resolution_below_one_is_refused(decoder: MNIFModel) -> None:
    with pytest.raises(UserError, match="resolution 0"):
        decoder_graph(decoder, 0)


def test_tolerance_grows_with_what_float32_costs(pipeline: MNIFPipeline) -> None:
    def tolerances(settings: dict[str, object]) -> dict[str, float]:
        torch.manual_seed(0)
        decoder = MNIFModel(resolution=12, num_bases=16, latent_dim=12, mixing="average", cells=1, **settings).eval()
        torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.1)
        pipeline.denoiser.register_to_config(decoder_fingerprint=decoder.fingerprint())
        other = MNIFPipeline(decoder, pipeline.denoiser, pipeline.scheduler)
        other.set_progress_bar_config(disable=True)
        specs = list(Selection(decoder, other, 12, steps=[2], num_baked=1, seed=0).specs())
        assert all(run_error(spec) <= spec.reference.tolerance for spec in specs)
        return {spec.name: spec.reference.tolerance for spec in specs}

    assert tolerances({"omega": 5.0}) == {"decoder": 1e-5, "sampler_2": 1e-4, "baked_0000": 1e-5}
    paper = tolerances({"omega": 30.0, "width": 64, "depth": 3, "output_sine": True})
    assert 1e-5 < paper["decoder"] <= 2e-4


def run_error(spec: GraphSpec) -> float:
    (source,), (exact,) = spec.reference.inputs.values(), spec.reference.outputs.values()
    assert exact.dtype == np.float64
    return float(np.abs(run(spec.model, source) - exact).max())
