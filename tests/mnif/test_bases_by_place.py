"""Bases by place: who takes which, what the map says, and how sets part."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mnif.models.io import load_component, save_component
from mnif.models.lineage import grown, widened
from mnif.models.mnif_model import MNIFModel
from mnif.models.sparse_coefficients import bases_by_place, morton_ranks
from mnif.training.tied_sets import TIED, tie_sets

FORMS: dict[str, dict[str, Any]] = {
    "layer": {},
    "shared": {"coefficient_form": "shared"},
    "direct": {"coefficient_form": "direct", "latent_dim": None},
    "tokens": {"tokens": 2},
    "voxels": {"dimensions": 3, "channels": 1, "cells": 2, "signal": "voxels", "signal_settings": {"resolution": 9}},
}


def model_of(form: str = "layer", **settings: Any) -> MNIFModel:
    """Four bases of twelve for a cell, and latents that matter."""
    torch.manual_seed(0)
    small = {"num_bases": 12, "width": 8, "depth": 1, "latent_dim": 12, "cells": 4, "resolution": 9}
    sparse = {"coefficient_sparsity": 4, "sparsity_rule": "place"}
    model = MNIFModel(**small | sparse | FORMS[form] | settings)
    for name, parameter in model.named_parameters():
        if "coefficient_map." in name:
            torch.nn.init.normal_(parameter, std=0.5)
        elif "bases." in name:  # else they are one set, and it would not matter which a cell takes
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_cells_are_numbered_region_by_region() -> None:
    ranks = morton_ranks(4, 2).view(4, 4)
    assert ranks[:2, :2].flatten().sort().values.tolist() == [0, 1, 2, 3]
    assert ranks[2:, 2:].flatten().sort().values.tolist() == [12, 13, 14, 15]
    for cells, dimensions in ((1, 2), (3, 2), (5, 1), (2, 3)):
        assert morton_ranks(cells, dimensions).sort().values.tolist() == list(range(cells**dimensions))


@pytest.mark.parametrize(("cells", "bases", "active"), [(4, 96, 16), (8, 96, 16), (3, 12, 4), (5, 20, 5)])
def test_every_base_is_taken_and_neighbours_share_some(cells: int, bases: int, active: int) -> None:
    taken = bases_by_place(cells, 2, [bases], [active])
    assert taken.shape == (cells**2, active)
    used = np.bincount(taken.flatten(), minlength=bases)
    assert used.min() > 0
    assert used.max() <= 2 * used.mean()
    for cell in taken.tolist():  # one of each that were tied, so that all cells have one set while they are
        assert sorted(base % active for base in cell) == list(range(active))
    along = taken[morton_ranks(cells, 2).argsort()]
    apart = ((along[1:, 0] - along[:-1, 0]) % bases).float()
    assert apart.max() - apart.min() <= 1  # as evenly as whole numbers can be


def test_later_generations_have_places_of_their_own() -> None:
    taken = bases_by_place(2, 2, [6, 4, 1], [3, 2, 1])
    assert taken.tolist() == [[0, 1, 2, 6, 7, 10], [3, 4, 5, 8, 9, 10], [1, 2, 3, 7, 8, 10], [4, 5, 0, 9, 6, 10]]


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_a_model_by_place_is_the_one_of_all_bases_with_most_of_its_map_zero(form: str) -> None:
    sparse = model_of(form)
    dense = MNIFModel(
        **{k: v for k, v in sparse.config.items() if k[0] != "_"} | {"coefficient_sparsity": None} | FORMS[form]
    )
    latents = torch.randn(3, sparse.config.latent_dim)
    coefficients = sparse.coefficients(latents)
    assert ((coefficients != 0).sum(dim=-1) == 4).all()
    assert torch.equal((coefficients != 0).any(dim=(0, 2)).nonzero()[:, 1].view(-1, 4), sparse.taken.sort().values)
    mapped = latents if sparse.coefficient_map is None else sparse.coefficient_map(latents)
    mapped = mapped.view(3, sparse.num_cells, -1, 4).expand(-1, -1, len(sparse.bases), -1)
    for cell, bases in enumerate(sparse.taken):
        torch.testing.assert_close(coefficients[:, cell, :, bases], mapped[:, cell] / 2)
    for name in ("shared", "means", "bases"):
        getattr(dense, name).load_state_dict(getattr(sparse, name).state_dict())
    torch.testing.assert_close(sparse(latents), dense.decode_coefficients(coefficients, dense.grid()))
    numbers = sum(p.numel() for p in sparse.coefficient_map.parameters()) if sparse.coefficient_map else 0
    if form in ("layer", "shared", "voxels"):
        assert 3 * numbers == sum(parameter.numel() for parameter in dense.coefficient_map.parameters())


def test_bases_begin_as_one_set_and_part_later() -> None:
    torch.manual_seed(0)
    model = MNIFModel(num_bases=12, width=8, latent_dim=6, coefficient_sparsity=4, sparsity_rule="place", resolution=9)
    torch.nn.init.normal_(model.coefficient_map.weight, std=0.5)
    done, optimizer = [0.0], torch.optim.Adam(model.parameters(), 1e-2)
    tie_sets(model, lambda: done[0])
    latents, target = torch.randn(8, 6), torch.rand(8, 9, 9, 3)
    start = model.bases[0].detach().clone()
    for share in (0.0, TIED / 2, TIED - 1e-9):
        done[0] = share
        optimizer.zero_grad()
        (model(latents) - target).square().mean().backward()
        optimizer.step()
    for bases in model.bases:
        assert torch.equal(bases[:4].repeat(3, 1), bases)
    assert not torch.equal(model.bases[0], start)
    done[0] = TIED
    (model(latents) - target).square().mean().backward()
    optimizer.step()
    for bases in model.bases:
        assert not torch.allclose(bases[:4], bases[4:8])


def test_what_is_tied_learns_as_one_set_of_all_cells_would() -> None:
    tied, one = (
        MNIFModel(num_bases=bases, width=8, latent_dim=6, resolution=9, **settings).double()
        for bases, settings in ((12, {"coefficient_sparsity": 4, "sparsity_rule": "place"}), (4, {}))
    )
    order = tied.taken % 4  # a cell's bases, by their number in the set
    with torch.no_grad():
        for name in ("shared", "means"):
            getattr(one, name).load_state_dict(getattr(tied, name).state_dict())
        for ours, theirs in zip(tied.bases, one.bases, strict=True):
            theirs.copy_(ours[:4])
        torch.nn.init.normal_(tied.coefficient_map.weight, std=0.5)
        layers, latents = len(tied.bases), torch.randn(5, 6).double()
        rows = tied.coefficient_map.weight.view(16, layers, 4, 6)
        place = order[:, None, :, None].expand_as(rows)
        one.coefficient_map.weight.copy_(torch.zeros_like(rows).scatter(2, place, rows).view(-1, 6))
    torch.testing.assert_close(tied(latents), one(latents))
    tie_sets(tied, lambda: 0.0)
    for model in (tied, one):
        model(latents).square().mean().backward()
    for ours, theirs in zip(tied.bases, one.bases, strict=True):
        torch.testing.assert_close(3 * ours.grad, theirs.grad.repeat(3, 1))  # a mean of three where the other sums


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_a_grown_model_by_place_leaves_old_latents_as_they_were(form: str) -> None:
    old = model_of(form)
    child = grown(old, 6, 8).eval()
    for name, parameter in child.later.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        assert name
    latents = torch.randn(5, old.config.latent_dim)
    wide = widened(child, latents)
    assert old(latents).numpy().tobytes() == child(wide).numpy().tobytes()
    assert child.active_bases == [4, 2]
    coefficients = child.coefficients(torch.randn_like(wide))
    assert ((coefficients[..., :12] != 0).sum(dim=-1) == 4).all()
    assert ((coefficients[..., 12:] != 0).sum(dim=-1) == 2).all()


def test_a_rule_without_sparse_coefficients_is_no_part_of_a_fingerprint() -> None:
    """`mnif fit` gives every model its rule; one of all bases is what it was before there were any."""
    placed, largest = (model_of(coefficient_sparsity=None, sparsity_rule=rule) for rule in ("place", "largest"))
    assert placed.fingerprint() == largest.fingerprint()
    assert model_of().fingerprint() != model_of(sparsity_rule="largest").fingerprint()


def test_a_model_by_place_is_read_as_it_was_written(tmp_path: Path) -> None:
    model = model_of()
    save_component(tmp_path, "decoder", model)
    loaded = load_component(MNIFModel, tmp_path, "decoder")
    latents = torch.randn(2, 12)
    assert torch.equal(loaded(latents), model(latents))
    assert loaded.fingerprint() == model.fingerprint()
    assert "taken" not in model.state_dict()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"coefficient_sparsity": 5}, "coefficient_sparsity 5: must divide the number of bases, 12"),
        ({"cells": 1}, "coefficient_sparsity 4: makes 12 bases 3 sets, .* there is 1 cell; take more cells"),
        (
            {"cells": 256, "num_bases": 600, "coefficient_sparsity": 300},
            "coefficient_sparsity 300: too many for 65536",
        ),
        ({"sparsity_rule": "some"}, 'sparsity_rule some: choose "place" or "largest"'),
    ],
)
def test_what_does_not_go_together(settings: dict[str, Any], words: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=words):
        model_of(**settings)
