import sys
from pathlib import Path

import onnx
import pytest

from export.cases import graph_cases
from export.gate import compile_with_rtx
from latent_prior.pipeline import MNIFPipeline
from mnif.errors import UserError

PROFILE = {"noise": {"minimum": (1, 4), "optimum": (8, 4), "maximum": (64, 4)}}


def test_every_graph_compiles_without_a_gpu(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (extra `rtx`) is not installed")
    names = []
    for case in graph_cases(pipeline, num_baked=1, num_inference_steps=2, resolution=16, seed=0):
        onnx.save_model(case.model, tmp_path / "graph.onnx")
        report = compile_with_rtx(tmp_path / "graph.onnx", case.profile)
        assert report.plan_bytes > 0
        assert "8.6" in report.compute_capabilities
        names.append(case.name)
    assert names == ["decoder", "sampler", "baked_0000"]


def test_a_refused_graph_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (extra `rtx`) is not installed")
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(UserError, match=r"broken\.onnx: TensorRT-RTX .* cannot read the graph: ") as refusal:
        compile_with_rtx(tmp_path / "broken.onnx", PROFILE)
    assert "\n" not in str(refusal.value)


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UserError, match="mnif-diffusion"):
        compile_with_rtx(tmp_path / "graph.onnx", PROFILE)
