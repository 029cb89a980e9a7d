"""The atlas of a model's bases: what is measured, against taking coefficients away singly; the page in a browser."""

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evals.atlas.contents import on_a_sheet
from evals.atlas.mixture import Mixture, Subject, coefficient_batches, coefficients_of
from evals.atlas.plates import cell_map, signed_difference
from evals.atlas.removal import error_rises, estimated_rises, measured_rises, removal_test, some_at_random, strongest
from evals.atlas.usage import average_coefficients, measured_usage
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model
from tests.browser.chromium import asked_of_page, needs_browser

FORMS: list[dict[str, Any]] = [
    {},
    {"coefficient_form": "shared"},
    {"coefficient_form": "direct", "latent_dim": None},
    {"mixing": "average"},
    {"mixing": "average", "coefficient_form": "direct", "latent_dim": None},
    {"tokens": 2},
    {"num_bases": 6, "coefficient_sparsity": 2, "sparsity_rule": "place"},
    {"cells": 1, "output_sine": True},
    {"num_bases": 5, "latent_dim": 11, "growths": [{"num_bases": 2, "latent_dim": 3}]},
]


def small(**changes: Any) -> MNIFModel:
    """A model of 8×8 pictures with random weights, whose coefficients differ between latents."""
    torch.manual_seed(0)
    shape = {"resolution": 8, "cells": 2, "num_bases": 3, "width": 6, "depth": 1, "latent_dim": 8, "omega": 4.0}
    model = MNIFModel(**(shape | changes))
    for mapping in (model.coefficient_map, *(growth.coefficient_map for growth in model.later)):
        if isinstance(mapping, torch.nn.Linear):
            torch.nn.init.normal_(mapping.weight, std=0.3)
    return model.eval().requires_grad_(False)


def looked_at(model: MNIFModel) -> tuple[Mixture, Subject, torch.Tensor]:
    """A mixture with the average of 40 latents as its baseline, an instance of noise, and the latents."""
    latents = torch.randn(40, model.config.latent_dim, generator=torch.Generator().manual_seed(1))
    average = average_coefficients(coefficient_batches(model, latents, at_once=16))
    generator = np.random.default_rng(0)
    row = {"images": torch.from_numpy(generator.integers(0, 256, (1, 8, 8, 3), dtype=np.uint8))}
    subject = Subject("noise", coefficients_of(model, latents[:1])[0], row)
    return Mixture(model, signal_of_model(model), average), subject, latents


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_coefficients_in_the_place_of_latents_draw_the_same(form: dict[str, Any]) -> None:
    model = small(**form)
    mixture, _, latents = looked_at(model)
    coefficients = coefficients_of(model, latents)
    assert coefficients.shape[2] == (1 if form.get("coefficient_form") == "shared" else len(model.bases))
    drawn = mixture.by_coefficients(mixture.as_latents(coefficients), 12)
    torch.testing.assert_close(drawn, model(latents, 12), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", [{}, {"coefficient_form": "shared"}, {"mixing": "average"}], ids=str)
def test_rises_are_those_of_taking_coefficients_away_one_by_one(form: dict[str, Any]) -> None:
    mixture, subject, _ = looked_at(small(**form))
    rises = measured_rises(mixture, subject)
    seen = mixture.signal.observe(subject.row)

    def error(coefficients: torch.Tensor) -> torch.Tensor:
        latents = mixture.as_latents(coefficients[None])
        return mixture.signal.per_instance_loss(mixture.by_coefficients, latents, seen)[0]

    whole = error(subject.coefficients)
    for place in product(*map(range, rises.shape)):
        changed = subject.coefficients.clone()
        changed[place] = mixture.baseline[place]
        assert rises[place] == pytest.approx((error(changed) - whole).item(), abs=2e-6)


def test_estimated_rises_are_the_measured_ones_where_little_is_taken_away() -> None:
    mixture, subject, _ = looked_at(small(overlap=0.0))  # so that every pixel has one cell to answer for it
    near = Subject("near", mixture.baseline + 0.03 * (subject.coefficients - mixture.baseline), subject.row)
    measured, estimated = measured_rises(mixture, near), estimated_rises(mixture, near)
    assert measured.abs().max() > 1e-5
    torch.testing.assert_close(estimated, measured, atol=0.03 * float(measured.abs().max()), rtol=0)


def test_an_explanation_names_the_bases_that_do_something() -> None:
    model = small(num_bases=12, overlap=0.0)
    for bases in model.bases:
        bases.data[3:] = 0
    mixture, subject, latents = looked_at(model)
    itself = Subject("sample", subject.coefficients, subject.row, is_sample=True)
    rises = error_rises(mixture, itself)
    assert mixture.errors(itself, itself.coefficients[None]).item() == 0
    assert (rises[..., :3] > 0).all()
    assert rises[..., 3:].abs().max() < 1e-9
    usage = measured_usage(model, coefficient_batches(model, latents), mixture.baseline)
    assert (usage.cells[..., 3:] == 0).all()
    count = rises[..., :3].numel()
    test = removal_test(mixture, [itself], [rises], [count], draws=3)
    assert test.strongest[0] > 1e-3
    assert test.ratios(count) == (float("inf"), float("inf"))
    of_bases = removal_test(mixture, [itself], [rises.sum(dim=0)], [1], draws=200)
    without = mixture.without(itself.coefficients, strongest(rises.sum(dim=0), 1))
    assert of_bases.strongest[0] == pytest.approx(mixture.errors(itself, without[None]).item(), rel=1e-5)
    assert of_bases.random[0] < of_bases.strongest[0]


def test_by_place_a_basis_is_one_of_few_and_is_held_against_those() -> None:
    model = small(num_bases=12, cells=4, coefficient_sparsity=3, sparsity_rule="place")
    mixture, subject, _ = looked_at(model)
    assert (mixture.held.sum(dim=2) == 3).all()
    assert torch.equal(mixture.held, (subject.coefficients != 0) | (mixture.baseline != 0))
    rises = error_rises(mixture, subject)
    test = removal_test(mixture, [subject], [rises], [10], draws=4)
    assert test.of == 16 * 2 * 3
    strongest_ten = strongest(rises, 10)
    assert mixture.held[strongest_ten].all()
    expected = mixture.errors(subject, mixture.without(subject.coefficients, strongest_ten)[None])
    before = mixture.errors(subject, subject.coefficients[None])
    assert test.strongest[0] == pytest.approx((expected - before).item(), rel=1e-4)
    assert test.random[0] != 0
    assert removal_test(mixture, [subject], [rises.sum(dim=0)], [2], draws=4).of == 2 * 12


def test_others_are_others_and_as_many() -> None:
    chosen = strongest(torch.arange(24.0).view(2, 3, 4), 5)
    assert chosen.flatten().nonzero()[:, 0].tolist() == [19, 20, 21, 22, 23]
    drawn = [some_at_random(~chosen, 7, np.random.default_rng(seed)) for seed in range(50)]
    assert all(int(other.sum()) == 7 and not (other & chosen).any() for other in drawn)
    assert torch.stack(drawn).any(dim=0).sum() == 19  # each of the others has its turn


def test_usage_is_that_of_the_coefficients() -> None:
    model = small()
    mixture, _, latents = looked_at(model)
    coefficients = coefficients_of(model, latents)
    usage = measured_usage(model, coefficient_batches(model, latents, at_once=7), mixture.baseline)
    norms = torch.stack([bases.norm(dim=1) for bases in model.bases])
    torch.testing.assert_close(usage.cells, coefficients.std(dim=0, correction=0) * norms)
    moved = (coefficients - coefficients.mean(dim=0)).flatten(2).flatten(0, 1).numpy()
    cosines = moved.T @ moved / np.outer(*[np.linalg.norm(moved, axis=0)] * 2)
    np.testing.assert_allclose(usage.correlation, cosines, atol=1e-5)
    first = (coefficients - mixture.baseline)[:, :, 0, 1].square().mean(dim=1).argmax()
    assert usage.users(1, 4)[0] == first
    alike = [other for other, _ in usage.nearest(1, 5, usage.likeness)]
    assert sorted(alike) == [0, 2]  # those of the other layer have no weights to compare
    assert (usage.active == 1).all()


def test_maps_and_differences_show_where_something_is() -> None:
    drawn = cell_map(np.array([[0.0, 2.0], [-1.0, 1.0]]))
    assert drawn[..., 3].tolist() == [[0, 255], [0, 128]]
    solid = np.zeros((2, 2, 2))
    solid[1, 0, 0], solid[0, 1, 1] = 1, 0.5  # right, below, at the back; left, above, in front
    assert cell_map(solid)[..., 3].tolist() == [[0, 255, 255, 0, 0], [0, 0, 255, 128, 0]]  # a line between the layers
    one, other = np.full((1, 4, 4, 3), 100, np.uint8), np.full((1, 4, 4, 3), 100, np.uint8)
    one[0, 0, 0, 0] += 20
    difference, gain = signed_difference(one, other)
    assert gain == 8
    assert difference[0, 0, 0].tolist() == [208, 128, 128]
    assert signed_difference(one, one)[1] == 64


def model_of(folder: Path, signal: str, settings: dict[str, Any], data: str, **shape: Any) -> Path:
    """A model folder with a prior, of random weights, and latents of some of the data beside it."""
    torch.manual_seed(0)
    size = {"num_bases": 4, "width": 6, "depth": 1, "latent_dim": 8, "omega": 4.0, "cells": 2} | shape
    decoder = MNIFModel(signal=signal, signal_settings=settings, **size)
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.3)
    denoiser = ResMLPDenoiser(latent_dim=8, width=16, depth=1, decoder_fingerprint=decoder.fingerprint())
    MNIFPipeline(decoder, denoiser, sampling_scheduler("x0")).save_pretrained(folder / "model")
    ids = signal_of_model(decoder).load_like(data).ids[:10]
    held_out = torch.arange(len(ids)) >= 6
    LatentTable(torch.randn(len(ids), 8), ids, held_out, decoder.fingerprint(), data).save(
        folder / "latents.safetensors"
    )
    return folder / "model"


@pytest.fixture(scope="module")
def pictured(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A run of pictures with its atlas."""
    folder = tmp_path_factory.mktemp("atlas") / "run"
    model = model_of(folder, "image", {"resolution": 16, "channels": 3}, str(picture_folder), resolution=16)
    assert main(["atlas", "--model", str(model), "--num_instances", "3", *QUICK]) == 0
    return folder


QUICK = ["--num_samples", "2", "--num_inference_steps", "2"]


def test_figures_name_every_basis_once_and_their_test(pictured: Path) -> None:
    figures = json.loads((pictured / "atlas.json").read_text())
    names = sorted(basis["name"] for basis in figures["bases"])
    assert names == [f"{layer}·{number}" for layer in (2, 3) for number in range(4)]
    importance = [basis["importance"] for basis in figures["bases"]]
    assert importance == sorted(importance, reverse=True)
    assert min(importance) >= 0
    assert sum(importance) == pytest.approx(1)
    assert figures["coefficients"] | {"of": 32, "removed": 8} == figures["coefficients"]
    assert figures["bases_in_all_cells"]["of"] == 8
    assert len(figures["explained"]) == 5
    assert figures["explained"][-1] == "sample 1"


def test_the_same_command_writes_the_same_page(pictured: Path, tmp_path: Path) -> None:
    command = ["atlas", "--model", f"{pictured}/model", "--num_instances", "3", *QUICK, "--output_dir", str(tmp_path)]
    assert main(command) == 0
    pages = [(folder / "atlas.html").read_text() for folder in (pictured, tmp_path)]
    without_commands = [re.sub('<pre id="commands">.*?</pre>', "", page, flags=re.DOTALL) for page in pages]
    assert without_commands[0] == without_commands[1]


@needs_browser
def test_bases_open_by_hand_and_by_keys(pictured: Path) -> None:
    page = pictured / "atlas.html"
    assert not re.search(r'(src|href)="(?!data:|#)', page.read_text())
    found = asked_of_page(
        page.as_uri(),
        """
        const title = () => page.textContent("#viewer-title");
        const shown = () => page.locator("dialog article:visible").count();
        const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
        const tiles = await page.locator(".tiles button").count();
        const names = await page.locator(".tiles b").allTextContents();
        await page.locator(".tiles button").nth(2).focus();
        await page.keyboard.press("Enter");
        const titles = [await title()];
        const sizes = await page.locator("dialog article:visible .effect img").evaluateAll((images) =>
          Promise.all(images.map((image) => image.decode().then(() => [image.naturalWidth, image.naturalHeight]))));
        await page.keyboard.press("ArrowRight");
        titles.push(await title());
        for (let time = 0; time < 4; time++) await page.keyboard.press("ArrowLeft");
        titles.push(await title());
        const beside = page.locator("dialog article:visible .beside button").first();
        const neighbour = await beside.textContent();
        await beside.click();
        titles.push(await title());
        const open = await shown();
        await page.keyboard.press("Escape");
        const focused = await page.evaluate(() => document.activeElement.getAttribute("aria-label"));
        const grounds = [await ground()];
        await page.click("#theme");
        grounds.push(await ground());
        return { tiles, names, titles, sizes, neighbour, open, focused, grounds, closed: await shown() };
        """,
    )
    names = found["names"]
    assert (found["tiles"], len({*names})) == (8, 8)
    assert found["titles"] == [f"Basis {names[place]}" for place in (2, 3, 7)] + [f"Basis {found['neighbour']}"]
    assert found["sizes"] == [[3 * 96, 96]] * 3
    assert (found["open"], found["closed"]) == (1, 0)
    assert found["focused"].startswith(f"Basis {names[2]},")
    assert found["grounds"] == ["rgb(247, 248, 250)", "rgb(20, 22, 26)"]


@needs_browser
def test_an_instance_is_chosen_and_the_page_is_no_wider_than_a_phone(pictured: Path) -> None:
    found = asked_of_page(
        (pictured / "atlas.html").as_uri(),
        """
        const explained = () => page.locator("#instances article:visible h3").allTextContents();
        const before = await explained();
        await page.locator("#instances .chooser button").nth(2).focus();
        await page.keyboard.press("Space");
        const after = await explained();
        const strips = await page.locator("#instances article:visible .strips input").count();
        const samples = await page.locator("#samples article:visible h3").allTextContents();
        return { before, after, strips, samples, words: await page.innerText("main"),
          width: await page.evaluate(() => document.documentElement.scrollWidth) };
        """,
        viewport={"width": 360, "height": 800},
        colorScheme="dark",
    )
    assert len(found["before"]) == len(found["after"]) == 1
    assert found["before"] != found["after"]
    assert (found["strips"], found["samples"], found["width"]) == (6, ["sample 0"], 360)
    assert "4 tiny networks, one for each cell of a grid" in found["words"]
    assert "8 bases: 4 in each of 2 layers" in found["words"]


SLIDING = """
        const strip = page.locator("#instances article:visible .strips li").first();
        const seen = strip.locator(".window").first();
        const place = () => seen.evaluate((window) => {
          const [ours, whole] = [window, window.firstChild].map((element) => element.getBoundingClientRect());
          return [(ours.left - whole.left) / ours.width, (ours.top - whole.top) / ours.height];
        });
        const state = async () => [await strip.locator("output").textContent(), ...(await place()),
          (await seen.screenshot()).toString("base64")];
        await strip.locator("input").focus();
        const states = [await state()];
        for (const key of KEYS) {
          await page.keyboard.press(key);
          states.push(await state());
        }
"""
"""What the first slider of the instance that is shown says and shows after each key: words, column, row, pixels."""


@needs_browser
def test_a_slider_moves_by_keys_and_shows_the_frame_of_its_step(pictured: Path) -> None:
    keys = ["ArrowRight", "ArrowLeft", "Home", "ArrowRight", "ArrowRight", "End"]
    states = asked_of_page(
        (pictured / "atlas.html").as_uri(), SLIDING.replace("KEYS", json.dumps(keys)) + "return states;"
    )
    words, columns, rows, pixels = zip(*states, strict=True)
    assert words == ("as it is", "+0.5", "as it is", "−2: turned around", "−1.5", "−1: without", "+2")
    assert columns == pytest.approx([4, 5, 4, 0, 1, 2, 8], abs=0.02)
    assert rows == pytest.approx([0] * len(states), abs=0.02)
    assert pixels[0] == pixels[2]
    assert len({*pixels}) == len(states) - 1


def test_a_sheet_has_sides_below_each_other_and_steps_beside_each_other() -> None:
    colours = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1, 1) * 40
    rows = np.broadcast_to(colours, (2, 3, 4, 8, 3))
    sheet = on_a_sheet(rows)
    assert sheet.shape == (8, 24, 3)
    assert sheet[::4, ::8, 0].tolist() == [[0, 40, 80], [120, 160, 200]]
    assert (sheet[4:, 8:16] == 160).all()


@needs_browser
@pytest.mark.parametrize("signal", ["voxels", "radiance"])
def test_shapes_and_objects_are_called_so(signal: str, tmp_path: Path, ball_views: Path) -> None:
    if signal == "voxels":
        settings: dict[str, Any] = {"resolution": 8, "channels": 1}
        shapes = np.random.default_rng(0).random((8, 8, 8, 8)) < 0.5
        np.save(tmp_path / "shapes.npy", shapes)
        data = f"{tmp_path}/shapes.npy"
        model = model_of(tmp_path, signal, settings, data, dimensions=3, channels=1, resolution=8)
    else:
        settings = {"resolution": 8, "near": 0.5, "far": 4.5, "samples": 4, "rays": 16, "camera_distance": 2.0}
        model = model_of(tmp_path, signal, settings, str(ball_views), dimensions=3, channels=4, resolution=32, cells=1)
    assert main(["atlas", "--model", str(model), "--num_instances", "1", "--num_samples", "0"]) == 0
    looking = """
        const sides = page.locator("#instances article:visible .sides input");
        if (await sides.count()) {
          await sides.focus();
          await page.keyboard.press("ArrowRight");
          states.push(await state());
        }
        return [await page.innerText("main"), states];
    """
    sliding = SLIDING.replace("KEYS", '["Home"]') + looking
    words, states = asked_of_page((tmp_path / "atlas.html").as_uri(), sliding)
    first = {"voxels": 4, "radiance": 2}[signal]  # views have steps of 1
    places = [state[1:3] for state in states]
    assert np.allclose(places, [[first, 0], [0, 0], [0, 1]][: len(states)], atol=0.02)
    assert len({state[3] for state in states}) == len(states) == {"voxels": 2, "radiance": 3}[signal]
    noun = {"voxels": "shape", "radiance": "object"}[signal]
    assert f"Each {noun} of this model is" in words
    assert "picture" not in words.lower()
    assert "Samples" not in words
    assert ("layers from the bottom to the top" in words) is (signal == "voxels")
    assert ("that view, as the model draws it" in words) is (signal == "radiance")


def test_bad_input_is_one_line(
    pictured: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "alone/model"
    alone.parent.mkdir()
    alone.symlink_to(pictured / "model")
    other = small()
    LatentTable(torch.randn(4, 8), list("abcd"), torch.zeros(4, dtype=torch.bool), other.fingerprint(), "x").save(
        tmp_path / "latents.safetensors"
    )
    command = ["atlas", "--model", f"{pictured}/model"]
    for words, expected in (
        (["atlas", "--model", str(alone)], "no latents beside the model; give --run"),
        ([*command, "--run", str(tmp_path)], "these latents belong to decoder"),
        ([*command, "--run", f"{tmp_path}/nowhere"], "no latent table"),
        ([*command, "--data", f"{tmp_path}/nowhere"], "nowhere"),
        ([*command, "--num_instances", "0"], "--num_instances 0: must be at least 1"),
        ([*command, "--num_samples", "-1"], "--num_samples -1: must be at least 0"),
        ([*command, "--baseline", "median"], "--baseline"),
        (["atlas", "--model", "avatars"], "it stands in no run; give --output_dir too"),
        (["atlas", "--model", "avatars", "--output_dir", f"{tmp_path}/out"], "no latents beside the model"),
        (["atlas", "--model", f"{tmp_path}/nothing"], "/nothing: no such model folder"),
    ):
        capsys.readouterr()
        assert main(words) == 2, words
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("mnif atlas: ")
        assert expected in line
    assert not (alone.parent / "atlas.html").exists()


def test_data_that_have_none_of_the_instances_are_refused(
    pictured: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/renamed.png").write_bytes((picture_folder / "000.png").read_bytes())
    assert main(["atlas", "--model", f"{pictured}/model", "--data", f"{tmp_path}/others"]) == 2
    assert "none of the table's instances is there, such as" in capsys.readouterr().err
