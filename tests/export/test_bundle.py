import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.numpy import load_file

from export.bundle import sample_instances
from export.commands.export import ExportArguments, export_bundle
from export.device import runtime
from export.graphs import fields
from export.graphs.denoisers import for_decoder
from export.graphs.fields import decoder_graph
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import student_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise, sample_latents
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file
from mnif.utils.json_files import read_json
from tests.fakes.onnx_rules import DENOISER, FIELDS, PRECISION, check_output_type, run


@pytest.fixture
def options(tmp_path: Path) -> ExportArguments:
    return ExportArguments(
        model=tmp_path / "model",
        output_dir=tmp_path / "bundle",
        num_baked=2,
        num_inference_steps=[3],
        compile_rtx="off",
    )


def test_command_writes_a_whole_bundle(
    pipeline: MNIFPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    output = tmp_path / "bundle"
    flags = ["--model", tmp_path / "model", "--output_dir", output, "--num_baked", 2, "--num_inference_steps", 3, 1]
    assert main(["export", *map(str, flags), "--resolution", "18", "--compile_rtx", "off"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["decoder", "decoder_mixed", "sampler_3_mixed", "sampler_1_mixed"]
    names += ["baked_0000", "baked_0000_mixed", "baked_0001", "baked_0001_mixed"]
    assert [line.split(":")[0] for line in lines[:8]] == [f"{name}.onnx" for name in names]
    assert all("ONNX checker passed, against float64" in line for line in lines[:8])

    manifest = read_json(output / "manifest.json")
    there = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    assert there == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert (sha256_of_file(output / name), (output / name).stat().st_size) == (entry["sha256"], entry["bytes"])
    assert manifest["decoder_fingerprint"] == pipeline.decoder.fingerprint()
    graphs = manifest["graphs"]
    assert list(graphs) == sorted(names)
    assert graphs["sampler_1_mixed"]["inputs"] == [{"name": "noise", "type": "float32", "shape": ["batch", 12]}]
    assert graphs["sampler_3_mixed"]["outputs"][0]["shape"] == ["batch", 18, 18, 3]
    assert graphs["baked_0001"]["inputs"][0]["shape"] == [4, "points", 2]
    assert graphs["baked_0001"]["instance"] == {"seed": 0, "sample": 1}
    assert (graphs["sampler_3_mixed"]["steps"], graphs["sampler_1_mixed"]["steps"]) == (3, 1)
    assert all(graph["tolerance"]["psnr"] <= graph["psnr"] for graph in graphs.values())
    assert all(graph["psnr"] > 100 for name, graph in graphs.items() if graph["precision"] == "fp32")
    assert (output / "device" / "export" / "device" / "runtime.py").read_bytes() == Path(runtime.__file__).read_bytes()

    assert not (output / "weights.safetensors").exists()
    assert "weights.safetensors" not in (output / "README.md").read_text()
    reference = np.load(output / "reference.npz")
    assert reference["sampler_3.noise"].shape == (3, 12)
    assert reference["sampler_3.values"].shape == (3, 18, 18, 3)
    for graph in graphs.values():
        for side, kind in (("inputs", np.float32), ("outputs", np.float64)):
            assert all(reference[f"{graph['reference']}.{each['name']}"].dtype == kind for each in graph[side])


def test_weights_are_there_for_the_asking(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, replace(options, weights=True))
    assert "weights.safetensors" in (options.output_dir / "README.md").read_text()
    weights = load_file(options.output_dir / "weights.safetensors")
    assert set(weights) == {f"decoder.{name}" for name in pipeline.decoder.state_dict()}
    for name, tensor in pipeline.decoder.state_dict().items():
        stored = weights[f"decoder.{name}"]
        np.testing.assert_array_equal(stored, tensor.numpy().astype(stored.dtype))
        assert stored.dtype == (np.float16 if name.startswith("bases") or name.endswith("map.weight") else np.float32)


def test_baked_samples_are_those_of_the_last_sampler(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, replace(options, num_inference_steps=[1, 4], sampler_precision=["fp32"]))
    reference = np.load(options.output_dir / "reference.npz")
    grid = pipeline.decoder.grid(16)
    values = torch.from_numpy(reference["baked_0001.values"])
    assert values.shape[1] == grid.coordinates.shape[1]  # few enough points to be there whole
    picture = grid.blend(values[None])[0]
    difference = {n: np.abs(reference[f"sampler_{n}.values"][1] - picture.numpy()).max() for n in (1, 4)}
    assert difference[4] < 1e-5 < 1e-3 < difference[1]


def test_a_full_sampler_is_there_for_the_asking(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, replace(options, sampler_precision=["fp32", "mixed"], sampler_storage="fp32"))
    graphs = read_json(options.output_dir / "manifest.json")["graphs"]
    assert graphs["sampler_3"]["psnr"] > 100 > graphs["sampler_3_mixed"]["psnr"] > 50
    assert graphs["sampler_3"]["reference"] == graphs["sampler_3_mixed"]["reference"] == "sampler_3"


def test_without_a_prior_rows_of_the_latent_table_are_baked(
    decoder: MNIFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_component(tmp_path / "run" / "model", "decoder", decoder)
    command = ["export", "--model", str(tmp_path / "run" / "model"), "--compile_rtx", "off"]
    assert main([*command, "--output_dir", str(tmp_path / "alone")]) == 0
    assert list(read_json(tmp_path / "alone" / "manifest.json")["graphs"]) == ["decoder", "decoder_mixed"]
    assert "nothing is baked" in capsys.readouterr().out

    latents, ids = torch.randn(5, 12), [f"picture {i}" for i in range(5)]
    held_out, mark = torch.zeros(5, dtype=torch.bool), decoder.fingerprint()
    LatentTable(latents, ids, held_out, mark, "pictures").save(tmp_path / "run" / "latents.safetensors")
    assert main([*command, "--output_dir", str(tmp_path / "rows"), "--num_baked", "3"]) == 0
    manifest = read_json(tmp_path / "rows" / "manifest.json")
    assert manifest["sampling"] is None
    labels = [graph["instance"] for graph in manifest["graphs"].values() if graph["kind"] == "baked"]
    assert labels == [{"id": f"picture {i}"} for i in (0, 0, 1, 1, 2, 2)]
    chosen = ["--latents", str(tmp_path / "run" / "latents.safetensors"), "--ids", "picture 4", "picture 2"]
    assert main([*command, "--output_dir", str(tmp_path / "chosen"), *chosen, "--precision", "fp32"]) == 0
    reference = np.load(tmp_path / "chosen" / "reference.npz")
    field = decoder.bake(decoder.coefficients(latents[[4]]))
    expected = field(torch.from_numpy(reference["baked_0000.coordinates"]))
    np.testing.assert_allclose(reference["baked_0000.values"], expected.detach().numpy(), atol=1e-5)

    assert main([*command, "--output_dir", str(tmp_path / "other"), *chosen[:3], "picture 9"]) == 2
    assert "--ids picture 9: not in" in capsys.readouterr().err


def test_baked_graphs_after_the_first_few_are_only_checked_for_finite_weights(
    decoder: MNIFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(12, 12)
    ids, held_out = [str(i) for i in range(12)], torch.zeros(12, dtype=torch.bool)
    table = LatentTable(latents, ids, held_out, decoder.fingerprint(), "pictures")
    table.save(tmp_path / "table")
    options = ExportArguments(model=Path("model"), output_dir=tmp_path / "bundle", latents=tmp_path / "table")
    options = replace(options, num_baked=12, compile_rtx="off", precision=["fp32"])
    export_bundle(decoder, options)
    assert "4 further baked graphs" in capsys.readouterr().out
    graphs = read_json(tmp_path / "bundle" / "manifest.json")["graphs"]
    assert graphs["baked_0011"]["reference"] is graphs["baked_0011"]["psnr"] is None
    model = onnx.load(tmp_path / "bundle" / graphs["baked_0011"]["file"])
    check_output_type(model)
    coordinates = decoder.grid(16).coordinates.expand(4, -1, -1)
    (values,) = run(model, {"coordinates": np.ascontiguousarray(coordinates.numpy())})
    expected = decoder.bake(decoder.coefficients(latents[11:]))(coordinates)
    np.testing.assert_allclose(values, expected.detach().numpy(), atol=1e-5)

    latents[11, 0] = float("nan")
    monkeypatch.setattr(LatentTable, "load", lambda *arguments: table)  # which itself would refuse it
    with pytest.raises(UserError, match="baked_0011: weights that are no finite numbers"):
        export_bundle(decoder, replace(options, output_dir=tmp_path / "broken"))
    assert not (tmp_path / "broken").exists()


def test_baked_samples_are_those_of_mnif_sample_to_the_last_bit(
    pipeline: MNIFPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[torch.Tensor] = []

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        drawn.append(sample_latents(*arguments, **options))
        return drawn[-1]

    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("latent_prior.sample_writers.sample_latents", watched)
    flags = ["--num_samples", "70", "--seed", "5", "--num_inference_steps", "3", "--grid", "0"]
    assert main(["sample", "--model", f"{tmp_path}/model", "--output_dir", f"{tmp_path}/drawn", *flags]) == 0
    baked = sample_instances(pipeline, 70, 3, 5, least=3)
    assert torch.equal(baked.latents, torch.cat(drawn)[:70])
    assert torch.equal(sample_instances(pipeline, 1, 3, 5, least=3).latents, drawn[0][:3])
    assert baked.labels[69] == {"seed": 5, "sample": 69}


@pytest.mark.parametrize(("channels", "resolution"), [(1, [9, 14]), (3, [12]), (4, [16])])
def test_padded_values_have_four_channels(
    pipeline: MNIFPipeline, options: ExportArguments, channels: int, resolution: list[int]
) -> None:
    decoder = MNIFModel(channels=channels, resolution=16, num_bases=6, width=8, depth=1, latent_dim=12, cells=2).eval()
    padded = replace(options, pad_channels=True, resolution=resolution, num_baked=1, sampler_precision=["fp32"])
    model = MNIFPipeline(decoder, for_decoder(pipeline.denoiser, decoder), pipeline.scheduler)
    export_bundle(model, padded)
    manifest = read_json(options.output_dir / "manifest.json")
    assert manifest["values"]["channels"] == channels
    assert manifest["values"]["padded_channels"] == 4
    assert manifest["decoder_fingerprint"] == decoder.fingerprint()
    assert all(graph["outputs"][0]["shape"][-1] == 4 for graph in manifest["graphs"].values())
    noise = initial_noise(0, range(2), 12)
    size = resolution[0] if len(resolution) == 1 else tuple(resolution)
    pictures = model(latents=torch.from_numpy(noise), num_inference_steps=3, output_type="latent").images
    expected = decoder(pictures, size).detach().numpy()
    (values,) = run(onnx.load(options.output_dir / "onnx" / "sampler_3.onnx"), {"noise": noise})
    np.testing.assert_allclose(values[..., :channels], expected, atol=1e-4)
    assert not values[..., channels:].any()


def test_a_student_stands_in_the_samplers_of_its_steps(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    torch.manual_seed(1)
    settings = {key: value for key, value in pipeline.denoiser.config.items() if not key.startswith("_")}
    student = ResMLPDenoiser(**settings | {"distilled_steps": [1]}).eval()
    torch.nn.init.normal_(student.write.weight, std=0.2)
    model = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, student_scheduler())
    model.set_progress_bar_config(disable=True)
    flags = {"num_inference_steps": [1, 3], "sampler_precision": ["fp32"], "sampler_storage": "fp32"}
    export_bundle(model, replace(options, num_baked=0, **flags))
    noise = initial_noise(0, range(2), 12)
    drawn = {}
    for steps in (1, 3):
        (values,) = run(onnx.load(options.output_dir / "onnx" / f"sampler_{steps}.onnx"), {"noise": noise})
        latents = model(latents=torch.from_numpy(noise), num_inference_steps=steps, output_type="latent").images
        np.testing.assert_allclose(values, pipeline.decoder(latents).detach().numpy(), atol=1e-4)
        drawn[steps] = values
    assert np.abs(drawn[1] - drawn[3]).max() > 1e-2


def test_exporting_again_gives_the_same_files(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, options)
    first = read_json(options.output_dir / "manifest.json")
    export_bundle(pipeline, options)
    assert read_json(options.output_dir / "manifest.json")["files"] == first["files"]


def test_graphs_that_differ_from_float64_are_not_written(
    pipeline: MNIFPipeline, options: ExportArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = decoder_graph

    def wrong(decoder: MNIFModel, resolution: int) -> onnx.ModelProto:
        graph = honest(decoder, resolution)
        weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "decoder.means.1")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
        return graph

    monkeypatch.setattr(fields, "decoder_graph", wrong)
    with pytest.raises(UserError, match="decoder: ONNX Runtime differs from PyTorch in float64 by"):
        export_bundle(pipeline, options)
    assert list(options.output_dir.parent.iterdir()) == []


def test_a_model_that_gives_no_numbers_is_refused(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    with torch.no_grad():
        pipeline.decoder.bases[0].fill_(float("nan"))
    with pytest.raises(UserError, match="differs from float64 by nan"):
        export_bundle(pipeline, options)
    pipeline.denoiser.latent_mean.fill_(float("nan"))
    with pytest.raises(UserError, match="the denoiser draws NaN or infinity with 3 steps"):
        export_bundle(pipeline, options)


def test_a_folder_of_something_else_is_left_alone(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    options.output_dir.mkdir()
    for name, content in (("thesis.txt", "years of work"), ("manifest.json", '{"name": "a web page"}')):
        (options.output_dir / name).write_text(content)
        with pytest.raises(UserError, match="something other than a bundle"):
            export_bundle(pipeline, options)
        assert (options.output_dir / name).read_text() == content


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("num_baked", -1, "--num_baked -1: must be at least 0"),
        ("num_inference_steps", [4, 0], "--num_inference_steps 0: must be at least 1"),
        ("num_inference_steps", [], "--num_inference_steps: give at least one"),
        ("seed", -1, "--seed -1: must be at least 0"),
        ("resolution", [0], "--resolution 0: must be at least 1"),
        ("resolution", [8, 8, 8], "--resolution 8 8 8: one number, or 2"),
        ("precision", [], "--precision: give at least one"),
        ("ids", ["a"], "--ids: say --latents too"),
    ],
)
def test_flags_out_of_range_are_one_line(
    pipeline: MNIFPipeline, options: ExportArguments, flag: str, value: object, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        export_bundle(pipeline, replace(options, **{flag: value}))
    assert not options.output_dir.exists()


def test_a_missing_decoder_names_the_command_that_makes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "bundle")]) == 2
    assert "mnif fit" in capsys.readouterr().err
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
    export_bundle(pipeline, replace(options, compile_rtx="on"))
    assert capsys.readouterr().out.count("not a Jetson build") == 5  # of the baked graphs the first alone
    assert "not a Jetson build" in (options.output_dir / "README.md").read_text()
    reports = {
        name: metrics["tensorrt_rtx"]
        for name, metrics in read_json(options.output_dir / "manifest.json")["measured"].items()
    }
    assert [name for name, report in reports.items() if report is None] == ["baked_0001", "baked_0001_mixed"]
    assert all(report["plan_bytes"] > 0 for report in reports.values() if report is not None)
    assert not [path for path in options.output_dir.rglob("*") if path.suffix in (".plan", ".engine")]


def test_manifest_agrees_with_the_graphs(pipeline: MNIFPipeline, options: ExportArguments) -> None:
    export_bundle(pipeline, options)
    for name, graph in json.loads((options.output_dir / "manifest.json").read_text())["graphs"].items():
        model = onnx.load(options.output_dir / graph["file"])
        check_output_type(model, FIELDS | DENOISER | PRECISION)
        assert (model.ir_version, model.opset_import[0].version) == (graph["ir_version"], graph["opset"])
        for entries, tensors in ((graph["inputs"], model.graph.input), (graph["outputs"], model.graph.output)):
            assert [entry["name"] for entry in entries] == [tensor.name for tensor in tensors]
        operators = {node.name: node.op_type for node in model.graph.node}
        assert {operators[each] for each in graph["half"]} <= {"MatMul", "Gemm"}
        assert bool(graph["half"]) == (graph["precision"] == "mixed") == name.endswith("_mixed")
