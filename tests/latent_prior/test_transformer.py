"""The transformer over tokens: what its blocks compute, and everything that denoisers are used for."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from latent_prior import load_pipeline, sample_latents
from latent_prior.commands.prior import parse_prior_arguments
from latent_prior.denoiser_blocks import TransformerBlock, attention
from latent_prior.denoisers import TransformerDenoiser
from latent_prior.diffusion import DenoisingLoss
from mnif.cli import main
from mnif.data.batches import InstanceGenerator, instance_keys
from mnif.latents.table import LatentTable
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.training.run_record import read_run_record
from mnif.utils.json_files import read_json
from tests.conftest import small_decoder


def lively(module: nn.Module) -> nn.Module:
    """Draws all weights, zeros too, so that everything matters."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_a_block_is_multi_head_attention_and_a_network() -> None:
    """Against PyTorch's own attention, with the shares of its heads in view."""
    block, tokens, time = lively(TransformerBlock(64, 8, 0.0)), torch.randn(3, 5, 64), torch.randn(3, 8)
    attention = nn.MultiheadAttention(64, 2, batch_first=True)
    attention.in_proj_weight.data, attention.in_proj_bias.data = block.attend.weight.data, block.attend.bias.data
    attention.out_proj.load_state_dict(block.merge.state_dict())
    scale, shift, gate, scale_up, shift_up, gate_down = block.modulation(time)[:, None].split(64, dim=2)

    def normal(values: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(dim=2, keepdim=True) + 1e-6).sqrt()

    heard = normal(tokens) * (1 + scale) + shift
    heard, shares = attention(heard, heard, heard)
    torch.testing.assert_close(shares.sum(dim=2), torch.ones(3, 5))
    expected = tokens + gate * heard
    inner = block.up(normal(expected) * (1 + scale_up) + shift_up)
    expected = expected + gate_down * block.down(inner * inner.sigmoid())
    torch.testing.assert_close(block(tokens, time), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_half_precision_is_counted_in_float32(dtype: torch.dtype) -> None:
    parts = torch.randn(3, 2, 4, 16, 32).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        heard = attention(*parts)
    assert heard.dtype == dtype
    shares = (parts[0].double() @ parts[1].double().transpose(2, 3) / 32**0.5).softmax(dim=3)
    exact = shares @ parts[2].double()
    assert (heard.double() - exact).abs().max() < 2 * torch.finfo(dtype).eps * exact.abs().max()
    heard.float().sum().backward()
    assert parts.grad.isfinite().all()


def test_a_step_in_mixed_precision_goes_the_same_way() -> None:
    loss, keys = DenoisingLoss(lively(TransformerDenoiser(12, 4, 16, 1, dropout=0.1)), "x0"), torch.arange(64)
    latents, ways = torch.randn(64, 12), []
    for enabled in (False, True):
        loss.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = loss(latents, keys)
        found.backward()
        ways.append(torch.cat([parameter.grad.flatten() for parameter in loss.parameters()]))
    assert torch.cosine_similarity(*ways, dim=0) > 0.99


def test_blocks_begin_by_doing_nothing() -> None:
    tokens = torch.randn(2, 4, 16)
    assert torch.equal(TransformerBlock(16, 8, 0.1)(tokens, torch.randn(2, 8)), tokens)
    assert torch.equal(TransformerDenoiser(12, 4, 16, 2)(torch.randn(2, 12), 500), torch.zeros(2, 12))


def test_places_are_known_by_their_positions_alone() -> None:
    """Without positions, tokens in another order give the prediction in that order; with them they do not."""
    denoiser, sample, order = lively(TransformerDenoiser(12, 4, 16, 2)), torch.randn(3, 4, 3), [2, 0, 3, 1]

    def both_ways() -> tuple[torch.Tensor, torch.Tensor]:
        ahead = denoiser(sample.flatten(1), 300).view(3, 4, 3)[:, order]
        return ahead, denoiser(sample[:, order].flatten(1), 300).view(3, 4, 3)

    ahead, after = both_ways()
    assert (ahead - after).abs().max() > 0.1
    nn.init.zeros_(denoiser.positions)
    torch.testing.assert_close(*both_ways(), atol=1e-4, rtol=1e-4)


def test_dropout_of_an_instance_is_its_own() -> None:
    denoiser = lively(TransformerDenoiser(12, 4, 16, 2, dropout=0.5))
    keys, sample = instance_keys(0, 0, torch.arange(6)), torch.randn(6, 12)
    together = denoiser(sample, 300, InstanceGenerator(keys))
    assert (together - denoiser(sample, 300)).abs().max() > 0.1
    for row in range(6):
        alone = denoiser(sample[row, None], 300, InstanceGenerator(keys[row, None]))
        torch.testing.assert_close(alone[0], together[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"num_tokens": 5}, {"width": 40}])
def test_shares_that_do_not_come_out_even(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"(5 tokens|heads of 32 numbers) share it evenly"):
        TransformerDenoiser(**{"latent_dim": 12, "num_tokens": 4} | settings)


def test_presets_have_the_sizes_that_the_docs_state() -> None:
    for name, parameters in (("edge", 979_984), ("gpu", 17_889_040)):
        flags = parse_prior_arguments(["--run", "x", "--preset", f"transformer-{name}"])
        with torch.device("meta"):
            denoiser = TransformerDenoiser(256, 16, flags.width, flags.depth)
        assert denoiser.num_parameters() == parameters
        page = (Path(__file__).parents[2] / "docs/stage_two.md").read_text()
        assert f"{parameters:,}" in page
    plain = parse_prior_arguments(["--run", "x", "--denoiser", "transformer"])
    edge = parse_prior_arguments(["--run", "x", "--preset", "transformer-edge"])
    assert (plain.denoiser, plain.width, plain.depth) == (edge.denoiser, edge.width, edge.depth)
    wide = parse_prior_arguments(["--run", "x", "--denoiser", "transformer", "--width", "64"])
    assert (wide.width, wide.depth) == (64, edge.depth)


@pytest.fixture(scope="module")
def decoder() -> MNIFModel:
    torch.manual_seed(0)
    settings = {"resolution": 16, "num_bases": 6, "width": 8, "depth": 1, "latent_dim": 12}
    return MNIFModel(**settings, cells=2, tokens=2).eval()


def run_of(decoder: MNIFModel, run: Path) -> Path:
    """What `mnif prior` needs of `mnif fit`."""
    save_component(run / "model", "decoder", decoder)
    torch.manual_seed(1)
    held_out, ids = torch.arange(40) % 5 == 0, [str(index) for index in range(40)]
    LatentTable(torch.randn(40, 12), ids, held_out, decoder.fingerprint(), "noise").save(run / "latents.safetensors")
    (run / "metrics.json").write_text("{}")
    return run


QUICK = ["--max_train_steps", "4", "--train_batch_size", "16", "--compile", "off", "--width", "16", "--depth", "1"]
TRANSFORMER = ["--denoiser", "transformer", *QUICK]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model/denoiser/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("flags", [[], ["--objective", "v", "--sampler", "ancestral"], ["--objective", "flow"]])
def test_priors_of_all_objectives_draw_the_same_from_one_folder(
    decoder: MNIFModel, flags: list[str], tmp_path: Path
) -> None:
    run = run_of(decoder, tmp_path / "run")
    assert main(["prior", "--run", str(run), *TRANSFORMER, *flags, "--learning_rate", "0.05"]) == 0
    assert load_pipeline(run / "model").denoiser.config.num_tokens == 4
    pipelines = [load_pipeline(run), DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=True)]
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    drawn = [sample_latents(pipeline, 0, range(66), 3) for pipeline in pipelines]
    assert torch.equal(*drawn)
    assert torch.equal(sample_latents(pipelines[0], 0, [65], 3)[0], drawn[0][65])  # the same to the last bit
    assert drawn[0].std(dim=0).min() > 1e-3
    half = DiffusionPipeline.from_pretrained(run / "model", trust_remote_code=True, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample_latents(half, 0, range(4), 3).float(), drawn[0][:4], atol=0.1, rtol=0.1)
    steps: list[int] = []
    pipelines[0](
        num_inference_steps=3, output_type="latent", callback_on_step_end=lambda _, step, *rest: steps.append(step)
    )
    assert steps == [0, 1, 2]


def test_a_stopped_prior_ends_with_the_same_weights(decoder: MNIFModel, tmp_path: Path) -> None:
    run = run_of(decoder, tmp_path / "run")
    command = ["prior", *TRANSFORMER, "--checkpointing_steps", "2"]
    assert main([*command, "--run", str(run)]) == 0
    stopped = Path(shutil.copytree(run, tmp_path / "stopped"))
    shutil.rmtree(stopped / "checkpoints/prior/checkpoint-4")
    record = read_json(stopped / "run.json")
    record["prior"]["finished"] = False
    (stopped / "run.json").write_text(json.dumps(record))
    assert main([*command, "--run", str(stopped)]) == 0
    first, second = weights_of(run), weights_of(stopped)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["blocks.0.attend.weight"].std() > 0
    assert first["write.weight"].abs().max() > 0  # it has learned


@pytest.mark.parametrize("student", ["modulated", "transformer"])
def test_students_of_either_kind(
    decoder: MNIFModel, student: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("latent_prior.commands.distill._COMPARED", 32)
    run = run_of(decoder, tmp_path / "run")
    assert main(["prior", "--run", str(run), *TRANSFORMER]) == 0
    flags = [] if student == "modulated" else ["--denoiser", student]
    command = ["distill", "--run", str(run), *flags, *QUICK, "--num_pairs", "32", "--teacher_steps", "4"]
    command += ["--matching_steps", "2"]
    assert main(command) == 0
    assert read_run_record(run)["distill"].finished
    pipeline = load_pipeline(run)
    assert type(pipeline.student).__name__ == {"modulated": "ResMLPDenoiser"}.get(student, "TransformerDenoiser")
    assert pipeline.student.config.distilled_steps == [1, 2, 4]
    pipeline.set_progress_bar_config(disable=True)
    assert torch.equal(*(sample_latents(pipeline, 0, range(2), 1, use_student=use) for use in (None, True)))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (TRANSFORMER, "--denoiser transformer: attends over tokens, and these latents have none; take --denoiser mod"),
        (
            ["--denoiser", "transformer", "--width", "100"],
            "--width 100: a transformer's is a multiple of 32, or below",
        ),
    ],
)
def test_what_a_transformer_cannot_be_gets_one_line(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(small_decoder(), tmp_path / "run")
    assert main(["prior", "--run", str(run), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (run / "run.json").exists()  # nothing was begun
    assert main(["prior", "--run", str(run), *QUICK]) == 0
    capsys.readouterr()
    assert main(["distill", "--run", str(run), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert not (run / "pairs").exists()
