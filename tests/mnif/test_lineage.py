"""Generations of a model: what a growth leaves as it was, to the last bit, and how an earlier one is had back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mnif.commands.lineage import _generation
from mnif.data.batches import array_dataset
from mnif.latents.inner_loop import InnerLoop
from mnif.latents.table import LatentTable
from mnif.models.encoders import PatchEncoder, TokenEncoder
from mnif.models.io import load_component, save_component
from mnif.models.lineage import ancestor, fingerprints, freeze_earlier, grown, lengthened, places, widened
from mnif.models.mnif_model import MNIFModel
from mnif.models.sparse_coefficients import keep_largest
from mnif.signals.image import Image
from mnif.training.methods import EncoderMethod, make_optimizers
from mnif.training.replay import Replay
from mnif.utils.errors import UserError

FORMS: dict[str, dict[str, Any]] = {
    "layer": {},
    "average": {"mixing": "average"},
    "shared": {"coefficient_form": "shared"},
    "direct": {"coefficient_form": "direct", "latent_dim": None},
    "tokens": {"cells": 4, "tokens": 2, "latent_dim": 16},
    "sparse": {"coefficient_sparsity": 2},
    "by place": {"coefficient_sparsity": 2, "sparsity_rule": "place"},
    "sparse, direct": {"coefficient_sparsity": 2, "coefficient_form": "direct", "latent_dim": None},
}


def model_of(form: str = "layer", **settings: Any) -> MNIFModel:
    torch.manual_seed(1)
    small = {"resolution": 16, "num_bases": 6, "width": 8, "depth": 1, "latent_dim": 12, "cells": 2}
    return let_latents_matter(MNIFModel(**small | FORMS[form] | settings)).eval()


def let_latents_matter(model: MNIFModel) -> MNIFModel:
    for name, parameter in model.named_parameters():
        if "coefficient_map" in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def generation(fingerprint: str = "", frozen: bool = True) -> dict[str, Any]:
    texts = dict.fromkeys(("data", "data_fingerprint", "command", "version"), "words")
    return {"fingerprint": fingerprint, "frozen": frozen, "figures": {}, **texts}


def child_of(model: MNIFModel, bases: int = 5, numbers: int = 8, frozen: bool = True) -> MNIFModel:
    child = let_latents_matter(grown(model, bases, numbers)).eval()
    child.load_state_dict(model.state_dict(), strict=False)
    earlier = [*model.config.lineage] or [generation()]
    earlier[-1] = {**earlier[-1], "fingerprint": model.fingerprint()}
    child.register_to_config(lineage=[*earlier, generation(frozen=frozen)])
    return child


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_old_latents_decode_to_the_same_bytes_after_two_growths(form: str, dtype: torch.dtype) -> None:
    old = model_of(form)
    child = child_of(old)
    grandchild = child_of(child, 3, 4)
    latents = torch.randn(7, old.config.latent_dim)
    points = torch.rand(1, 9, 2) * 2 - 1
    models = [model.to(dtype) for model in (old, child, grandchild)]
    for batch in (latents[:1], latents):
        wide = [batch.to(dtype), *(widened(model, batch).to(dtype) for model in models[1:])]
        grids = [model(some, 24).float().numpy().tobytes() for model, some in zip(models, wide, strict=True)]
        assert len(set(grids)) == 1
        at_points = [m.values_at(m.coefficients(z), points.to(dtype)) for m, z in zip(models, wide, strict=True)]
        assert torch.equal(at_points[0], at_points[1])
        assert torch.equal(at_points[0], at_points[2])


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_further_numbers_and_bases_make_what_plain_sums_make(form: str) -> None:
    child = child_of(model_of(form)).double()
    latents = torch.randn(3, child.config.latent_dim).double()
    (growth,), (count, added) = child.later, child.mapped_bases
    apart = latents.view(3, child.num_tokens, -1)
    first, numbers = (part.flatten(1) for part in apart.split(child.latent_parts, dim=2))
    old = first if child.coefficient_map is None else child.coefficient_map(first)
    old = old.view(3, child.num_cells, -1, count)
    if growth.coefficient_map is None:
        new = numbers.view(*old.shape[:-1], added)
    else:
        presence = numbers.square().mean(dim=1).view(3, 1, 1)
        earlier, own = (part.view(3, child.num_tokens, -1) for part in (first, numbers))
        mixed = presence * (earlier @ growth.earlier_map.weight.mT)
        heard = torch.cat([own, mixed, presence * torch.ones_like(own[..., :1])], dim=2).flatten(1)
        said = growth.coefficient_map(heard).view(*old.shape[:-1], count + added)
        old, new = old + said[..., :count], said[..., count:]
    if form.startswith("sparse"):
        old, new = (keep_largest(part, 2) for part in (old, new))  # a third of each, rounded up
    expected = torch.cat([old, new], dim=3)
    if form == "by place":
        taken = child.taken[:, None].expand_as(expected)
        expected = torch.zeros(*expected.shape[:3], 11, dtype=torch.float64).scatter(3, taken, expected)
    expected = (expected / count**0.5).expand(-1, -1, len(child.bases), -1)
    coefficients = child.coefficients(latents)
    torch.testing.assert_close(coefficients, expected)
    start = 0
    for layer, shape in zip(child.mixed_layers, child.shapes[-len(child.bases) :], strict=True):
        mixed = layer - child.mixed_layers[0]
        every = torch.cat([child.bases[mixed], growth.bases[mixed]])
        rows = coefficients.flatten(0, 1)[:, mixed] @ every + (child.means[mixed] if child.means else 0)
        start = sum(one.parameters for one in child.shapes[:layer])
        params = child.bake(coefficients).params[:, start : start + shape.parameters]
        torch.testing.assert_close(params, rows)


@pytest.mark.parametrize("form", FORMS)
def test_an_earlier_generation_is_had_back_with_its_fingerprint(form: str, tmp_path: Path) -> None:
    old = model_of(form)
    child = child_of(old)
    save_component(tmp_path, "decoder", child_of(child, 3, 4))
    grandchild = load_component(MNIFModel, tmp_path, "decoder")
    known = [old.fingerprint(), child.fingerprint(), grandchild.fingerprint()]
    assert fingerprints(grandchild) == known
    assert len(set(known)) == 3
    for number, model in enumerate((old, child)):
        back = ancestor(grandchild, number)
        assert back.fingerprint() == known[number]
        assert {**back.config, "lineage": (), "growths": [*back.config.growths]}.items() >= {
            **{name: value for name, value in model.config.items() if not name.startswith("_")},
            **{"lineage": (), "growths": [*model.config.growths]},
        }.items()


def test_generations_that_replay_has_moved_are_not_had_back() -> None:
    child = child_of(model_of(), frozen=False)
    assert fingerprints(child)[0] == child.config.lineage[0]["fingerprint"]
    with pytest.raises(UserError, match="its bases moved when the model was grown by words with --replay"):
        ancestor(child, 0)


def test_a_model_that_was_not_grown_is_what_it_was() -> None:
    model = model_of()
    assert fingerprints(model) == [model.fingerprint()]
    assert not [name for name in model.state_dict() if name.startswith("later")]
    torch.manual_seed(0)  # the fingerprint of an earlier version
    earlier = MNIFModel(resolution=8, num_bases=2, width=4, depth=0, latent_dim=3, cells=1)
    assert set(earlier.state_dict()) == {
        *("shared.0", "means.0", "bases.0", "coefficient_map.weight", "coefficient_map.bias")
    }


@pytest.mark.parametrize(
    ("form", "bases", "numbers", "reason"),
    [("tokens", 4, 6, "4 tokens share it evenly"), ("layer", 1, -20, "cannot be shared out so")],
)
def test_growths_that_cannot_be(form: str, bases: int, numbers: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        grown(model_of(form), bases, numbers)


def test_tables_of_the_parent_are_taken_and_those_of_strangers_and_children_are_not(tmp_path: Path) -> None:
    old = model_of()
    child, stranger = child_of(old), child_of(model_of(width=9))
    latents, ids = torch.randn(4, 12), list("abcd")
    held_out = torch.tensor([False, True, False, False])
    LatentTable.of(old, latents, ids, held_out, "data").save(tmp_path / "old")
    LatentTable.of(child, torch.randn(4, 20), ids, held_out, "data").save(tmp_path / "child")
    table = LatentTable.load_for(child, tmp_path / "old")
    assert torch.equal(table.latents, widened(child, latents))
    assert (table.fingerprint, table.ancestors) == (child.fingerprint(), (old.fingerprint(),))
    assert LatentTable.load_for(child, tmp_path / "child").ancestors == (old.fingerprint(),)
    with pytest.raises(UserError, match=f"which was grown from the one at hand .{old.fingerprint()[:12]}"):
        LatentTable.load_for(old, tmp_path / "child")
    for path in ("old", "child"):
        with pytest.raises(UserError, match="these latents belong to decoder"):
            LatentTable.load_for(stranger, tmp_path / path)
    LatentTable(latents[:, :9], ids, held_out, old.fingerprint(), "data").save(tmp_path / "short")
    with pytest.raises(UserError, match="latents of 9 numbers; the decoder's have 12"):
        LatentTable.load_for(child, tmp_path / "short")


@torch.no_grad()
def test_networks_for_latents_are_lengthened_around_what_they_were() -> None:
    child, tokens = child_of(model_of()), child_of(model_of("tokens"))
    encoder = lengthened(before := PatchEncoder(resolution=16, latent_dim=12, width=8), child)
    assert torch.equal(encoder.mix_out.weight[:12], before.mix_out.weight)
    assert torch.equal(encoder.patch_network.read.weight, before.patch_network.read.weight)
    of_tokens = lengthened(read := TokenEncoder(resolution=16, latent_dim=16, tokens=2, width=16), tokens)
    assert torch.equal(of_tokens.write.weight[:4], read.write.weight)
    loop = lengthened(rates := InnerLoop(16), tokens)
    assert torch.equal(loop.rates[places(tokens, 16)], rates.rates)
    assert places(tokens, 16).tolist() == [0, 1, 2, 3, 6, 7, 8, 9, 12, 13, 14, 15, 18, 19, 20, 21]


def method_of(child: MNIFModel) -> EncoderMethod:
    return EncoderMethod(child, Image(16, 3), PatchEncoder(resolution=16, latent_dim=20, width=8), 0.0)


def step_of(child: MNIFModel, replay: Replay | None, method: EncoderMethod) -> None:
    rows = array_dataset({"images": torch.randint(0, 255, (4, 16, 16, 3), dtype=torch.uint8)})
    (batch,) = rows.batches(4)
    (replay or method)(key=torch.arange(4), **batch).backward()
    optimizers = make_optimizers(method, 1e-2, 1e-2, 0.99, use_muon=True, earlier_rate=0.1)
    for optimizer in optimizers:
        optimizer.step()


def test_what_is_frozen_does_not_move_and_what_is_new_does() -> None:
    old = model_of()
    child = child_of(old)
    before = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    freeze_earlier(child)
    step_of(child, None, method_of(child))
    for name, tensor in child.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("later."), name
    assert fingerprints(child)[0] == old.fingerprint()


def test_replay_weighs_what_was_forgotten_and_moves_old_bases_less() -> None:
    old = model_of()
    child = child_of(old, frozen=False)
    method, latents = method_of(child), torch.randn(5, 12)
    replay = Replay(method, old, latents, weight=2.0, earlier_rate=0.1)
    assert replay.forgotten(torch.arange(6)).item() == 0.0  # nothing has moved
    before = {name: tensor.clone() for name, tensor in child.state_dict().items()}
    step_of(child, replay, method)
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in child.state_dict().items()}
    assert 0 < moved["bases.0"] < moved["later.0.bases.0"]
    torch.manual_seed(0)
    forgotten = replay.forgotten(torch.arange(6))
    assert forgotten > 0
    assert not [name for name in replay.state_dict() if "before" in name or name == "latents"]


def test_names_of_generations() -> None:
    lineage: Any = [generation("abc1"), generation("abd2"), generation("ffff")]
    assert _generation(lineage, "0") == _generation(lineage, "abc") == 0
    for name in ("ab", "ffff", "2", "7", "x", ""):
        with pytest.raises(UserError, match="name one of the earlier generations, abc1, abd2"):
            _generation(lineage, name)
    with pytest.raises(UserError, match="was not grown"):
        _generation(lineage[:1], "0")
