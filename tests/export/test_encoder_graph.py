"""The encoder's graph against the model: latents, coefficients, and what of the observation they miss."""

import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export.commands.export import ExportArguments
from export.device.backends import OpenVinoGraph
from export.device.reference_evaluator import evaluate
from export.graphs.encoder import GridEncoder, encoder_graph, encoder_spec
from export.graphs.precision import convert, hidden_products
from export.graphs.specs import make_variants
from mnif.latents.patches import patches_of, residuals_in_patches
from mnif.models.encoders import PatchEncoder, TokenEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.utils.pixels import as_axes
from tests.fakes.onnx_rules import DENOISER, ENCODER, FIELDS, PRECISION, check_output_type, run

PATCHES = {"patches": 2, "patch_width": 16, "patch_features": 8, "width": 24}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "pictures": ({"resolution": 16, "cells": 2}, PATCHES),
    "pictures that patches and cells do not divide": (
        {"resolution": [13, 18], "cells": 4, "channels": 4},
        PATCHES | {"patches": 4},
    ),
    "grey pictures in one cell": ({"resolution": 9, "cells": 1, "channels": 1}, PATCHES),
    "tokens": ({"resolution": 16, "cells": 4, "tokens": 2, "latent_dim": 16}, {"patch_width": 16, "width": 64}),
    "tokens of voxels": (
        {"resolution": 7, "dimensions": 3, "channels": 1, "cells": 2, "tokens": 2, "signal": "voxels"}
        | {"latent_dim": 16, "signal_settings": {"resolution": 7}},
        {"patch_width": 16, "width": 64, "depth": 1},
    ),
    "voxels": (
        {"resolution": 6, "dimensions": 3, "channels": 1, "cells": 2, "mixing": "average", "signal": "voxels"}
        | {"signal_settings": {"resolution": 6}},
        PATCHES,
    ),
}


def make(form: str) -> tuple[GridEncoder, MNIFModel]:
    of_decoder, of_encoder = FORMS[form]
    torch.manual_seed(0)
    decoder = MNIFModel(**{"num_bases": 4, "width": 8, "depth": 1, "latent_dim": 6} | of_decoder).eval()
    shared = {name: decoder.config[name] for name in ("channels", "resolution", "latent_dim", "dimensions")}
    tokens = decoder.config.tokens
    encoder = TokenEncoder(**shared, **of_encoder, tokens=tokens) if tokens else PatchEncoder(**shared, **of_encoder)
    for parameter in (*encoder.parameters(), *decoder.coefficient_map.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)  # positions, gains and offsets matter too
    return encoder.eval(), decoder


def observed(decoder: MNIFModel, count: int) -> dict[str, np.ndarray]:
    """Values and masks; the first instance is seen whole, of the last nothing at all is seen if there are three."""
    random, axes = np.random.default_rng(count), decoder.grid().axes
    shape = (count, *(len(first) for first, _, _ in axes))
    mask = (random.random(shape) < 0.6).astype(np.float32)
    mask[0] = 1
    mask[2:3] = 0
    values = random.uniform(-1, 1, (*shape, decoder.config.channels)).astype(np.float32)
    return {"values": values, "mask": mask}


def mean_squares(decoded: np.ndarray, values: np.ndarray, mask: np.ndarray, cells: int) -> np.ndarray:
    """[cells^d] of one instance, pixel by pixel: a pixel is in the cell that its centre is in."""
    sums, counts = np.zeros((2, *[cells] * mask.ndim))
    for pixel in product(*map(range, mask.shape)):
        cell = tuple(int((r + 0.5) / n * cells) for r, n in zip(pixel, mask.shape, strict=True))
        sums[cell] += mask[pixel] * np.mean((decoded[pixel].astype(np.float64) - values[pixel]) ** 2)
        counts[cell] += mask[pixel]
    return np.where(counts > 0, sums / np.maximum(counts, 1), 0).ravel()


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_the_graph_is_the_model(form: str) -> None:
    encoder, decoder = make(form)
    patches = patches_of(as_axes(decoder.config.resolution, decoder.config.dimensions))
    model = encoder_graph(encoder, decoder, patches)
    check_output_type(model, FIELDS | DENOISER | ENCODER)
    openvino = OpenVinoGraph(model.SerializeToString(), threads=1)
    for count in (1, 4):
        inputs = observed(decoder, count)
        values, mask = (torch.from_numpy(each) for each in inputs.values())
        latents = encoder(values, mask)
        predictions = decoder(latents, values.shape[1:-1])
        by_patch, decoded = residuals_in_patches(values, predictions, patches), predictions.numpy()
        cells = decoder.config.cells
        by_cell = [mean_squares(*each, cells) for each in zip(decoded, *inputs.values(), strict=True)]
        seen = inputs["mask"].reshape(count, -1)
        squares = np.square(decoded - inputs["values"]).mean(axis=-1).reshape(count, -1) * seen
        whole = squares.sum(axis=1) / np.maximum(seen.sum(axis=1), 1)
        coefficients = decoder.coefficients(latents)
        fields = decoder.bake(coefficients).params.view(count, decoder.num_cells, -1)
        expected = [latents.numpy(), coefficients.numpy(), fields.numpy(), np.stack(by_cell), whole, by_patch.numpy()]
        backends = [run(model, inputs), list(evaluate(model, inputs).values())]
        for answers in backends if count == 1 else [*backends, openvino(inputs)]:
            for answer, wanted in zip(answers, expected, strict=True):
                np.testing.assert_allclose(answer, wanted, atol=2e-5, rtol=1e-5)
        assert count == 1 or latents.std(dim=0).mean() > 0.1  # different observations, different latents


@torch.no_grad()
@pytest.mark.parametrize("form", ["pictures", "tokens"])
def test_what_was_not_seen_changes_nothing(form: str) -> None:
    encoder, decoder = make(form)
    model, inputs = encoder_graph(encoder, decoder), observed(decoder, 2)
    hidden = inputs["mask"][..., None] == 0
    assert hidden.any()
    other = inputs | {"values": np.where(hidden, np.float32(0.9), inputs["values"])}
    for first, second in zip(run(model, inputs), run(model, other), strict=True):
        np.testing.assert_array_equal(first, second)


@torch.no_grad()
@pytest.mark.parametrize("form", ["pictures", "tokens of voxels"])
def test_mixed_precision_keeps_the_first_layer_and_all_but_products(form: str) -> None:
    encoder, decoder = make(form)
    spec = encoder_spec(encoder, decoder, torch.randn(3, decoder.config.latent_dim), seed=0)
    mixed = convert(spec.model, "mixed", "fp16")
    check_output_type(mixed, FIELDS | DENOISER | ENCODER | PRECISION)
    half = set(hidden_products(mixed))
    products = {node.name for node in spec.model.graph.node if node.op_type in ("MatMul", "Gemm")}
    own = {name for name in products if name.startswith("encoder/")}
    assert {name for name in half if name.startswith("encoder/")} == own - {"encoder/read"}
    assert not {name for name in half if name.startswith(("residuals/", "coefficients/", "tokens/"))}
    assert spec.reference is not None
    exact = spec.reference.outputs
    for name, answer in evaluate(mixed, spec.reference.inputs).items():
        assert 0 < np.abs(answer - exact[name]).max() < 0.01 * max(1, np.abs(exact[name]).max()), name


LARGE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "patches": ({}, PATCHES | {"patch_features": 16, "width": 64}, "mix_residual"),
    "tokens": ({"cells": 4, "tokens": 2}, {"patch_width": 16, "width": 256, "depth": 1}, "blocks.0.up"),
}


@torch.no_grad()
@pytest.mark.parametrize("form", LARGE)
def test_hidden_matrices_and_the_map_are_stored_in_int8(form: str) -> None:
    of_decoder, of_encoder, hidden = LARGE[form]
    torch.manual_seed(0)
    decoder = MNIFModel(resolution=16, num_bases=16, width=8, depth=1, latent_dim=64, **{"cells": 2} | of_decoder)
    kind = TokenEncoder if of_decoder else PatchEncoder
    tokens = {"tokens": 2} if of_decoder else {}
    encoder = kind(3, 16, latent_dim=64, **of_encoder, **tokens).eval()
    spec = encoder_spec(encoder, decoder.eval(), torch.randn(3, 64), seed=0)
    whole, _ = make_variants(spec, ["fp32", "mixed"], "fp32")
    for variant in make_variants(spec, ["fp32", "mixed"], "int8"):
        assert variant.psnr is not None
        assert 45 < variant.psnr < 100
        assert variant.model.ByteSize() < 0.6 * whole.model.ByteSize()
        stored = {each.name: each.data_type for each in variant.model.graph.initializer}
        assert stored[f"encoder.{hidden}.weight"] == onnx.TensorProto.INT8
        of_map = "coefficient_map.write" if of_decoder else "coefficient_map"
        assert stored[f"decoder.{of_map}.weight"] == onnx.TensorProto.INT8
        writes = [name for name in stored if re.match(r"encoder\.(mix_out|skip|write)\.", name)]
        assert writes
        assert onnx.TensorProto.INT8 not in {stored[name] for name in writes}


def test_the_storage_of_the_encoder_is_its_own() -> None:
    asked = ExportArguments(model=Path("model"), output_dir=Path("bundle"), encoder=True, encoder_storage="int8")
    assert asked.precisions_for("encoder") == (["fp32", "mixed"], "int8")
    assert asked.precisions_for("decoder") == (["fp32", "mixed"], None)
    assert replace(asked, encoder_storage=None).precisions_for("encoder") == asked.precisions_for("decoder")


def test_weights_bear_the_names_of_the_model() -> None:
    encoder, decoder = make("tokens")
    stored = {tensor.name for tensor in encoder_graph(encoder, decoder).graph.initializer}
    assert {f"encoder.{name}" for name in encoder.state_dict()} <= stored
    assert "decoder.coefficient_map.read.weight" in stored


def test_large_grids_come_in_small_batches() -> None:
    encoder, decoder = make("pictures")
    spec = encoder_spec(encoder, decoder, torch.randn(3, 6), seed=0)
    assert spec.profile["values"]["maximum"] == (64, 16, 16, 3)
    assert spec.profile["mask"]["maximum"] == (64, 16, 16)
    assert spec.reference is not None
    assert len(spec.reference.inputs["values"]) == 3
    large = PatchEncoder(3, 600, 6, patches=2, patch_width=2, patch_features=2, width=2).eval()
    wide = MNIFModel(resolution=600, num_bases=1, width=2, depth=0, latent_dim=6, cells=2).eval()
    spec = encoder_spec(large, wide, torch.randn(3, 6), seed=0)
    assert spec.profile["values"]["maximum"][0] == 3
    assert spec.reference is not None
    assert len(spec.reference.inputs["values"]) == 1
    assert isinstance(spec.model, onnx.ModelProto)
