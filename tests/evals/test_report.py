"""The page of `mnif report`: what it says of metrics, what it draws, and what a browser makes of it."""

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evals.charts import as_svg, comparison_chart, curve_chart, steps_chart
from evals.commands.report import ReportArguments, report
from evals.report.embedded import gallery
from evals.report.exhibits import Exhibit
from evals.report.findings import Finding, findings_of
from evals.report.templates import rendered
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from tests.browser.chromium import asked_of_page, needs_browser

IMAGE: dict[str, Any] = {"resolution": 16, "channels": 3}
VOXELS: dict[str, Any] = {"resolution": 8, "channels": 1}
VIEWS: dict[str, Any] = {"resolution": 8, "samples": 4, "camera_distance": 2.0}
DIMENSIONS = {"image": (2, 3), "voxels": (3, 1), "radiance": (3, 4)}
NOUNS = {"image": "picture", "voxels": "shape", "radiance": "object"}


def findings(metrics: dict[str, Any], noun: str = "picture", **distances: float) -> dict[str, Finding]:
    return {" ".join(finding.title.split()[:3]): finding for finding in findings_of(metrics, distances, [], noun)}


def test_findings_judge_by_controls() -> None:
    good = {"fid": 3.0, "fid_floor": 2.0, "fid_gaussian": 102.0, "psnr_heldout": 40.0, "psnr_pca_heldout": 30.0}
    found = findings(good | {"psnr_train": 40.5, "recall": 0.9, "recall_floor": 0.95})
    assert {finding.verdict for finding in found.values()} == {"good"}
    assert found["Do samples look"].place == pytest.approx(0.01)
    bad = {"fid": 90.0, "fid_floor": 2.0, "fid_gaussian": 102.0, "psnr_heldout": 29.0, "psnr_pca_heldout": 30.0}
    found = findings(bad | {"psnr_train": 35.0, "recall": 0.1, "recall_floor": 0.95})
    assert {finding.verdict for finding in found.values()} == {"bad"}


def test_findings_say_nothing_where_nothing_was_measured() -> None:
    assert findings_of({}, {}, [], "picture") == []
    (alone,) = findings_of({"psnr_heldout": 30.0}, {}, [], "object")
    assert alone.verdict == "open"


@pytest.mark.parametrize(("held_out", "verdict"), [(2, "open"), (19, "open"), (20, "bad"), (759, "bad")])
def test_few_held_out_instances_are_no_ground_for_a_verdict(held_out: int, verdict: str) -> None:
    metrics = {"nn_ratio": 0.2, "protocol": {"held_out_shapes": held_out}}
    (finding,) = findings(metrics, "shape").values()
    assert finding.verdict == verdict
    assert (f"{held_out} held-out shapes are too few" in finding.words) is (verdict == "open")


def test_finding_of_a_student_names_steps() -> None:
    (finding,) = findings({}, student_1=0.03, student_4=0.02, teacher_8=0.01, held_out=0.001).values()
    assert (finding.figure, finding.verdict) == ("0.02 in 4 steps", "fair")


def test_charts_have_no_empty_plots_and_no_colours_of_their_own() -> None:
    rows = [{"stage": "fit", "step": 10, "loss": 0.5}]
    assert curve_chart(rows, "fit", ["loss"], "loss") is None
    assert curve_chart([*rows, {"stage": "fit", "step": 20, "loss": None}], "fit", ["loss"], "loss") is None
    chart = curve_chart([*rows, {"stage": "fit", "step": 20, "loss": 0.2}], "fit", ["loss"], "loss")
    assert chart is not None
    svg = as_svg(chart, "one")
    assert "currentColor" in svg
    assert "var(--series-1)" in svg
    assert all(name.startswith("one-") for name in re.findall(r'\bid="([^"]+)', svg))
    assert not re.search("#0[01]0[01]0[01]|<style|<metadata", svg)
    assert comparison_chart({"samples": {"fid": 1.0}}) is None
    assert steps_chart({"gaussian": 1.0}) is None
    assert steps_chart({"teacher_1": 1.0, "teacher_8": 0.1, "held_out": 0.05}) is not None


def test_the_gallery_keeps_to_its_limit_whatever_is_drawn() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (8, 128, 128, 3), dtype=np.uint8)
    exhibits = [Exhibit(0, torch.zeros(1, 2), noise[0], noise[1], "a", noise, None, None)] * 4
    freely, tightly = (len(json.dumps(gallery(exhibits, limit))) for limit in (10**9, 500_000))
    assert freely > 700_000
    assert tightly < 500_000


def run_folder(folder: Path, signal: str, settings: dict[str, Any]) -> Path:
    """A run as two stages leave it, of random weights."""
    torch.manual_seed(2)
    dimensions, channels = DIMENSIONS[signal]
    resolution = settings["resolution"] if signal != "radiance" else 32
    size = {"dimensions": dimensions, "channels": channels, "resolution": resolution, "cells": 2}
    decoder = MNIFModel(
        **size, num_bases=6, width=8, depth=1, latent_dim=6, omega=4.0, signal=signal, signal_settings=settings
    )
    denoiser = ResMLPDenoiser(latent_dim=6, width=16, depth=1, decoder_fingerprint=decoder.fingerprint())
    for parameter in denoiser.parameters():  # which begin with a denoiser that predicts one and the same
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser.latent_std.fill_(40)  # far enough apart to be of several looks
    MNIFPipeline(decoder, denoiser, sampling_scheduler("x0")).save_pretrained(folder / "model")
    ids = [f"thing-{row}" for row in range(30)]
    held_out = torch.arange(30) >= 25
    LatentTable(torch.randn(30, 6), ids, held_out, decoder.fingerprint(), "<b>things</b>").save(
        folder / "latents.safetensors"
    )
    figures = {"decoder_parameters": 1000, "fields_per_instance": 8, "field_parameters": 100, "seconds": 1.0}
    figures |= {"prior": {"denoiser_parameters": 2000, "seconds": 1.0}, "psnr_train": 31.0, "psnr_heldout": 30.0}
    (folder / "metrics.json").write_text(json.dumps(figures))
    (folder / "run.json").write_text(json.dumps({"fit": {"command": "mnif fit --data things"}}))
    rows = [{"stage": "fit", "step": step, "seconds": 1.0, "loss": 1 / step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def page_of(folder: Path, signal: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    latency = {"work": f"noise to {NOUNS[signal]}", "runtime": "PyTorch", "batch": 1}
    latency |= {"milliseconds": 5.0, "per_second": 200.0}
    monkeypatch.setattr("evals.timing.measured_latencies", lambda *_: [latency])  # which would take seconds
    report(ReportArguments(run=run_folder(folder, signal, settings), num_inference_steps=2))
    return folder / "report.html"


@needs_browser
def test_a_sample_of_pictures_opens_by_hand_and_by_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, "image", IMAGE, monkeypatch)
    assert page.stat().st_size < 5e6
    assert not re.search(r'(src|href)="(?!data:|#)', page.read_text())
    found = asked_of_page(
        page.as_uri(),
        """
        const title = () => page.textContent("#viewer-title");
        const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
        const samples = await page.locator("[data-sample]").count();
        const sizes = await page.locator(".proportions img").evaluateAll(
          (images) => images.map((image) => [image.naturalWidth, image.width]));
        await page.locator("#walk").scrollIntoViewIfNeeded();
        await page.waitForFunction(() => document.querySelector("#walk input").valueAsNumber > 1);
        await page.locator('[data-sample="2"]').focus();
        await page.keyboard.press("Enter");
        const titles = [await title()];
        const enlarged = page.locator("#viewer-sample img");
        const width = await enlarged.evaluate((image) => image.decode().then(() => image.naturalWidth));
        const nearest = await page.textContent("#viewer-nearest figcaption");
        await page.keyboard.press("ArrowRight");
        titles.push(await title());
        for (let time = 0; time < 4; time++) await page.keyboard.press("ArrowLeft");
        titles.push(await title());
        await page.keyboard.press("Escape");
        await page.waitForFunction(() => document.activeElement.dataset.sample === "47");
        const focused = await page.evaluate(() => document.activeElement.dataset.sample);
        const grounds = [await ground()];
        await page.click("#theme");
        grounds.push(await ground());
        return { samples, sizes, titles, width, nearest, focused, grounds,
          open: await page.locator("#viewer").evaluate((viewer) => viewer.open) };
        """,
    )
    assert found["samples"] == 48
    assert found["sizes"] == [[side, side] for side in (16, 32, 64, 256)] * 2  # one pixel to a pixel of the page
    assert (found["titles"], found["width"]) == (["Sample 2", "Sample 3", "Sample 47"], 256)
    assert re.fullmatch(r"Nearest training latent: thing-([0-9]|1[0-9]|2[0-4])", found["nearest"])
    assert (found["focused"], found["open"]) == ("47", False)
    assert found["grounds"] == ["rgb(247, 248, 250)", "rgb(20, 22, 26)"]


@needs_browser
def test_a_page_is_no_wider_than_a_phone_and_says_first_what_matters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(tmp_path, "image", IMAGE, monkeypatch)
    found = asked_of_page(
        page.as_uri(),
        """
        return page.evaluate(() => {
          const top = (selector) => document.querySelector(selector).getBoundingClientRect().top;
          const charts = [...document.querySelectorAll(".chart")].map((chart) => chart.id);
          return { width: document.documentElement.scrollWidth, words: document.body.innerText, charts,
            order: ["#samples", "#findings", "#charts", "#figures"].map(top) };
        });
        """,
        viewport={"width": 360, "height": 800},
    )
    assert found["width"] == 360
    assert found["order"] == sorted(found["order"])
    assert found["charts"] == ["chart-fit_loss"]
    assert "learned from <b>things</b>, 30 pictures" in found["words"]
    assert "Samples have not been measured" in found["words"]


def test_an_atlas_in_the_run_is_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = '<a href="../a%20run/atlas.html">Atlas of bases</a>'
    run, elsewhere = tmp_path / "a run", tmp_path / "pages"
    elsewhere.mkdir()
    run_folder(run, "image", IMAGE)
    (run / "atlas.html").write_text("an atlas")
    monkeypatch.setattr("evals.timing.measured_latencies", lambda *_: [])
    report(ReportArguments(run=run, num_inference_steps=2, output=elsewhere / "report.html"))
    assert link in (elsewhere / "report.html").read_text()


@needs_browser
def test_shapes_turn_and_are_called_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, "voxels", VOXELS, monkeypatch)
    found = asked_of_page(
        page.as_uri(),
        """
        const words = await page.innerText("main");
        const button = page.locator("[data-sample]:not(:has(span))").first();
        const picture = await button.locator("img").getAttribute("src");
        await button.click();
        await page.waitForSelector(".stage canvas");
        const silhouette = (movementX) => page.locator(".stage canvas").evaluate((canvas, movementX) => {
          canvas.dispatchEvent(new PointerEvent("pointermove", { buttons: 1, movementX })); // draws
          const copy = new OffscreenCanvas(128, 128).getContext("2d");
          copy.drawImage(canvas, 0, 0, 128, 128);
          const { data } = copy.getImageData(0, 0, 128, 128);
          return Array.from({ length: 128 * 128 }, (_, pixel) => Number(data[pixel * 4 + 3] > 127));
        }, movementX);
        while (!(await silhouette(0)).includes(1)) await page.waitForTimeout(100);
        return { words, picture, front: await silhouette(0), side: await silhouette(180) };
        """,
        reducedMotion="reduce",
    )
    assert "Shapes as neural fields" in found["words"]
    assert "8³ voxels" in found["words"]
    assert not re.search("picture", found["words"], re.IGNORECASE)
    front, side = (np.array(found[name]).reshape(128, 128).astype(bool) for name in ("front", "side"))
    expected = silhouette_of(found["picture"])
    assert 0.02 < expected.mean() < 0.9
    assert overlap(front, expected) > 0.8  # as marching cubes and our own rasteriser have it, of few voxels
    assert overlap(side, expected) < 0.5


def silhouette_of(uri: str) -> np.ndarray:
    """What of a shaded picture of a shape is not white, at the scale of the page's canvas, [128, 128] bool."""
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L")
    sin, cos, rise, reach = (f(np.radians(a)) for f, a in ((np.sin, 35), (np.cos, 35), (np.sin, 25), (np.cos, 25)))
    extent = max(cos + sin, rise * sin + reach + rise * cos)  # of mnif.utils.meshes.mesh_preview
    side = round(128 * extent / 1.75)  # shape.js shows 1.75 to either side
    sheet = np.full((128, 128), 255, dtype=np.uint8)
    start = (128 - side) // 2
    sheet[start : start + side, start : start + side] = np.asarray(image.resize((side, side)))
    return sheet < 245


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


@needs_browser
def test_objects_are_seen_from_all_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(tmp_path, "radiance", VIEWS, monkeypatch)
    found = asked_of_page(
        page.as_uri(),
        """
        const words = await page.innerText("main");
        await page.click('[data-sample="1"]');
        await page.waitForFunction(() => document.querySelector("#viewer-sample input")?.valueAsNumber > 2);
        const frames = Number(await page.locator("#viewer-sample input").getAttribute("max")) + 1;
        return { words, frames, caption: await page.textContent("#viewer-sample figcaption") };
        """,
    )
    assert "Objects as neural fields" in found["words"]
    assert (found["frames"], found["caption"]) == (24, "From all sides")


def test_commands_stand_on_pages_as_they_were_given() -> None:
    """A flag is not broken after its dashes, and what is copied is the command."""
    given = "mnif fit --data 'a <b>' --random_flip\nmnif prior  --run a"
    page = rendered("made.html.jinja", commands=given.split("\n"), provenance={}, sizes=[])
    found = re.search(r"<pre.*</pre>", page, re.DOTALL)
    assert found is not None
    assert html.unescape(re.sub("<[^>]*>", "", found[0])) == given
    assert re.findall('<span class="flag">([^<]*)</span>', found[0]) == ["--data", "--random_flip", "--run"]
