"""Plans and engines on a real GPU; skips with a reason elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from export.device.bundle import BundleError, BundleFolder
from export.device.cuda import CudaError, find_gpu
from export.device.runtime import Sampler, load_bundle
from export.device.tensorrt import find_builder
from export.device.tensorrt_graph import load_tensorrt_graph
from mnif.cli import main


def missing() -> str:
    """Why no plan can be built and run here, or nothing."""
    try:
        find_gpu()
        find_builder()
    except (CudaError, BundleError) as reason:
        return str(reason)
    return ""


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(missing()), reason=missing() or "there is a GPU")]


@pytest.fixture(scope="module")
def built(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = Path(shutil.copytree(exported, tmp_path_factory.mktemp("gpu") / "bundle"))
    assert main(["build", "--bundle", str(bundle), "--batch_sizes", "1", "8"]) == 0
    return bundle


def test_every_engine_is_within_its_tolerance(built: Path) -> None:
    assert main(["verify", "--bundle", str(built), "--backends", "tensorrt"]) == 0


def test_a_second_build_builds_nothing(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "--bundle", str(built), "--batch_sizes", "1", "8"]) == 0
    assert ": 0 built, " in capsys.readouterr().out


def test_engines_draw_what_the_cpu_draws(built: Path) -> None:
    on_gpu, on_cpu = (Sampler(load_bundle(built, backend), "fp32") for backend in ("tensorrt", "onnxruntime"))
    for batch in (1, 3, 8, 5, 1):
        np.testing.assert_allclose(on_gpu(batch, seed=batch), on_cpu(batch, seed=batch), atol=1e-3)


def test_a_cuda_graph_changes_no_number(built: Path) -> None:
    folder, random = BundleFolder(built), np.random.default_rng(0)
    captured, plain = (load_tensorrt_graph(folder, "decoder", wish) for wish in (True, False))
    for batch in (1, 2, 8, 3, 1):
        arrays = {"coefficients": random.standard_normal((batch, 4, 2, 6)).astype(np.float32)}
        np.testing.assert_array_equal(captured(arrays)[0], plain(arrays)[0])


def test_half_precision_is_half(built: Path) -> None:
    """A mixed engine that is as exact as a float32 one was not built in half precision."""
    out = built.parent / "verify.json"
    main(["verify", "--bundle", str(built), "--backends", "tensorrt", "--output", str(out)])
    psnr = {row["graph"]: row["psnr"] for row in json.loads(out.read_text())}
    assert psnr["decoder_mixed"] < psnr["decoder"] - 10


def test_bench_has_device_times(built: Path) -> None:
    out = built.parent / "bench.json"
    assert (
        main(["bench", "--bundle", str(built), "--backends", "tensorrt", "--rounds", "20", "--output", str(out)]) == 0
    )
    for row in json.loads(out.read_text())["rows"]:
        assert 0 < row["device_ms_p50"] <= row["host_ms_p50"]
