"""Sparse coefficients against NumPy's partition, their gradients by hand, and gathered rows against products.

Those by place are in test_bases_by_place.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from mnif.models.io import load_component, save_component
from mnif.models.mnif_model import MNIFModel
from mnif.models.sparse_coefficients import (
    gathering_pays,
    keep_largest,
    keep_largest_of_each,
    mix_gathered,
    share_of_each,
)
from mnif.utils.errors import UserError

ACTIVE = 5


def sparse_model(**settings: object) -> MNIFModel:
    """A small sparse model whose latents matter."""
    torch.manual_seed(0)
    sizes = {"num_bases": 20, "width": 8, "depth": 1, "latent_dim": 12, "cells": 2, "resolution": 9}
    model = MNIFModel(**sizes | {"coefficient_sparsity": ACTIVE} | settings)
    for name, parameter in model.named_parameters():
        if name.startswith("coefficient_map."):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def next_magnitude(rows: np.ndarray, active: int) -> np.ndarray:
    """The magnitude that comes after the ``active`` largest, [..., 1]."""
    place = rows.shape[-1] - active - 1
    return np.partition(np.abs(rows), place, axis=-1)[..., place : place + 1]


@pytest.mark.parametrize("active", [1, 5, 19])
def test_the_largest_are_kept_and_the_others_are_zero(active: int) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 4, 20))
    threshold = next_magnitude(rows, active)
    faded = rows * (np.abs(rows) - threshold) / (threshold / 32)
    expected = np.where(np.abs(rows) > threshold * (1 + 1 / 32), rows, np.where(np.abs(rows) > threshold, faded, 0))
    kept = keep_largest(torch.from_numpy(rows), active).numpy()
    np.testing.assert_allclose(kept, expected, atol=1e-14)
    assert ((kept != 0).sum(axis=-1) == active).all()


def test_generations_keep_the_largest_of_their_own() -> None:
    assert share_of_each(16, [96, 32, 3, 1]) == [16, 6, 1, 1]
    assert share_of_each(5, [6, 4]) == [5, 4]  # all of four
    rows = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 13)))
    kept = keep_largest_of_each(rows, [6, 4, 3], [2, 4, 1])
    torch.testing.assert_close(kept[:, :6], keep_largest(rows[:, :6], 2))
    assert torch.equal(kept[:, 6:10], rows[:, 6:10])
    assert torch.equal(keep_largest_of_each(1e6 * rows[:, :6], [6], [2]), keep_largest(1e6 * rows[:, :6], 2))
    larger = torch.cat([rows[:, :6], 1e6 * rows[:, 6:]], dim=1)  # what is added does not make the old ones leave
    assert torch.equal(keep_largest_of_each(larger, [6, 4, 3], [2, 4, 1])[:, :6], kept[:, :6])


def test_equals_leave_together_and_order_does_not_matter() -> None:
    row = torch.tensor([3.0, -2.0, 2.0, 1.0, 2.0, 0.0])
    expected = torch.tensor([3.0, 0, 0, 0, 0, 0])
    for order in (torch.arange(6), torch.tensor([4, 0, 5, 2, 1, 3])):
        torch.testing.assert_close(keep_largest(row[order], 2), expected[order])
    assert torch.equal(keep_largest(torch.ones(6), 2), torch.zeros(6))
    few = torch.tensor([0.5, 0.0, -4.0, 0.0, 0.0, 0.0])
    assert torch.equal(keep_largest(few, 2), few)  # nothing comes next


def test_the_gradient_is_that_of_what_is_kept() -> None:
    row = torch.tensor([3.0, -2.0, 1.9375, 0.5, -2.03125], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0], dtype=torch.float64)
    kept = keep_largest(row, 3)  # the next is 1.9375; both others lie more than a thirty-second above it
    (gradient,) = torch.autograd.grad(kept @ weights, row)
    torch.testing.assert_close(gradient, torch.tensor([1, 10, 0, 0, 10000], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(keep_largest(row, 2) @ weights, row)  # the next is -2: the last lies half way
    torch.testing.assert_close(gradient, torch.tensor([1, 0, 0, 0, 5000], dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_of_zeros_can_be_left(dtype: torch.dtype) -> None:
    """A search that starts at zero would never move otherwise."""
    rows = torch.zeros(2, 6, dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(keep_largest(rows, 2).sum(), rows)
    assert torch.equal(gradient, torch.ones_like(rows))


FORMS = {
    "layer": {},
    "shared": {"coefficient_form": "shared"},
    "direct": {"coefficient_form": "direct", "latent_dim": None},
    "tokens": {"tokens": 2},
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_sparse_model_is_the_dense_one_with_fewer_coefficients(form: str) -> None:
    sparse, dense = sparse_model(**FORMS[form]), sparse_model(**FORMS[form], coefficient_sparsity=None)
    latents = torch.randn(3, sparse.config.latent_dim)
    coefficients = sparse.coefficients(latents)
    assert ((coefficients != 0).sum(dim=-1) == ACTIVE).all()
    torch.testing.assert_close(coefficients, keep_largest(dense.coefficients(latents), ACTIVE))
    torch.testing.assert_close(sparse(latents), dense.decode_coefficients(coefficients, dense.grid()))
    assert sparse.fingerprint() != dense.fingerprint()


def test_coefficients_do_not_jump_where_bases_change_places() -> None:
    last = torch.linspace(0.9, 1.1, 100_001, dtype=torch.float64)
    rows = torch.stack([torch.full_like(last, 3), torch.ones_like(last), last], dim=1)
    kept = keep_largest(rows, 2)
    assert kept[0].tolist() == [3, 1, 0]
    assert kept[-1].tolist() == [3, 0, last[-1]]
    assert (kept[1:] - kept[:-1]).abs().max() < 2e-6 * 35  # a step, 32 times as steep


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gathered_rows_make_the_product(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    coefficients, bases = keep_largest(torch.randn(7, 20), ACTIVE), torch.randn(20, 33)
    coefficients[2] = 0
    coefficients[6, 3:] = 0
    gathered = mix_gathered(coefficients.to(dtype), bases.to(dtype))
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gathered, (coefficients @ bases).to(dtype), atol=tolerance, rtol=tolerance)


def test_large_models_are_mixed_by_gathering_unless_a_gradient_is_wanted() -> None:
    assert gathering_pays(4, fields=8, num_bases=128, parameters=1056)
    assert not gathering_pays(4, fields=1, num_bases=20, parameters=72)
    assert not gathering_pays(64, fields=512, num_bases=96, parameters=600)
    model = sparse_model(num_bases=128, width=32, coefficient_sparsity=4)
    latents = torch.randn(5, 12, requires_grad=True)
    product = model.bake(model.coefficients(latents)).params
    with torch.no_grad():
        gathered = model.bake(model.coefficients(latents)).params
        torch.testing.assert_close(gathered, product, atol=1e-5, rtol=1e-5)
        alone = model.bake(model.coefficients(latents[2:3])).params
        torch.testing.assert_close(alone, product[8:12], atol=1e-5, rtol=0)
    (gradient,) = torch.autograd.grad(product.sum(), latents)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coefficient_sparsity": 20}, "coefficient_sparsity 20: must be at least 1 and below .*, 20"),
        ({"coefficient_sparsity": 0}, "coefficient_sparsity 0"),
        ({"mixing": "average"}, 'mixing average: .* "delta"'),
    ],
)
def test_what_does_not_go_together(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sparse_model(**settings)


def test_a_sparse_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = sparse_model()
    save_component(tmp_path, "decoder", model)
    loaded = load_component(MNIFModel, tmp_path, "decoder")
    latents = torch.randn(2, 12)
    assert torch.equal(loaded(latents), model(latents))
    assert loaded.fingerprint() == model.fingerprint()
    path = tmp_path / "decoder/config.json"
    path.write_text(path.read_text().replace('"coefficient_sparsity": 5', '"coefficient_sparsity": 50'))
    with pytest.raises(UserError, match=r"damaged component .*below the number of bases, 20"):
        load_component(MNIFModel, tmp_path, "decoder")
