"""The builder's rules, followed on recorded surfaces of TensorRT; none of this is TensorRT itself."""

import json
import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.device.bundle import BundleError
from export.device.tensorrt import Plan, build_plan, find_builder, version_of
from tests.fakes.tensorrt import VERSIONS, members, recorded_tensorrt

PROFILE = {"x": {"minimum": (1, 4), "optimum": (8, 4), "maximum": (64, 4)}}


def graph(int8: bool = False) -> bytes:
    """x → sin(x @ a) in float32 → half product → float32 → sine, as *mixed* has it; ``int8`` stores a so."""
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(random.standard_normal((4, 4)).astype(kind), name)
        for name, kind in (("first", np.float32), ("second", np.float16))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["a"], name="first_product"),
        helper.make_node("Sin", ["a"], ["b"], name="first_sine"),
        helper.make_node("Cast", ["b"], ["c"], name="narrow", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["c", "second"], ["d"], name="hidden_product"),
        helper.make_node("Cast", ["d"], ["e"], name="widen", to=TensorProto.FLOAT),
        helper.make_node("Sin", ["e"], ["y"], name="last_sine"),
    ]
    if int8:
        weights[0] = numpy_helper.from_array(random.integers(-127, 128, (4, 4)).astype(np.int8), "stored")
        weights.append(numpy_helper.from_array(np.float32(0.01), "scale"))
        nodes.insert(0, helper.make_node("DequantizeLinear", ["stored", "scale"], ["first"], name="widen_first"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")]
    made = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def told(plan: Plan) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(plan.content)
    return content


@pytest.mark.parametrize("version", VERSIONS)
def test_mixed_precision_by_each_versions_rules(version: str) -> None:
    module = recorded_tensorrt(version)
    plan = build_plan(module, graph(), [PROFILE], half=["hidden_product"], timing_cache=b"")
    builder = told(plan)
    major = int(version.split(".")[0])
    flags = module.NetworkDefinitionCreationFlag
    assert "TF32" not in builder["flags"]
    assert builder["settings"] == {"verbosity": "DETAILED"}
    if major == 8:
        assert builder["network_flags"] == 1 << int(flags.EXPLICIT_BATCH)
        assert builder["flags"] == ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
        single, half = ({"precision": kind, "output_0": kind} for kind in ("float32", "float16"))
        # Casts keep their own types; everything arithmetic is held.
        assert builder["held"] == {
            "first_product": single,
            "first_sine": single,
            "hidden_product": half,
            "last_sine": single,
        }
    else:
        assert builder["network_flags"] == (1 << int(flags.STRONGLY_TYPED) if major == 10 else 0)
        assert builder["flags"] == []
        assert builder["held"] == {}
    assert plan.settings["typing"] == ("constraints" if major == 8 else "strong")


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_needs_no_flags_and_no_tf32(version: str) -> None:
    builder = told(build_plan(recorded_tensorrt(version), graph(), [PROFILE]))
    assert builder["flags"] == []
    assert builder["held"] == {}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("half", [[], ["hidden_product"]])
def test_matrices_stored_in_int8_need_a_flag_in_8(version: str, half: list[str]) -> None:
    builder = told(build_plan(recorded_tensorrt(version), graph(int8=True), [PROFILE], half=half))
    assert ("INT8" in builder["flags"]) == version.startswith("8.")
    assert "widen_first" not in builder["held"]


@pytest.mark.parametrize("version", VERSIONS)
def test_profiles_and_timing_cache(version: str) -> None:
    exact = {"x": dict.fromkeys(("minimum", "optimum", "maximum"), (1, 4))}
    plan = build_plan(recorded_tensorrt(version), graph(), [exact, PROFILE], timing_cache=b"old")
    assert told(plan)["profiles"] == [{"x": [[1, 4]] * 3}, {"x": [[1, 4], [8, 4], [64, 4]]}]
    assert plan.timing_cache == b"old+1"
    assert build_plan(recorded_tensorrt(version), graph(), [PROFILE]).timing_cache is None


def test_optimisation_levels_came_with_8_6() -> None:
    with pytest.raises(BundleError, match=r"TensorRT 8\.5\.2 has no optimisation levels"):
        build_plan(recorded_tensorrt("8.5.2"), graph(), [PROFILE], optimization_level=4)
    for version in VERSIONS[1:]:
        builder = told(build_plan(recorded_tensorrt(version), graph(), [PROFILE], optimization_level=4))
        assert builder["settings"]["level"] == 4


@pytest.mark.parametrize("version", VERSIONS)
def test_a_truncated_graph_is_one_line(version: str) -> None:
    with pytest.raises(
        BundleError, match=rf"TensorRT {version} cannot read the graph: MODEL_DESERIALIZE_FAILED"
    ) as no:
        build_plan(recorded_tensorrt(version), graph()[:-40], [PROFILE])
    assert "\n" not in str(no.value)


def test_compute_capabilities_are_for_rtx_alone() -> None:
    with pytest.raises(BundleError, match="only TensorRT-RTX takes compute capabilities"):
        build_plan(recorded_tensorrt("10.3.0"), graph(), [PROFILE], compute_capabilities=["8.7"])


def test_a_builder_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    module = recorded_tensorrt("10.3.0")

    def none(logger: Any) -> None:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    module.Builder = none
    with pytest.raises(BundleError, match="TensorRT finds no GPU it can build for: pybind11"):
        build_plan(module, graph(), [PROFILE])


def test_old_and_missing_builders_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = recorded_tensorrt("8.5.2")
    module.__version__ = "8.4.1"
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BundleError, match=r"TensorRT 8\.4\.1: 8\.5 or newer is needed"):
        find_builder("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BundleError, match=r"^tensorrt is not installed; JetPack brings"):
        find_builder("tensorrt")


def test_the_surfaces_differ_where_versions_do() -> None:
    """The record itself: what the rules turn on."""
    by_version = {version: members(version) for version in VERSIONS}
    typed = [
        version for version in VERSIONS if "STRONGLY_TYPED" in by_version[version]["NetworkDefinitionCreationFlag"]
    ]
    assert typed == ["10.3.0", "10.13.3", "10.16.1", "11.4.0"]
    assert "FP16" not in by_version["11.4.0"]["BuilderFlag"]
    assert "TF32" in by_version["11.4.0"]["BuilderFlag"]
    assert "execute_async_v3" in by_version["8.5.2"]["IExecutionContext"]
    assert version_of(recorded_tensorrt("10.13.3")) == (10, 13)
    module = recorded_tensorrt("11.4.0")
    with pytest.raises(AttributeError):
        module.Builder(None).create_builder_config().int8_calibrator = None
    with pytest.raises(AttributeError):
        _ = module.BuilderFlag.FP16


def test_the_graph_of_these_tests_is_one() -> None:
    onnx.checker.check_model(onnx.load_from_string(graph()), full_check=True)
