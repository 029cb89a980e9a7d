"""What TensorRT-RTX makes of a bundle's graphs, read from its log on a machine without a GPU."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from export.device.bundle import BundleFolder
from export.device.tensorrt import build_plan, compute_capabilities, find_builder, kernels_of_log
from mnif.cli import main

# Kernels a call may launch; a field has one for each layer's product and one for each sine, decoders mix and blend.
BUDGET = {
    "baked_0000": 5,
    "baked_0000_mixed": 5,
    "decoder": 11,
    "decoder_mixed": 11,
    "encoder": 36,
    "encoder_mixed": 36,
    "sampler_1": 22,
    "sampler_1_mixed": 22,
    "sampler_3": 40,
    "sampler_3_mixed": 43,
}
LINE = (
    "Name: __myl_CastAddSinCast_myl1_2, LayerType: kgen, Inputs: [ { Name: a, Dimensions: [4,-1,8], Datatype: Half, "
    "Format: x }], Constants: [ { Name: b, Dimensions: [4,1,8], Datatype: Float, Format: x }], Outputs: [ { Name: c, "
    "Dimensions: [4,-1,8], Datatype: Half, Format: x }], TacticName: t, StreamId: 0, "
    "Metadata: [ONNX Layer: layer_1/sum][ONNX Layer: layer_1/sine]"
)


PARSED = re.compile(r"(?P<name>\S+) \[(?P<operator>\w+)\] (?P<side>inputs|outputs): (?P<tensors>.*)")
PARSED_TYPE = re.compile(r"\)\[(\w+)\]")


def node_types_of_log(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Node → (operator, type of its first input) as the parser understood the graph, such as ("Sin", "FLOAT")."""
    types = {}
    for line in lines:
        found = PARSED.match(line)
        if found is not None and found["side"] == "inputs":
            first = PARSED_TYPE.findall(found["tensors"])
            types[found["name"]] = (found["operator"], first[0] if first else "")
    return types


def test_a_kernel_is_read_whole() -> None:
    idle = "Name: s_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , Metadata: "
    (kernel,) = kernels_of_log(["Building.", f"Layers:\n{idle}\n{LINE}\n\nI/O Tensors:\n Name: a, IOMode: Input"])
    assert (kernel.profile, kernel.kind) == (1, "kgen")
    assert (kernel.inputs, kernel.outputs) == (["Half", "Float"], ["Half"])
    assert kernel.nodes == ["layer_1/sum", "layer_1/sine"]
    assert kernels_of_log(["TensorRT 8 prints none of this"]) == []


@pytest.mark.parametrize("name", BUDGET)
def test_every_graph_compiles_for_every_gpu_within_its_budget(exported: Path, name: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (extra `rtx`) is not installed")
    module, folder = find_builder("tensorrt_rtx"), BundleFolder(exported)
    graph = folder.graph(name)
    targets = compute_capabilities(module)
    assert {"8.6", "8.9", "12.0"} <= set(targets)
    plan = build_plan(module, folder.onnx(name), [graph["profile"]], compute_capabilities=targets)
    kernels = kernels_of_log(plan.log)
    assert 0 < len(kernels) <= BUDGET[name]

    types = node_types_of_log(plan.log)
    sines = {node: kind for node, (operator, kind) in types.items() if operator == "Sin"}
    assert sines, name
    assert set(sines.values()) == {"FLOAT"}
    halves = [node for node, (operator, kind) in types.items() if operator in ("MatMul", "Gemm") and kind == "HALF"]
    assert sorted(halves) == sorted(graph["half"])
    written = {kind for kernel in kernels for kind in kernel.outputs}
    assert ("Half" in written) == (graph["precision"] == "mixed")


def test_build_and_inspect(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (extra `rtx`) is not installed")
    monkeypatch.setenv("MNIF_STATE", str(tmp_path / "state"))
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    build = ["build", "--bundle", str(bundle), "--builder", "tensorrt_rtx", "--graphs", "baked_0000_mixed"]
    build += ["--batch_sizes", "1"]
    assert main([*build, "--compute_capabilities", "8.6"]) == 0
    assert main([*build, "--compute_capabilities", "8.7"]) == 2
    assert "does not build for 8.7; it knows 8.0, 8.6, " in capsys.readouterr().err
    assert main(["inspect", "--bundle", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "sampler_3_mixed" in shown
    assert "for compute capability 8.6" in shown
    assert "2 profiles" in shown
    plan = bundle / "engines" / "baked_0000_mixed.plan"
    assert main(["inspect", "--plan", str(plan)]) == 0
    shown = capsys.readouterr().out
    assert "layer_1/product" in shown
    assert "Float+Half → Half" in shown
    monkeypatch.setenv("MNIF_STATE", str(tmp_path / "other"))
    assert main(["inspect", "--plan", str(plan)]) == 2
    assert main(["inspect", "--bundle", str(bundle)]) == 0
    assert "baked_0000_mixed: refused, its sidecar" in capsys.readouterr().out
