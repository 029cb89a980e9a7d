import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import load_file

from export import bundle
from export.bundle import ExportArguments, export_bundle
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.errors import UserError
from mnif.files import read_json, sha256_of_file


@pytest.fixture
def options(tmp_path: Path) -> ExportArguments:
    return ExportArguments(
        model=tmp_path / "model",
        output_dir=tmp_path / "bundle",
        num_baked=2,
        num_inference_steps=3,
        compile_rtx="off",
    )


def test_command_writes_a_whole_bundle(
    pipeline: MNIFPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "bundle"
    flags = ["--model", tmp_path / "model", "--output_dir", output, "--num_baked", 2, "--num_inference_steps", 3]
    assert main(["export", *map(str, flags), "--resolution", "18", "--compile_rtx", "off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[:4]] == [
        "decoder.onnx",
        "sampler.onnx",
        "baked_0000.onnx",
        "baked_0001.onnx",
    ]
    assert all("ONNX checker passed, max |ONNX Runtime - PyTorch|" in line for line in lines[:4])

    manifest = read_json(output / "manifest.json")
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert there == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert (sha256_of_file(output / name), (output / name).stat().st_size) == (entry["sha256"], entry["bytes"])
    assert manifest["decoder_fingerprint"] == pipeline.decoder.fingerprint()
    assert manifest["graphs"]["sampler"]["input"] == {"name": "noise", "type": "float32", "shape": ["batch", 12]}
    assert manifest["graphs"]["sampler"]["output"]["shape"] == ["batch", 18, 18, 3]
    assert manifest["graphs"]["baked_0001"]["input"]["shape"] == [4, "points", 2]
    for name, graph in manifest["graphs"].items():
        assert 0 <= manifest["measured"][name]["parity"] <= graph["tolerance"]
    assert (output / "runtime.py").read_bytes() == Path(bundle.runtime.__file__).read_bytes()

    weights = load_file(output / "weights.safetensors")
    np.testing.assert_array_equal(weights["decoder.bases.0"], pipeline.decoder.bases[0].detach().numpy())
    reference = np.load(output / "reference.npz")
    assert reference["sampler.input"].shape == (3, 12)
    assert reference["sampler.output"].shape == (3, 18, 18, 3)


def test_readme_has_a_complete_trtexec_line_for_every_graph(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, options)
    commands = [
        dict(flag.lstrip("-").partition("=")[::2] for flag in shlex.split(line)[1:])
        for line in (options.output_dir / "README.md").read_text().splitlines()
        if line.startswith("trtexec ")
    ]
    graphs = {graph["file"]: graph for graph in read_json(options.output_dir / "manifest.json")["graphs"].values()}
    assert sorted(command["onnx"] for command in commands) == sorted(graphs)
    for command in commands:
        graph = graphs[command["onnx"]]
        assert "noTF32" in command
        least, best, most = (command[f"{kind}Shapes"] for kind in ("min", "opt", "max"))
        assert least != best != most
        for shapes in (least, best, most):
            name, _, sizes = shapes.partition(":")
            assert name == graph["input"]["name"]
            fixed = [
                (size, int(given))
                for size, given in zip(graph["input"]["shape"], sizes.split("x"), strict=True)
                if isinstance(size, int)
            ]
            assert all(size == given for size, given in fixed)


def test_exporting_again_gives_the_same_files(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, options)
    first = read_json(options.output_dir / "manifest.json")
    export_bundle(pipeline, options)
    assert read_json(options.output_dir / "manifest.json")["files"] == first["files"]


def test_graphs_that_differ_from_pytorch_are_not_written(
    pipeline: MNIFPipeline, options: ExportArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = bundle.graph_cases

    def wrong(*arguments: object) -> object:
        for case in honest(*arguments):
            yield replace(case, expected=case.expected + 1e-2)

    monkeypatch.setattr(bundle, "graph_cases", wrong)
    with pytest.raises(UserError, match=r"decoder: ONNX Runtime differs from PyTorch by 1\.0e-02"):
        export_bundle(pipeline, options)
    assert list(options.output_dir.parent.iterdir()) == []


def test_a_parity_that_is_not_a_number_is_refused(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    pipeline.denoiser.latent_mean.fill_(float("nan"))
    with pytest.raises(UserError, match="differs from PyTorch by nan"):
        export_bundle(pipeline, options)


def test_a_folder_of_something_else_is_left_alone(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    options.output_dir.mkdir()
    for name, content in (("thesis.txt", "years of work"), ("manifest.json", '{"name": "a web page"}')):
        (options.output_dir / name).write_text(content)
        with pytest.raises(UserError, match="something other than a bundle"):
            export_bundle(pipeline, options)
        assert (options.output_dir / name).read_text() == content


@pytest.mark.parametrize(
    ("flag", "value"), [("num_baked", -1), ("num_inference_steps", 0), ("seed", -1), ("resolution", 0)]
)
def test_flags_out_of_range_are_one_line(
    pipeline: MNIFPipeline, options: ExportArguments, flag: str, value: int
) -> None:
    with pytest.raises(UserError, match=f"{flag} {value}"):
        export_bundle(pipeline, replace(options, **{flag: value}))
    assert not options.output_dir.exists()


@pytest.mark.parametrize("finished", [[], ["decoder"]])
def test_a_missing_stage_names_the_command_that_makes_it(
    pipeline: MNIFPipeline, tmp_path: Path, finished: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in finished:
        getattr(pipeline, name).save_pretrained(tmp_path / "model" / name)
    assert main(["export", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "bundle")]) == 2
    assert ("mnif prior" if finished else "mnif fit") in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()


def test_the_compile_gate_is_skipped_aloud_or_demanded(
    pipeline: MNIFPipeline,
    options: ExportArguments,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    export_bundle(pipeline, replace(options, compile_rtx="auto"))
    assert "compile gate skipped: not installed" in capsys.readouterr().out
    assert "gate was not run" in (options.output_dir / "README.md").read_text()
    with pytest.raises(UserError, match="needs TensorRT-RTX"):
        export_bundle(pipeline, replace(options, compile_rtx="on"))


def test_the_compile_gate_is_recorded_as_what_it_is(
    pipeline: MNIFPipeline, options: ExportArguments, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (extra `rtx`) is not installed")
    export_bundle(pipeline, replace(options, compile_rtx="on", num_baked=1))
    assert capsys.readouterr().out.count("not a Jetson build") == 3
    assert "not a Jetson build" in (options.output_dir / "README.md").read_text()
    for figures in read_json(options.output_dir / "manifest.json")["measured"].values():
        assert figures["tensorrt_rtx"]["plan_bytes"] > 0
    assert not [path for path in options.output_dir.rglob("*") if path.suffix in (".plan", ".engine")]


def test_manifest_agrees_with_the_graphs(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, options)
    for graph in json.loads((options.output_dir / "manifest.json").read_text())["graphs"].values():
        model = onnx.load(options.output_dir / graph["file"])
        assert (model.ir_version, model.opset_import[0].version) == (graph["ir_version"], graph["opset"])
        for entry, tensor in ((graph["input"], model.graph.input[0]), (graph["output"], model.graph.output[0])):
            assert entry["name"] == tensor.name
            kind = helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type)
            assert entry["type"] == kind.name
