"""Every signal in every layout of its latents, learned in every way that there is; the whole chain over tokens, and
over sparse coefficients."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from mnif.cli import main
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel

SMALL = ["--num_bases", "6", "--width", "8", "--depth", "1", "--encoder_width", "32", "--latent_dim", "64"]
SMALL += ["--cells", "4"]
QUICK = ["--max_train_steps", "8", "--lr_warmup_steps", "0", "--train_batch_size", "4", "--validation_steps", "8"]
QUICK += ["--compile", "off"]
OF_SIGNAL = {
    "image": ["--resolution", "16"],
    "voxels": ["--stride", "2"],
    "radiance": ["--rays_per_step", "16", "--samples_per_ray", "8", "--held_out_views", "1"],
}
LAYOUTS = {"global": [], "tokens": ["--latent_layout", "tokens", "--tokens", "2"]}
METHODS = ["encoder", "auto-decoding", "meta"]
NO_TOKENS = ("radiance", "encoder")  # views are not laid out as tokens are


@pytest.fixture(scope="module")
def data(picture_folder: Path, ball_views: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A few instances of every signal; a shape is what lies below a slope, which is soon learned."""
    shapes = tmp_path_factory.mktemp("shapes") / "slopes.npz"
    generator, (x, y, z) = np.random.default_rng(0), np.mgrid[0:8, 0:8, 0:8]
    slopes = generator.uniform(-0.5, 0.5, (24, 2))
    np.savez(shapes, voxels=np.stack([y - 3.5 < a * (x - 3.5) + b * (z - 3.5) for a, b in slopes]))
    return {"image": picture_folder, "voxels": shapes, "radiance": ball_views}


@pytest.fixture
def fit(data: dict[str, Path], tmp_path: Path) -> Callable[..., int]:
    """Runs a few steps of `mnif fit` on a signal's data into tmp_path/run, and gives the exit code."""

    def run(signal: str, *flags: str) -> int:
        command = ["fit", "--data", str(data[signal]), "--output_dir", f"{tmp_path}/run", "--refinement_steps", "2"]
        return main([*command, "--held_out_fraction", "0.25", *SMALL, *QUICK, *OF_SIGNAL[signal], *flags])

    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("signal", OF_SIGNAL)
def test_every_signal_in_every_layout_learned_in_every_way(
    signal: str, layout: str, method: str, fit: Callable, data: dict[str, Path], tmp_path: Path, capsys
) -> None:
    run, encoded, decoded = (tmp_path / name for name in ("run", "encoded", "decoded"))
    if layout != "global" and (signal, method) == NO_TOKENS:
        assert fit(signal, "--method", method, *LAYOUTS[layout]) == 2
        assert "has no encoder for tokens; take --method auto-decoding or meta" in capsys.readouterr().err
        assert not run.exists()
        return
    assert fit(signal, "--method", method, *LAYOUTS[layout]) == 0
    model = ["--model", f"{run}/model"]
    encode = ["encode", *model, "--data", str(data[signal]), "--output_dir", str(encoded), "--split", "held_out"]
    assert main([*encode, "--held_out_fraction", "0.25", "--refinement_steps", "2"]) == 0
    decode = ["decode", *model, "--latents", f"{encoded}/latents.safetensors", "--output_dir", str(decoded)]
    assert main([*decode, "--num", "1"]) == 0
    decoder = load_component(MNIFModel, run / "model", "decoder")
    assert decoder.config.tokens == (2 if layout == "tokens" else None)
    table = LatentTable.load(run / "latents.safetensors", decoder.fingerprint(), 64)
    assert table.latents.abs().max() > 0
    found, fitted = (json.loads((folder / "metrics.json").read_text()) for folder in (encoded, run))
    assert found["psnr"] == pytest.approx(fitted["psnr_heldout"], abs=0.05)  # the same search


@pytest.mark.parametrize(("signal", "method"), [("image", "encoder"), ("voxels", "encoder"), ("radiance", "meta")])
def test_the_whole_chain_over_tokens_and_sparse_coefficients(
    signal: str, method: str, fit: Callable, data: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prior, student, samples, an exported bundle with everything measured in it, evaluation and report."""
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 32)
    run, model = tmp_path / "run", ["--model", f"{tmp_path}/run/model"]
    small = ["--width", "16", "--depth", "1", *QUICK]
    small += ["--denoiser", "transformer"] if signal == "image" else []
    flip, augment = (["--random_flip"], ["--augment"]) if method == "encoder" else ([], [])
    rules = {"image": "place", "radiance": "largest"}
    sparse = ["--coefficient_sparsity", "2", "--sparsity_rule", rules[signal]] if signal in rules else []
    assert fit(signal, "--method", method, "--latent_layout", "tokens", *flip, *sparse) == 0  # as many tokens as cells
    samplers = ["--num_inference_steps", "1", "2", "--sampler_precision", "fp32", "mixed", "--sampler_storage", "int8"]
    evaluate = ["eval", "--reference", str(data[signal]), "--held_out_fraction", "0.25", "--num_samples", "8"]
    commands = [
        ["prior", "--run", str(run), *augment, *small],
        ["distill", "--run", str(run), "--num_pairs", "32", "--teacher_steps", "4", "--matching_steps", "2", *small],
        ["sample", *model, "--num_samples", "2", "--output_dir", f"{run}/pictures"],
        ["export", *model, "--output_dir", f"{run}/bundle", "--num_baked", "1", "--compile_rtx", "off", *samplers],
        ["verify", "--bundle", f"{run}/bundle", "--backends", "onnxruntime", "onnx-reference"],
        [*evaluate, *model, "--output_dir", f"{run}/eval"],
        ["report", "--run", str(run)],
    ]
    for command in commands:
        assert main(command) == 0, command
    manifest = json.loads((run / "bundle/manifest.json").read_text())
    sampler = onnx.load(run / "bundle" / manifest["graphs"]["sampler_2"]["file"])
    stored = {tensor.name for tensor in sampler.graph.initializer}
    assert "decoder.coefficient_map.write.weight" in stored
    assert ("denoiser.positions" in stored) == (signal == "image")
    assert ("coefficients/origins" in stored) == (signal == "image")
    assert ("TopK" in {node.op_type for node in sampler.graph.node}) == (signal == "radiance")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tokens", "2"], "--tokens 2: needs --latent_layout tokens"),
        (["--latent_layout", "tokens", "--tokens", "3"], "--tokens 3: must divide the cells along each axis, 4"),
        (["--latent_layout", "tokens", "--cells", "1"], "--tokens 1: a place needs 2 tokens"),
        (["--latent_layout", "tokens", "--latent_dim", "30"], "--latent_dim 30: 16 tokens share it evenly"),
        (["--latent_layout", "tokens", "--coefficient_form", "direct"], "--coefficient_form direct: the latent is"),
        (["--latent_layout", "tokens", "--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--coefficient_sparsity", "0"], "--coefficient_sparsity 0: must be at least 1"),
        (["--coefficient_sparsity", "6"], "--coefficient_sparsity 6: must be below --num_bases, 6"),
        (["--coefficient_sparsity", "2", "--mixing", "average"], "--coefficient_sparsity 2: needs --mixing delta"),
        (["--coefficient_sparsity", "4"], "--coefficient_sparsity 4: must divide the number of bases, 6"),
        (["--coefficient_sparsity", "2", "--cells", "1"], "--coefficient_sparsity 2: makes 6 bases 3 sets"),
    ],
)
def test_layouts_that_cannot_be(flags: list[str], words: str, fit: Callable, tmp_path: Path, capsys) -> None:
    assert fit("image", *flags) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "run").exists()
