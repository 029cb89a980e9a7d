"""The page in examples/browser against Python: its noise, its graphs, and the picture in a real browser."""

import json
import re
import shutil
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

from export.commands.export import ExportArguments, export_bundle
from export.device.bundle import BundleFolder
from export.device.verify import check_graph
from export.graphs.sampler import field_graph
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from mnif.utils.errors import UserError

PAGE = Path(__file__).parents[2] / "examples/browser"
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STEPS, SEED, SAMPLE = 4, 3, 1

needs_node = pytest.mark.skipif(NODE is None, reason="no Node.js on this machine")
needs_browser = pytest.mark.skipif(
    NODE is None or CHROMIUM is None or not (PAGE / "node_modules/playwright-core").is_dir(),
    reason="needs Node.js, Chromium and `npm ci` in examples/browser",
)


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


@pytest.fixture
def site(pipeline: MNIFPipeline, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A static server's address, with the page at /page/ and a bundle at /bundle/; and the bundle's folder."""
    options = ExportArguments(
        model=Path("model"),
        output_dir=tmp_path / "bundle",
        num_baked=0,
        num_inference_steps=[STEPS],
        browser=True,
        compile_rtx="off",
    )
    export_bundle(pipeline, options)
    (tmp_path / "page").symlink_to(PAGE)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", options.output_dir
    server.shutdown()
    thread.join()
    server.server_close()


def drawn(address: str, *resolutions: int) -> dict[str, Any]:
    command = [NODE, PAGE / "draw.mjs", f"{address}/page/?bundle=/bundle", CHROMIUM, SEED, SAMPLE, *resolutions]
    done = subprocess.run([str(each) for each in command], capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@needs_browser
def test_page_draws_what_python_draws(site: tuple[str, Path], pipeline: MNIFPipeline) -> None:
    resolutions = (16, 37, 8)  # as trained; one that cells do not divide; fewer
    answer = drawn(site[0], *resolutions)
    assert answer["complaints"] == []
    assert answer["caption"] == f"seed {SEED}, sample {SAMPLE}, 8 × 8 pixels"
    for id in ("sampling", "drawing"):
        assert re.fullmatch(r"\d+\.\d ms", answer[id])

    noise = torch.from_numpy(initial_noise(SEED, [SAMPLE], pipeline.decoder.config.latent_dim))
    for resolution, pixels in zip(resolutions, answer["pictures"], strict=True):
        found = np.array(pixels).reshape(resolution, resolution, 4)
        (expected,) = pipeline(
            latents=noise, num_inference_steps=STEPS, resolution=resolution, output_type="np"
        ).images
        assert (found[..., 3] == 255).all()
        assert expected.std() > 0.05
        np.testing.assert_allclose(found[..., :3], expected * 255, rtol=0, atol=0.51)  # half a step, and float32


@pytest.mark.slow
@needs_browser
def test_page_refuses_a_changed_graph_in_one_line(site: tuple[str, Path]) -> None:
    address, bundle = site
    with (bundle / "onnx/field.onnx").open("ab") as file:
        file.write(b" ")
    answer = drawn(address, 16)
    assert answer["pictures"] == []
    assert answer["status"] == "onnx/field.onnx differs from what was exported (SHA-256); export the bundle again"


def test_graphs_of_the_page_are_in_the_bundle_in_float32(site: tuple[str, Path], pipeline: MNIFPipeline) -> None:
    folder = BundleFolder(site[1])
    reference = folder.reference()
    for kind in ("prior", "field"):
        graphs = [graph for graph in folder.manifest["graphs"].values() if graph["kind"] == kind]
        assert [graph["precision"] for graph in graphs] == ["fp32"]
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
