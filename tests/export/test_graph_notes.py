"""What graphs say of themselves: complete, true, the same from export to export, and without a change to a number."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import shape_inference

from export.commands.export import ExportArguments, export_bundle
from export.device.bundle import BundleFolder
from export.graph_notes import write_notes
from latent_prior.diffusion import student_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.utils.json_files import read_json
from tests.conftest import small_pipeline
from tests.fakes.onnx_rules import DENOISER, ENCODER, FIELDS, PRECISION, check_output_type, run


def test_every_graph_says_what_it_is(exported: Path) -> None:
    folder = BundleFolder(exported)
    for name, entry in folder.manifest["graphs"].items():
        model = onnx.load_from_string(folder.onnx(name))  # the board's reader takes it
        check_output_type(model, FIELDS | DENOISER | ENCODER | PRECISION)
        facts = {each.key: each.value for each in model.metadata_props}
        assert model.graph.name == name
        assert model.doc_string.startswith(f"{entry['kind']}: ")
        assert f"Computed in {entry['precision']}" in model.doc_string
        assert facts["decoder_fingerprint"] == folder.manifest["decoder_fingerprint"]
        assert (facts["precision"], facts["storage"]) == (entry["precision"], entry["storage"])
        assert ("steps" in facts) == ("scheduler" in facts) == (entry["kind"] == "sampler")
        assert ("steps of UniPCMultistepScheduler unrolled" in model.doc_string) == (entry["kind"] == "sampler")
        assert json.loads(facts.get("instance", "null")) == entry["instance"]
        assert all(tensor.doc_string for tensor in (*model.graph.input, *model.graph.output))
        assert all(node.name for node in model.graph.node)


def test_shapes_of_everything_between_are_there_and_right(exported: Path) -> None:
    folder = BundleFolder(exported)
    for name in ("decoder_mixed", "sampler_3", "baked_0000"):
        model = onnx.load_from_string(folder.onnx(name))
        between = {output for node in model.graph.node for output in node.output}
        between -= {output.name for output in model.graph.output}
        shapes = {value.name: value.type.tensor_type for value in model.graph.value_info}
        assert shapes.keys() == between

        # Every tensor's true shape, from a copy that gives all of them out.
        entry, whole = folder.graph(name), shape_inference.infer_shapes(model)
        del whole.graph.output[:]
        whole.graph.output.extend(onnx.ValueInfoProto(name=each) for each in sorted(between))
        whole = shape_inference.infer_shapes(whole)
        arrays = {
            source: np.zeros(profile["optimum"], dtype=np.float32) for source, profile in entry["profile"].items()
        }
        for each, array in zip(sorted(between), run(whole, arrays), strict=True):
            stated = [axis.dim_value or None for axis in shapes[each].shape.dim]
            assert len(stated) == array.ndim
            assert all(size in (None, length) for size, length in zip(stated, array.shape, strict=True)), each


def test_notes_change_no_number_and_repeat(exported: Path) -> None:
    folder = BundleFolder(exported)
    for name in ("decoder", "sampler_3_mixed"):
        model = onnx.load_from_string(folder.onnx(name))
        plain = onnx.ModelProto()
        plain.CopyFrom(model)
        for note in ("doc_string", "metadata_props"):
            plain.ClearField(note)
        for note in ("doc_string", "value_info"):
            plain.graph.ClearField(note)
        reference = folder.reference()
        (source,) = model.graph.input
        inputs = {source.name: reference[f"{folder.graph(name)['reference']}.{source.name}"]}
        np.testing.assert_array_equal(run(model, inputs)[0], run(plain, inputs)[0])
        write_notes(plain, name, folder.manifest)
        assert plain.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)


def test_the_data_is_named_if_its_latents_are_there(
    pipeline: MNIFPipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder = tmp_path / "run"
    pipeline.save_pretrained(run_folder / "model")
    table = LatentTable(
        torch.randn(3, 12),
        list("abc"),
        torch.zeros(3, dtype=torch.bool),
        pipeline.decoder.fingerprint(),
        "/home/x/pets",
    )
    export = ["export", "--model", str(run_folder / "model"), "--num_baked", "0", "--compile_rtx", "off"]
    export += ["--num_inference_steps", "1", "--precision", "fp32", "--output_dir"]
    for fingerprint, expected in ((table.fingerprint, "pets"), ("0" * 64, None)):
        table.fingerprint = fingerprint
        table.save(run_folder / "latents.safetensors")
        output = tmp_path / str(expected)
        assert main([*export, str(output)]) == 0
        model = onnx.load(output / "onnx/decoder.onnx")
        facts = {each.key: each.value for each in model.metadata_props}
        assert facts.get("trained_on") == expected == read_json(output / "manifest.json")["trained_on"]


def test_other_flags_leave_a_graph_as_it_was(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    """Plans are kept for graphs that are the same to the byte."""
    options = ExportArguments(model=Path("model"), output_dir=tmp_path / "a", num_baked=1, compile_rtx="off")
    export_bundle(pipeline, replace(options, num_inference_steps=[1]))
    others = {"num_inference_steps": [3, 1], "triton": True, "precision": ["fp32"]}
    export_bundle(pipeline, replace(options, output_dir=tmp_path / "b", **others))
    for name in ("sampler_1_mixed", "decoder", "baked_0000"):
        path = f"onnx/{name}.onnx"
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), name


def test_a_students_sampler_names_its_own_scheduler(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    student = small_pipeline(pipeline.decoder).denoiser
    student.register_to_config(distilled_steps=[1])
    model = MNIFPipeline(pipeline.decoder, pipeline.denoiser, pipeline.scheduler, student, student_scheduler())
    options = ExportArguments(model=Path("model"), output_dir=tmp_path / "bundle", num_baked=0, compile_rtx="off")
    export_bundle(model, replace(options, num_inference_steps=[1, 3]))
    graphs = read_json(options.output_dir / "manifest.json")["graphs"]
    names = [type(each).__name__ for each in (student_scheduler(), pipeline.scheduler)]
    assert [graphs[f"sampler_{steps}_mixed"]["scheduler"] for steps in (1, 3)] == names
    assert names[0] != names[1]
    readme = (options.output_dir / "README.md").read_text()
    assert f"1 steps of {names[0]}, 3 steps of {names[1]} unrolled" in readme
