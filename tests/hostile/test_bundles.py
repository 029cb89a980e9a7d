"""Damaged and hostile bundles: manifests and graphs whose hashes an attacker has made anew, plans, references."""

import hashlib
import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.commands.inspect import main as inspect
from export.device import plans
from export.device.backends import load_graph
from export.device.bundle import BundleFolder, manifest_digest
from export.device.graph_file import _OPERATORS
from export.device.runtime import Sampler, load_bundle
from export.device.verify import check_graph
from export.graphs import builder
from tests.hostile.conftest import refusal_of
from tests.hostile.mutators import damaged_bytes, damaged_json


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "bundle"))


def resealed(bundle: Path) -> None:
    """Makes hashes, sizes and digest anew, as far as the manifest is one."""
    path = bundle / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    if not isinstance(manifest, dict):
        return
    files = manifest.get("files")
    for name, entry in files.items() if isinstance(files, dict) else ():
        if isinstance(entry, dict) and (bundle / name).is_file():
            content = (bundle / name).read_bytes()
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))


def changed(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    resealed(bundle)


@pytest.mark.parametrize("seed", range(120))
def test_manifests(seed: int, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(damaged_json(path.read_bytes(), seed))
    resealed(bundle)
    refusal = refusal_of(lambda: BundleFolder(bundle))
    assert inspect(["--bundle", str(bundle)]) == (0 if refusal is None else 2)
    assert len(capsys.readouterr().err.splitlines()) == (refusal is not None)
    if refusal is None:
        refusal_of(lambda: check_sample(bundle))


def check_sample(bundle: Path) -> None:
    values = Sampler(load_bundle(bundle, "onnxruntime"))(1)
    assert values.shape == (1, 15, 15, json.loads((bundle / "manifest.json").read_text())["values"]["channels"])
    assert np.isfinite(values).all()


def into(*keys: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (into("sampling", "latent_dim", value=10**9), "sampling.latent_dim is '1000000000'"),
        (into("values", "channels", value=-1), "values.channels is '-1'"),
        (into("values", "channels", value=4), "values.channels 4"),
        (into("grid", "resolution", value=[15]), "grid.resolution"),
        (into("grid", "resolution", value=[60000, 60000]), "grid.resolution"),
        (into("grid", "cells", value=10**4), "cells"),
        (into("grid", "overlap", value=3), "overlap"),
        (into("grid", value=None), "grid is 'None'"),
        (into("graphs", "decoder", "file", value="../../etc/passwd"), "files has no"),
        (into("graphs", "decoder", "steps", value=10**6), "steps"),
        (into("graphs", "sampler_1", "steps", value=None), "without steps"),
        (into("graphs", "decoder", "inputs", value=[{"name": "x", "type": "f", "shape": []}]), "without a shape"),
        (into("graphs", "decoder", "outputs", value=[]), "no outputs"),
        (into("graphs", "decoder", "profile", value={"x": {"minimum": [10**12]}}), "profile.x.minimum"),
        (into("graphs", "decoder", "tolerance", value={"max_abs": "1", "psnr": 2}), "tolerance.max_abs"),
        (into("graphs", "../x", value={}), "graphs"),
        (into("radiance", value={"size": [8], "intrinsics": [1], "camera_distance": 1}), "radiance"),
        (into("files", value=[]), "files is"),
    ],
)
def test_manifests_that_ask_for_too_much_are_refused(
    change: Callable[[dict[str, Any]], None], words: str, bundle: Path
) -> None:
    changed(bundle, change)
    assert words in (refusal_of(lambda: BundleFolder(bundle)) or "")


def graph_file(bundle: Path, name: str = "decoder") -> Path:
    return bundle / f"onnx/{name}.onnx"


@pytest.mark.parametrize("seed", range(50))
def test_graphs(seed: int, bundle: Path) -> None:
    path = graph_file(bundle)
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    resealed(bundle)
    refusal_of(lambda: load_graph(BundleFolder(bundle), "decoder", "onnxruntime"))


def loop(model: onnx.ModelProto) -> None:
    true = numpy_helper.from_array(np.array(True), "always")
    model.graph.initializer.append(true)
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("go", TensorProto.BOOL, []),
    ]
    body = helper.make_graph([helper.make_node("Identity", ["go"], ["on"])], "body", inputs, [inputs[1]])
    model.graph.node.insert(0, helper.make_node("Loop", ["", "always"], [], body=body))


def constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([60000, 60000]), "sides"))
    model.graph.node.insert(0, helper.make_node("ConstantOfShape", ["sides"], ["large"]))


def expand(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([60000, 60000]), "sides"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1), np.float32), "one"))
    model.graph.node.insert(0, helper.make_node("Expand", ["one", "sides"], ["large"]))


def stated_weight(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(TensorProto(name="large", dims=[60000, 60000], data_type=1, raw_data=b"1234"))


def weight_elsewhere(model: onnx.ModelProto) -> None:
    weight = TensorProto(name="secret", dims=[4], data_type=2, data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="../../../etc/passwd")
    model.graph.initializer.append(weight)


def constant_node(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value_floats=[1.0]))


def own_domain(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("evil", 1))
    model.graph.node.append(helper.make_node("Run", [], ["x"], domain="evil"))


def function(model: onnx.ModelProto) -> None:
    model.functions.add(name="Add", domain="")


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9


def further_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]))


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "x"


@pytest.mark.parametrize(
    "change",
    [
        loop,
        constant,
        expand,
        stated_weight,
        weight_elsewhere,
        constant_node,
        own_domain,
        function,
        opset,
        further_output,
        other_input,
    ],
    ids=lambda change: change.__name__,
)
def test_graphs_that_no_export_writes_are_refused_unseen(
    change: Callable[[onnx.ModelProto], None], bundle: Path
) -> None:
    model = onnx.load(graph_file(bundle))
    change(model)
    graph_file(bundle).write_bytes(model.SerializeToString())
    resealed(bundle)
    assert "not a usable graph" in (refusal_of(lambda: BundleFolder(bundle).onnx("decoder")) or "")


def test_graphs_of_an_export_are_taken(exported: Path) -> None:
    folder = BundleFolder(exported)
    for name in folder.manifest["graphs"]:
        onnx.load_from_string(folder.onnx(name))


@pytest.mark.parametrize("seed", range(30))
def test_references(seed: int, bundle: Path) -> None:
    path = bundle / "reference.npz"
    path.write_bytes(damaged_bytes(path.read_bytes(), seed))
    resealed(bundle)
    folder = BundleFolder(bundle)
    if refusal_of(folder.reference) is None:
        check_graph(folder, folder.reference(), "decoder", "onnxruntime")


def test_references_that_are_bombs_are_refused(bundle: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**9,)})
    for body in (b"", bytes(1 << 20)):
        with zipfile.ZipFile(bundle / "reference.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("decoder.coefficients.npy", header.getvalue() + body)
        resealed(bundle)
        assert "damaged" in (refusal_of(BundleFolder(bundle).reference) or "")
    np.savez(bundle / "reference.npz", a=np.array([{}], dtype=object))
    resealed(bundle)
    assert "damaged" in (refusal_of(BundleFolder(bundle).reference) or "")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MNIF_STATE", str(tmp_path / "state"))
    path = tmp_path / "engines/decoder.plan"
    facts = {
        "builder": "tensorrt",
        "builder_version": "10.3.0",
        "gpu": "Orin",
        "driver": "12.6",
        "onnx_sha256": "0" * 64,
        "compute_capabilities": ["8.7"],
        "profiles": [],
        "half": [],
        "optimization_level": None,
    }
    kernel = {"profile": 0, "name": "k", "kind": "gemm", "inputs": ["Half"], "outputs": ["Half"], "nodes": ["a"]}
    report = {"seconds": 1.0, "built_at": "now", "typing": "strong", "flags": [], "kernels": [kernel]}
    plans.write_plan(path, b"a plan", facts, report, [])
    return path


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_sidecars(seed: int, sealed: bool, plan: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = plans.sidecar_path(plan)
    path.write_bytes(damaged_json(path.read_bytes(), seed))
    if sealed:
        try:
            content = json.loads(path.read_text())
            rest = {key: value for key, value in content.items() if key != "seal"}
            path.write_text(json.dumps(rest | {"seal": plans._seal(rest)}))
        except (ValueError, RecursionError, AttributeError):
            pass
    refusal = refusal_of(lambda: plans.read_plan(plan, {"builder": "tensorrt"}))
    if refusal is None:
        assert plans.read_plan(plan, {}) == b"a plan"
    code = inspect(["--plan", str(plan), "--kernels"])
    assert code in (0, 2)
    assert len(capsys.readouterr().err.splitlines()) == (code == 2)


def test_operators_are_those_that_exports_write() -> None:
    sources = "".join(path.read_text() for path in Path(builder.__file__).parent.glob("*.py"))
    quoted = set(re.findall(r'"([A-Z][A-Za-z]+)"', sources)) - {"CPUExecutionProvider", "UniPCMultistepScheduler"}
    assert quoted == _OPERATORS
