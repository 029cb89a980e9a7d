"""A bundle's page against Python: its noise, its graphs, and the picture in a real browser."""

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from export import browser
from export.commands.export import ExportArguments, export_bundle
from export.device.bundle import BundleFolder
from export.device.verify import check_graph
from export.graphs.sampler import field_graph
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise, slerp
from mnif.utils.errors import UserError
from tests.browser.chromium import NODE, asked_of_page, needs_browser, needs_node

PAGE = Path(__file__).parents[2] / "export/page"
NPM = Path(__file__).parents[1] / "browser/node_modules/onnxruntime-web"
STEPS, SEED, SAMPLE = 4, 3, 1


@needs_node
@pytest.mark.parametrize(
    ("seed", "index", "count"), [(0, 0, 300_000), (7, 12, 128), (2**32, 2**32 - 1, 9), (2**200 + 5, 2**70, 9)]
)
def test_noise_of_the_page_is_that_of_numpy(seed: int, index: int, count: int) -> None:
    script = (
        f"import {{ initialNoise }} from {json.dumps((PAGE / 'noise.js').as_uri())};"
        f"process.stdout.write(new Uint8Array(initialNoise({seed}n, {index}n, {count}).buffer));"
    )
    done = subprocess.run([NODE, "--input-type=module", "-e", script], capture_output=True, check=True)
    found = np.frombuffer(done.stdout, dtype="<f4")
    (expected,) = initial_noise(seed, [index], count)
    np.testing.assert_allclose(found, expected, atol=0, rtol=2e-7)  # a logarithm in the tail may round differently
    assert (found != expected).mean() < 1e-5


@needs_node
@pytest.mark.parametrize("way", [0.25, 0.5, 1.0])
def test_way_between_samples_is_that_of_python(way: float) -> None:
    start, end = initial_noise(0, [3, 4], 64)
    script = (
        f"import {{ initialNoise, slerp }} from {json.dumps((PAGE / 'noise.js').as_uri())};"
        f"const noise = slerp(initialNoise(0n, 3n, 64), initialNoise(0n, 4n, 64), {way});"
        "process.stdout.write(new Uint8Array(noise.buffer));"
    )
    done = subprocess.run([NODE, "--input-type=module", "-e", script], capture_output=True, check=True)
    np.testing.assert_allclose(
        np.frombuffer(done.stdout, dtype="<f4"), slerp(start, end, np.array([way]))[0], atol=1e-6
    )


@pytest.fixture
def site(pipeline: MNIFPipeline, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A static server's address, where a bundle lies at /bundle/; and the bundle's folder."""
    options = ExportArguments(
        model=Path("model"),
        output_dir=tmp_path / "bundle",
        num_baked=0,
        num_inference_steps=[2, STEPS],
        browser=True,
        onnxruntime_web=NPM if NPM.is_dir() else None,
        compile_rtx="off",
    )
    export_bundle(pipeline, options)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/bundle/browser/", options.output_dir
    server.shutdown()
    thread.join()
    server.server_close()


WAIT = """
    await page.waitForSelector("#generate:enabled, .wrong");
    const pixels = () => page.locator("#picture").evaluate((picture) =>
      [...picture.getContext("2d").getImageData(0, 0, picture.width, picture.height).data]);
    const captioned = (words) => page.waitForFunction(
      (words) => document.querySelector("#caption").textContent.includes(words), words);
    const text = (id) => page.textContent(id);
"""
"""What the scripts below begin with: the page is there, and how it is looked at."""


@pytest.mark.slow
@needs_browser
def test_page_draws_what_python_draws(site: tuple[str, Path], pipeline: MNIFPipeline) -> None:
    resolutions = (16, 37, 8)  # as trained; one that cells do not divide; fewer
    answer = asked_of_page(
        f"{site[0]}?backend=wasm",
        f"""{WAIT}
        await page.fill("#seed", "{SEED}");
        await page.fill("#sample", "{SAMPLE}");
        await page.click("#generate");
        await page.waitForSelector("#earlier canvas");
        const pictures = [];
        for (const resolution of {json.dumps(resolutions)}) {{
          await page.locator("#resolution").fill(String(resolution));
          await captioned(`${{resolution}} × `);
          pictures.push(await pixels());
        }}
        const caption = await text("#caption");
        const times = [await text("#sampling"), await text("#drawing")];
        await page.locator("#resolution").fill("16");
        await page.locator("#way").fill("50");
        await captioned("50 % of the way to {SAMPLE + 1}, 16 × 16");
        const between = await pixels();
        await page.locator("#way").fill("0");
        await page.selectOption("#steps", "2");
        await page.waitForTimeout(500);
        await captioned("sample {SAMPLE}, 16 × 16");
        const fewer = await pixels();
        await page.click("#walk");
        await captioned("12 % of the way");
        await page.click("#walk");
        return {{ pictures, caption, times, between, fewer, status: await text("#status"),
          width: await page.evaluate(() => document.documentElement.scrollWidth) }};
        """,
        viewport={"width": 360, "height": 900},
    )
    assert answer["caption"] == f"seed {SEED}, sample {SAMPLE}, 8 × 8 pixels"
    assert answer["width"] == 360
    assert "WebAssembly, one thread" in answer["status"]
    for time in answer["times"]:
        assert re.fullmatch(r"\d+\.\d ms", time)

    noise = initial_noise(SEED, [SAMPLE, SAMPLE + 1], pipeline.decoder.config.latent_dim)
    half_way = slerp(*noise, np.array([0.5]))
    drawn = [*zip(resolutions, answer["pictures"], strict=True), (16, answer["between"]), (16, answer["fewer"])]
    for place, (resolution, pixels) in enumerate(drawn):
        found = np.array(pixels).reshape(resolution, resolution, 4)
        latents = torch.from_numpy(half_way if place == len(resolutions) else noise[:1])
        steps = 2 if place == len(resolutions) + 1 else STEPS
        options = {"num_inference_steps": steps, "resolution": resolution, "output_type": "np"}
        (expected,) = pipeline(latents=latents, **options).images
        assert (found[..., 3] == 255).all()
        assert expected.std() > 0.05
        np.testing.assert_allclose(found[..., :3], expected * 255, rtol=0, atol=0.51)  # half a step, and float32


@pytest.mark.slow
@needs_browser
def test_page_draws_the_same_on_webgpu(site: tuple[str, Path], pipeline: MNIFPipeline) -> None:
    answer = asked_of_page(
        site[0],
        f"""{WAIT}
        if (!(await page.locator("#backend option[value=webgpu]").count())) return null;
        await page.fill("#seed", "{SEED}");
        await page.fill("#sample", "{SAMPLE}");
        await page.click("#generate");
        await page.waitForSelector("#earlier canvas");
        return {{ pixels: await pixels(), status: await text("#status") }};
        """,
    )
    if answer is None:
        pytest.skip("this Chromium has no WebGPU")
    assert answer["status"].endswith("WebGPU.")
    noise = torch.from_numpy(initial_noise(SEED, [SAMPLE], pipeline.decoder.config.latent_dim))
    (expected,) = pipeline(latents=noise, num_inference_steps=STEPS, output_type="np").images
    found = np.array(answer["pixels"]).reshape(16, 16, 4)[..., :3]
    np.testing.assert_allclose(found, expected * 255, rtol=0, atol=1.5)  # its sines are less exact


@pytest.mark.slow
@needs_browser
def test_page_refuses_a_changed_graph_in_one_line(site: tuple[str, Path]) -> None:
    address, bundle = site
    with (bundle / "onnx/field.onnx").open("ab") as file:
        file.write(b" ")
    answer = asked_of_page(f"{address}?backend=wasm", f"{WAIT} return text('#status');")
    assert answer == "onnx/field.onnx differs from what was exported (SHA-256); export the bundle again"


@pytest.mark.slow
@needs_browser
def test_page_refuses_another_runtime_than_it_was_written_with(site: tuple[str, Path]) -> None:
    address, bundle = site
    with (bundle / "browser/onnxruntime-web/ort.wasm.bundle.min.mjs").open("ab") as file:
        file.write(b" ")
    answer = asked_of_page(
        f"{address}?backend=wasm",
        f"{WAIT} return text('#status');",
        expected_complaints=["integrity", "Fetch API cannot load"],
    )
    assert "ort.wasm.bundle.min.mjs: " in answer
    assert "without it nothing can be drawn" in answer


@pytest.mark.skipif(not NPM.is_dir(), reason="needs `npm ci` in tests/browser")
def test_hashes_of_the_cdn_are_those_of_the_package_that_is_tested() -> None:
    assert json.loads((NPM / "package.json").read_text())["version"] == browser._VERSION
    for file, integrity in browser._INTEGRITY.items():
        assert browser._integrity_of(NPM / "dist" / file) == integrity


def test_page_without_a_package_takes_it_from_a_cdn(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    browser.write_page(tmp_path, None)
    settings = json.loads((tmp_path / "browser/runtime.json").read_text())
    assert settings["source"] == f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{settings['version']}/dist/"
    files = [file for build in settings["builds"].values() for file in build.values()]
    assert {file["file"]: file["integrity"] for file in files} == browser._INTEGRITY
    assert {path.name for path in (tmp_path / "browser").iterdir()} == {"runtime.json"} | {
        path.name for path in PAGE.iterdir()
    }


def test_another_package_is_refused(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    options = ExportArguments(model=Path("model"), output_dir=tmp_path / "bundle", browser=True)
    options.onnxruntime_web = tmp_path / "package"
    options.onnxruntime_web.mkdir()
    with pytest.raises(UserError, match=r"no package.json there; `npm install onnxruntime-web`"):
        export_bundle(pipeline, options)
    (options.onnxruntime_web / "package.json").write_text('{"name": "left-pad", "version": "1.0.0"}')
    with pytest.raises(UserError, match="is the npm package left-pad"):
        export_bundle(pipeline, options)
    (options.onnxruntime_web / "package.json").write_text('{"name": "onnxruntime-web", "version": "1.0.0"}')
    with pytest.raises(UserError, match=r"has no dist/ort.webgpu.bundle.min.mjs"):
        export_bundle(pipeline, options)
    options.browser = False
    with pytest.raises(UserError, match="say that too"):
        export_bundle(pipeline, options)
    assert not options.output_dir.exists()


def test_graphs_of_the_page_are_in_the_bundle_in_float32(site: tuple[str, Path], pipeline: MNIFPipeline) -> None:
    folder = BundleFolder(site[1])
    reference = folder.reference()
    for kind in ("prior", "field"):
        graphs = [graph for graph in folder.manifest["graphs"].values() if graph["kind"] == kind]
        assert {graph["precision"] for graph in graphs} == {"fp32"}
        assert {graph["steps"] for graph in graphs} == ({2, STEPS} if kind == "prior" else {None})
        check = check_graph(folder, reference, kind, "onnxruntime")
        assert check.passed
        assert check.max_abs <= 1e-5


def test_field_graph_says_what_the_decoder_says(pipeline: MNIFPipeline) -> None:
    decoder = pipeline.decoder
    session = onnxruntime.InferenceSession(field_graph(decoder).SerializeToString())
    grid = decoder.grid(21)
    coefficients = torch.randn(2, *decoder.coefficients(torch.zeros(1, 12)).shape[1:]) / 3
    coordinates = grid.coordinates.expand(4, -1, -1).contiguous()
    inputs = {"coefficients": coefficients.numpy(), "coordinates": coordinates.numpy()}
    (values,) = session.run(None, inputs)
    with torch.no_grad():
        expected = decoder.decode_coefficients(coefficients, grid)
    torch.testing.assert_close(grid.blend(torch.from_numpy(values)), expected, atol=1e-5, rtol=0)


def test_a_bundle_without_a_prior_has_nothing_for_the_page(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    options = ExportArguments(model=Path("model"), output_dir=tmp_path / "bundle", browser=True)
    with pytest.raises(UserError, match="--browser"):
        export_bundle(pipeline.decoder, options)
    assert not options.output_dir.exists()
