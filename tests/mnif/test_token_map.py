"""Latents with a place: the map of tokens against PyTorch's convolutions, who hears whom, and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mnif.models.encoders import TokenEncoder
from mnif.models.io import load_component, save_component
from mnif.models.mnif_model import MNIFModel
from mnif.models.token_map import TokenMap
from mnif.utils.errors import UserError

SMALL = {"num_bases": 3, "width": 4, "depth": 1, "resolution": 8}


def model_of(dimensions: int, tokens: int, cells: int, numbers: int, **settings: object) -> MNIFModel:
    """A small model whose latents matter."""
    torch.manual_seed(0)
    sizes = {"latent_dim": tokens**dimensions * numbers, "cells": cells, "tokens": tokens, "dimensions": dimensions}
    model = MNIFModel(**SMALL | sizes | settings)
    assert isinstance(model.coefficient_map, TokenMap)
    for parameter in model.coefficient_map.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("form", ["layer", "shared"])
@pytest.mark.parametrize(("dimensions", "tokens", "cells"), [(1, 3, 6), (2, 3, 3), (2, 2, 6), (3, 2, 4)])
@torch.no_grad()
def test_the_map_is_a_convolution(dimensions: int, tokens: int, cells: int, form: str) -> None:
    numbers, per_token = 5, cells // tokens
    model = model_of(dimensions, tokens, cells, numbers, coefficient_form=form)
    mapping, latents = model.coefficient_map, torch.randn(4, model.config.latent_dim)
    assert isinstance(mapping, TokenMap)
    grid = latents.view(4, *[tokens] * dimensions, numbers).movedim(-1, 1)
    # PyTorch's convolution, with its own padding: kernels [outputs, inputs, 3, ...].
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dimensions - 1]
    kernel = mapping.read.weight.view(-1, *[3] * dimensions, numbers).movedim(-1, 1)
    padded = F.pad(grid, [1, 1] * dimensions, mode="replicate")
    hidden = F.silu(convolve(padded, kernel, mapping.read.bias))
    written = torch.einsum("oh,bh...->bo...", mapping.write.weight, hidden)
    vectors = 1 if form == "shared" else len(model.bases)
    expected = torch.empty(4, *[cells] * dimensions, vectors * 3)
    for cell in torch.cartesian_prod(*[torch.arange(cells)] * dimensions).view(-1, dimensions).tolist():
        token = [place // per_token for place in cell]
        inside = 0
        for place in cell:
            inside = inside * per_token + place % per_token
        of_token = written[(slice(None), slice(None), *token)]
        expected[(slice(None), *cell)] = of_token[:, inside * vectors * 3 : (inside + 1) * vectors * 3]
    expected = expected.flatten(1) + mapping.bias
    expected = (expected / 3**0.5).view(4, cells**dimensions, vectors, 3).expand(-1, -1, len(model.bases), -1)
    torch.testing.assert_close(model.coefficients(latents), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_is_heard_by_its_cells_and_those_around() -> None:
    model = model_of(2, tokens=4, cells=8, numbers=2)
    latents = torch.randn(1, 32)
    other = latents.clone()
    other.view(1, 4, 4, 2)[0, 0, 2] += 1
    changed = (model.coefficients(latents) != model.coefficients(other)).any(dim=3).any(dim=2).view(8, 8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 2:8] = True
    assert torch.equal(changed, expected)


def test_fields_start_as_one_network_and_latents_matter_from_the_first_step() -> None:
    model = MNIFModel(**SMALL, latent_dim=32, tokens=2, cells=4)
    latents = torch.randn(5, 32, requires_grad=True)
    coefficients = model.coefficients(latents)
    assert coefficients.abs().max() < 0.5
    for start in (latents, torch.zeros(5, 32, requires_grad=True)):  # a search may start at zero
        (gradient,) = torch.autograd.grad(model(start).sum(), start)
        assert (gradient != 0).all()


def test_gradients_of_gradients_are_right() -> None:
    """Meta-learning needs them; against finite differences."""
    mapping = model_of(2, tokens=2, cells=4, numbers=2).coefficient_map.double()
    latents = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: mapping(x)[:, ::7], latents)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coefficient_form": "direct", "latent_dim": None}, "coefficient_form direct"),
        ({"coefficient_form": "direct"}, "coefficient_form direct"),
        ({"tokens": 3}, "tokens 3: must divide the cells along each axis, 4"),
        ({"tokens": 8}, "tokens 8: must divide"),
        ({"tokens": 1}, "tokens 1: a place needs 2 tokens"),
        ({"latent_dim": 30}, "latent_dim 30: 4 tokens share it evenly; a multiple of 4 is needed"),
        ({"dimensions": 8, "latent_dim": 1 << 16, "tokens": 4, "resolution": 4}, "too many on 8 axes"),
    ],
)
def test_what_does_not_go_together(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MNIFModel(**SMALL | {"latent_dim": 32, "tokens": 2, "cells": 4} | settings)


def test_folders_from_before_tokens_load_with_the_fingerprint_that_they_had(tmp_path: Path) -> None:
    model = MNIFModel(resolution=16, num_bases=6, width=8, depth=1, latent_dim=12, cells=2)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    save_component(tmp_path, "decoder", model)
    path = tmp_path / "decoder/config.json"
    config = json.loads(path.read_text())
    assert config.pop("tokens") is config.pop("coefficient_sparsity") is None
    path.write_text(json.dumps(config))
    loaded = load_component(MNIFModel, tmp_path, "decoder")
    assert loaded.fingerprint() == "baef9579595e096eccdf446948cf46b2073b2331715510cbf8d83d51bc8d1c6e"
    assert model.fingerprint() == loaded.fingerprint()


def test_a_model_of_tokens_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = model_of(2, tokens=2, cells=4, numbers=3)
    save_component(tmp_path, "decoder", model)
    names = {name for name in load_file(tmp_path / "decoder/diffusion_pytorch_model.safetensors") if "map" in name}
    assert names == {f"coefficient_map.{name}" for name in ("read.weight", "read.bias", "write.weight", "bias")}
    loaded = load_component(MNIFModel, tmp_path, "decoder")
    latents = torch.randn(2, 12)
    assert torch.equal(loaded(latents), model(latents))
    assert loaded.fingerprint() == model.fingerprint()
    path = tmp_path / "decoder/config.json"
    path.write_text(path.read_text().replace('"tokens": 2', '"tokens": 4'))
    with pytest.raises(UserError, match=r"damaged component .*a multiple of 16"):
        load_component(MNIFModel, tmp_path, "decoder")


@pytest.mark.parametrize(("dimensions", "resolution"), [(1, 50), (2, [18, 25]), (3, 10)])
@torch.no_grad()
def test_the_encoder_gives_normalised_tokens_that_ignore_the_batch(
    dimensions: int, resolution: int | list[int]
) -> None:
    torch.manual_seed(0)
    count = 3**dimensions
    encoder = TokenEncoder(2, resolution, 4 * count, dimensions, tokens=3, width=32).eval()
    sizes = [resolution] * dimensions if isinstance(resolution, int) else resolution
    values = torch.rand(5, *sizes, 2) * 2 - 1
    latents = encoder(values)
    assert latents.shape == (5, 4 * count)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(latents.var(dim=1, correction=0), torch.ones(5), atol=1e-2, rtol=0)
    torch.testing.assert_close(encoder(values[2:3]), latents[2:3], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=f"{count} tokens share it evenly"):
        TokenEncoder(2, resolution, 4 * count + 1, dimensions, tokens=3)
    mask = (torch.rand(5, *sizes) < 0.5).float()
    hidden = values * mask[..., None] + 7 * (1 - mask[..., None])
    torch.testing.assert_close(encoder(values, mask), encoder(hidden, mask))
