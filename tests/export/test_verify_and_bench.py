"""Checks against the exact reference, and times."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from export.device.bundle import BundleFolder, manifest_digest
from export.device.verify import check_graph
from mnif.cli import main
from mnif.utils.files import sha256_of_file
from mnif.utils.json_files import read_json


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def resign(folder: Path, **changes: Any) -> None:
    """Makes hashes and digest fit what lies there."""
    manifest = read_json(folder / "manifest.json")
    for name in manifest["files"]:
        file = folder / name
        manifest["files"][name] = {"sha256": sha256_of_file(file), "bytes": file.stat().st_size}
    manifest["graphs"]["decoder"].update(changes)
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_every_graph_passes_in_every_backend(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    assert main(["verify", "--bundle", str(exported), "--output", str(tmp_path / "table.json")]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "checks passed" in shown[-1]
    rows = json.loads((tmp_path / "table.json").read_text())
    assert all(row["passed"] for row in rows)
    graphs = read_json(exported / "manifest.json")["graphs"]
    referenced = {name for name, graph in graphs.items() if graph["reference"]}
    for backend in ("onnxruntime", "openvino", "onnx-reference"):
        assert {row["graph"] for row in rows if row["backend"] == backend} == referenced


def test_half_precision_shows_in_the_reference_evaluator_alone(exported: Path) -> None:
    """ONNX Runtime on a CPU drops the casts: what it says of a mixed graph is what it says of the float32 one."""
    folder = BundleFolder(exported)
    reference = folder.reference()
    single = check_graph(folder, reference, "decoder", "onnxruntime").psnr
    removed = check_graph(folder, reference, "decoder_mixed", "onnx-reference").psnr
    assert removed < single - 20


def test_the_price_of_fewer_bits_is_that_of_the_evaluator(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the README and in `mnif inspect`: decibels, the largest error, and that in steps of a pixel's 255."""
    folder = BundleFolder(exported)
    reference, readme = folder.reference(), (exported / "README.md").read_text()
    assert main(["inspect", "--bundle", str(exported)]) == 0
    shown = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if "→" in line}
    for name, graph in folder.manifest["graphs"].items():
        check = check_graph(folder, reference, name, "onnx-reference")
        stated = folder.manifest["measured"][name]["max_abs"]
        assert stated == pytest.approx(check.max_abs, rel=0.01, abs=1e-6)  # float32 graphs: by ONNX Runtime
        steps = "–" if graph["kind"] == "encoder" else f"{stated / (2 / 255):.2f}"  # latents are no pixels
        figures = [f"{graph['psnr']:.1f}", f"{stated:.1e}", steps]
        assert shown[name][5:8] == figures
        if graph["precision"] == "mixed":
            single = folder.graph(name.replace("_mixed", ""))["psnr"]
            line = f"- `{name}`: {figures[0]} dB (float32: {single:.1f} dB), no value off by more than {figures[1]}"
            assert line + ("" if steps == "–" else f", {steps} of a pixel's 255 steps") in readme


def test_a_bundle_that_tells_no_errors_is_still_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_json(folder / "manifest.json")
    manifest["measured"] = {name: {"tensorrt_rtx": None} for name in manifest["graphs"]}
    manifest["digest"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", "--bundle", str(folder)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("decoder ")]
    assert line.split()[6:8] == ["–", "–"]


def test_a_graph_in_half_precision_throughout_is_worse_than_mixed(exported: Path) -> None:
    """Why the first layer, biases and sines stay in float32."""
    folder = BundleFolder(exported)
    exact = folder.reference()
    name = folder.graph("baked_0000_mixed")["reference"]
    mixed = check_graph(folder, exact, "baked_0000_mixed", "onnx-reference").psnr
    model = onnx.load_from_string(folder.onnx("baked_0000"))
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.elem_type = TensorProto.FLOAT16
    evaluator = onnx.reference.ReferenceEvaluator(model)
    (answer,) = evaluator.run(None, {"coordinates": exact[f"{name}.coordinates"].astype(np.float16)})
    error = np.square(answer.astype(np.float64) - exact[f"{name}.values"]).mean()
    assert 10 * np.log10(4 / error) < mixed - 3


def test_the_worst_case_is_named_and_the_exit_code_is_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "onnx" / "decoder.onnx"
    model = onnx.load(path)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "decoder.bases.0")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save_model(model, path)
    resign(folder)
    assert main(["verify", "--bundle", str(folder), "--backends", "onnxruntime", "onnx-reference"]) == 1
    shown = capsys.readouterr().out
    assert "FAIL decoder " in shown
    assert "worst: decoder in onnx" in shown.splitlines()[-1]


def test_numbers_that_are_none_fail(folder: Path) -> None:
    arrays = dict(np.load(folder / "reference.npz"))
    arrays["decoder.values"][0, 0, 0, 0] = np.nan
    np.savez(folder / "reference.npz", **arrays)
    resign(folder)
    assert main(["verify", "--bundle", str(folder), "--backends", "onnxruntime", "--graphs", "decoder"]) == 1


def test_a_tampered_reference_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "reference.npz").write_bytes(b"")
    assert main(["verify", "--bundle", str(folder)]) == 2
    assert "reference.npz: differs from what was exported" in capsys.readouterr().err


def test_demanded_backends_must_be_there(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--bundle", str(exported), "--backends", "tensorrt"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bench_times_every_backend_and_says_what_on(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    flags = ["--graphs", "decoder", "baked_0000", "--batch_sizes", "1", "4", "--rounds", "3"]
    assert main(["bench", "--bundle", str(exported), *flags, "--output", str(tmp_path / "bench.json")]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert {(row["graph"], row["backend"], row["batch"]) for row in found["rows"]} >= {
        (graph, backend, batch)
        for graph, batch in (("decoder", 1), ("decoder", 4), ("baked_0000", 1))
        for backend in ("onnxruntime", "openvino")
    }
    for row in found["rows"]:
        assert 0 < row["host_ms_p50"] <= row["host_ms_p95"] <= row["host_ms_p99"]
        assert row["per_second"] == pytest.approx(row["batch"] / row["host_ms_p50"] * 1e3)
    assert found["machine"]["cores"] >= 1
    assert found["memory"]["process_peak_megabytes"] > 10
    shown = capsys.readouterr().out
    if found["machine"]["gpu"] is None:
        assert "no GPU was there, CPU backends alone are timed" in shown
        assert all(row["device_ms_p50"] is None for row in found["rows"])


@pytest.mark.parametrize("flags", [["--rounds", "0"], ["--batch_sizes", "0"], ["--graphs", "nothing"]])
def test_bench_flags_out_of_range_are_one_line(
    exported: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--bundle", str(exported), *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
