"""What half precision and fewer bits cost, on a field that was really fitted."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from export.device.reference_evaluator import evaluate
from export.device.verify import psnr
from export.graphs.fields import baked_graph, decoder_graph
from export.graphs.precision import convert, hidden_products, quantize_matrix, quantize_weights
from export.graphs.sampler import sampler_graph
from export.graphs.specs import run
from latent_prior.denoisers import Denoiser, ResMLPDenoiser, TransformerDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.scheduler_table import linear_scheduler_table
from mnif.models.cell_grid import cell_grid
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField, layer_shapes, siren_params
from tests.fakes.onnx_rules import DENOISER, FIELDS, PRECISION, check_output_type


@pytest.fixture(scope="module")
def fit() -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """A SIREN of 5×32 with w0 = 30, the coordinates of a picture, and the picture it was fitted to."""
    torch.manual_seed(0)
    shapes = layer_shapes(2, 3, 32, 3)
    rows = [siren_params(shape, 1, 30.0, first=i == 0, sine=i < 4) for i, shape in enumerate(shapes)]
    parameters = torch.cat(rows, dim=1).requires_grad_()
    coordinates = cell_grid(20, 1, 0.0).coordinates
    x, y = coordinates[0].T
    waves = [torch.sin(5 * x + 2 * y), torch.cos(7 * x * y), torch.tanh(4 * (x**2 + y**2 - 0.5))]
    picture = 0.8 * torch.stack(waves, dim=-1)[None]
    weights = torch.full(coordinates.shape[:2], 1 / coordinates.shape[1])
    optimiser = torch.optim.Adam([parameters])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-2, total_steps=250)
    for _ in range(250):
        loss = BakedField(shapes, parameters).errors(coordinates, picture, weights).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    field = BakedField(shapes, parameters.detach())
    return baked_graph(field), coordinates.numpy(), picture.numpy()


def all_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with float16 from end to end."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    (source,), (result,) = half.graph.input, half.graph.output
    for node in half.graph.node:
        node.input[:] = ["first" if name == source.name else name for name in node.input]
        node.output[:] = ["last" if name == result.name else name for name in node.output]
    nodes = [helper.make_node("Cast", [source.name], ["first"], to=TensorProto.FLOAT16), *half.graph.node]
    nodes.append(helper.make_node("Cast", ["last"], [result.name], to=TensorProto.FLOAT))
    del half.graph.node[:]
    half.graph.node.extend(nodes)
    return half


def test_mixed_keeps_a_fit_that_half_precision_spoils(fit: tuple[onnx.ModelProto, np.ndarray, np.ndarray]) -> None:
    model, coordinates, picture = fit

    def quality(model: onnx.ModelProto) -> float:
        onnx.checker.check_model(model, full_check=True)
        return psnr(evaluate(model, {"coordinates": coordinates})["values"], picture)

    full, mixed, half = quality(model), quality(convert(model, "mixed", "fp16")), quality(all_half(model))
    assert full > 45
    assert mixed > full - 0.1
    assert half < mixed - 0.5


def test_first_layer_biases_and_sines_stay_in_float32(pipeline: MNIFPipeline) -> None:
    steps = linear_scheduler_table(pipeline.scheduler, 2)
    field = pipeline.decoder.bake(pipeline.decoder.coefficients(torch.zeros(1, 12)))
    for model in (sampler_graph(pipeline, steps, 9), decoder_graph(pipeline.decoder, 9), baked_graph(field)):
        mixed = convert(model, "mixed", "fp16")
        check_output_type(mixed, FIELDS | DENOISER | PRECISION)
        assert hidden_products(mixed) == hidden_products(model)
        known = shape_inference.infer_shapes(mixed, strict_mode=True).graph
        kinds = {value.name: value.type.tensor_type.elem_type for value in (*known.value_info, *known.output)}
        kinds |= {tensor.name: tensor.data_type for tensor in known.initializer}
        halves = set()
        for node in mixed.graph.node:
            if node.op_type != "Cast" and TensorProto.FLOAT16 in {kinds.get(name) for name in node.input}:
                assert kinds[node.output[0]] == TensorProto.FLOAT16
                halves.add(node.name)
        assert halves == set(hidden_products(mixed))
        assert not {name for name in halves if name.startswith("layer_0")}
        assert {name.split("/")[0] for name in halves} >= {"layer_1", "layer_2"}


@pytest.fixture(scope="module")
def large() -> MNIFPipeline:
    """Matrices large enough to be stored in fewer bits."""
    torch.manual_seed(0)
    decoder = MNIFModel(resolution=8, num_bases=32, width=16, depth=1, latent_dim=64, cells=2, mixing="average").eval()
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.05)
    denoiser = ResMLPDenoiser(latent_dim=64, width=128, depth=1, decoder_fingerprint=decoder.fingerprint()).eval()
    return _pipeline_of(decoder, denoiser)


@pytest.fixture(scope="module")
def over_tokens() -> MNIFPipeline:
    """Likewise, of a transformer."""
    torch.manual_seed(0)
    decoder = MNIFModel(resolution=8, num_bases=32, width=16, depth=1, latent_dim=64, cells=2, tokens=2).eval()
    torch.nn.init.normal_(decoder.coefficient_map.write.weight, std=0.05)
    denoiser = TransformerDenoiser(64, 4, 96, 1, decoder_fingerprint=decoder.fingerprint()).eval()
    return _pipeline_of(decoder, denoiser)


def _pipeline_of(decoder: MNIFModel, denoiser: Denoiser) -> MNIFPipeline:
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return MNIFPipeline(decoder, denoiser, sampling_scheduler("x0"))


@pytest.mark.parametrize(("storage", "bytes_per_number", "least"), [("fp16", 2, 75.0), ("int8", 1, 50.0)])
@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_fewer_bits_make_a_smaller_file_of_nearly_the_same_values(
    large: MNIFPipeline, precision: str, storage: str, bytes_per_number: int, least: float
) -> None:
    model = sampler_graph(large, linear_scheduler_table(large.scheduler, 3), 8)
    small = convert(model, precision, storage)
    check_output_type(small, FIELDS | DENOISER | PRECISION)
    noise = {"noise": np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)}
    exact = evaluate(model, noise)["values"]
    assert least < psnr(evaluate(small, noise)["values"], exact) < 120
    assert psnr(run(small, noise)["values"], exact) > least

    stored_as = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in small.graph.initializer}
    assert stored_as["denoiser.blocks.0.up.weight"].itemsize == bytes_per_number
    assert stored_as["decoder.coefficient_map.weight"].itemsize == bytes_per_number
    assert stored_as["denoiser.read.weight"] == stored_as["denoiser.write.weight"] == np.float16
    assert stored_as["decoder.bases.1"] == np.float16
    assert stored_as["decoder.bases.0"] == np.float32  # of the first layer


@pytest.mark.parametrize(("storage", "least"), [("fp16", 75.0), ("int8", 50.0)])
def test_products_of_a_transformer_in_half_precision(over_tokens: MNIFPipeline, storage: str, least: float) -> None:
    """Scores and what is heard are products too; the shares in between are counted in float32."""
    model = sampler_graph(over_tokens, linear_scheduler_table(over_tokens.scheduler, 2), 8)
    mixed = convert(model, "mixed", storage)
    check_output_type(mixed, FIELDS | DENOISER | PRECISION)
    noise = {"noise": np.random.default_rng(0).standard_normal((3, 64), dtype=np.float32)}
    assert least < psnr(evaluate(mixed, noise)["values"], evaluate(model, noise)["values"]) < 120
    known = shape_inference.infer_shapes(mixed, strict_mode=True).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in known.value_info}
    for name in ("scores", "heard", "attend", "merge", "up", "down"):
        assert f"step_1/block_0/{name}" in hidden_products(model)
    for node in mixed.graph.node:
        if node.op_type in ("Softmax", "ReduceMean", "Sigmoid"):
            assert {kinds[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    stored_as = {tensor.name: numpy_helper.to_array(tensor).dtype for tensor in mixed.graph.initializer}
    assert stored_as["denoiser.blocks.0.attend.weight"] == {"fp16": np.float16, "int8": np.int8}[storage]


def test_full_storage_changes_nothing(large: MNIFPipeline) -> None:
    model = decoder_graph(large.decoder, 8)
    assert quantize_weights(model, "fp32") == convert(model, "fp32", "fp32") == model


def test_quantised_matrices_are_within_half_a_step() -> None:
    matrix = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32) * np.logspace(-3, 3, 5)[:, None]
    matrix = np.vstack([matrix, np.zeros((1, 7))]).astype(np.float32)
    integers, scale = quantize_matrix(matrix)
    assert integers.dtype == np.int8
    assert np.abs(integers).max(axis=1).tolist() == [127] * 5 + [0]
    assert (np.abs(integers * scale[:, None] - matrix) <= 0.501 * scale[:, None]).all()


def test_the_evaluator_counts_as_onnx_does() -> None:
    random = np.random.default_rng(0)
    left, right = random.standard_normal((4, 33)), random.standard_normal((9, 33))
    ends = [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [4, 33])]
    ends.append(helper.make_tensor_value_info("y", TensorProto.FLOAT16, [4, 9]))
    weights = [numpy_helper.from_array(right.astype(np.float16), "w")]
    product = helper.make_node("Gemm", ["x", "w"], ["y"], transB=1, alpha=0.5)
    graph = helper.make_graph([product], "g", ends[:1], ends[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    inputs = {"x": left.astype(np.float16)}
    ours, (theirs,) = evaluate(model, inputs)["y"], ReferenceEvaluator(model).run(None, inputs)
    assert ours.dtype == theirs.dtype == np.float16
    np.testing.assert_allclose(ours.astype(np.float64), theirs.astype(np.float64), rtol=2e-3)
