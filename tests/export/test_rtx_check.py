import sys
from pathlib import Path

import onnx
import pytest

from export.bundle import Selection
from export.graphs.rtx_check import compile_with_rtx
from export.graphs.sampler import sampler_spec
from export.graphs.specs import make_variants
from latent_prior.denoisers import TransformerDenoiser
from latent_prior.pipeline import MNIFPipeline
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from tests.conftest import small_encoder

PROFILE = {"noise": {"minimum": (1, 4), "optimum": (8, 4), "maximum": (64, 4)}}


def test_every_graph_compiles_without_a_gpu(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX (extra `rtx`) is not installed")
    signal = {"signal": "radiance", "signal_settings": {"resolution": 6, "samples": 5}}
    radiance = MNIFModel(
        channels=4, dimensions=3, num_bases=4, width=8, depth=1, latent_dim=6, cells=2, **signal
    ).eval()
    pictures = Selection(
        pipeline.decoder, pipeline, resolution=16, steps=[2], num_baked=1, seed=0, encoder=small_encoder()
    )
    objects = Selection(radiance, None, resolution=6, steps=[], num_baked=0, seed=0)
    decoder = MNIFModel(num_bases=4, width=8, depth=1, latent_dim=8, cells=2, tokens=2).eval()
    denoiser = TransformerDenoiser(8, 4, 64, 1, decoder_fingerprint=decoder.fingerprint()).eval()
    over_tokens = MNIFPipeline(decoder, denoiser, pipeline.scheduler)
    over_tokens.set_progress_bar_config(disable=True)
    transformer = sampler_spec(over_tokens, 2, 16, seed=0)
    names = []
    for spec in (*pictures.specs(), *objects.specs(), transformer):
        for form in make_variants(spec, ["fp32", "mixed"]):
            onnx.save_model(form.model, tmp_path / "graph.onnx")
            report = compile_with_rtx(tmp_path / "graph.onnx", spec.profile)
            assert report.plan_bytes > 0
            assert "8.6" in report.compute_capabilities
            names.append(form.name)
    kinds = ["decoder", "encoder", "sampler_2", "baked_0000", "decoder", "rays", "points", "sampler_2"]
    assert names == [name for kind in kinds for name in (kind, f"{kind}_mixed")]


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
