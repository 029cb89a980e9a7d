"""What `mnif prior` learns and with what: objectives, denoisers, presets, and what bad input gets."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from latent_prior.commands.prior import parse_prior_arguments
from latent_prior.denoisers import Denoiser, PaperDenoiser, ResMLPDenoiser, TransformerDenoiser
from latent_prior.diffusion import (
    OBJECTIVES,
    DenoisingLoss,
    Objective,
    noise_levels,
    objective_of,
    penalty,
    sampling_scheduler,
    student_scheduler,
)
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from mnif.cli import main
from mnif.data.batches import instance_keys
from mnif.latents.table import LatentTable
from mnif.models.io import save_component
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError


class Knowing(Denoiser):
    """Its clean latent is off by ``offset``, whatever it is that it has to predict."""

    def __init__(self, clean: torch.Tensor, offset: float, objective: Objective):
        super().__init__(clean.shape[1])
        self.clean, self.offset, self.objective = clean, offset, objective

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *_: object) -> torch.Tensor:
        guess = self.clean + self.offset
        if self.objective == "x0":
            return guess
        if self.objective == "flow":
            return (sample - guess) / (timestep[:, None] / 1000)
        product = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[timestep][:, None]
        noise = (sample - product.sqrt() * guess) / (1 - product).sqrt()
        return product.sqrt() * noise - (1 - product).sqrt() * guess


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("weighting", ["plain", "snr-plus-one", "min-snr"])
def test_weights_of_an_error_of_the_clean_latent(objective: Objective, weighting: str) -> None:
    clean, noise, time = torch.randn(7, 5), torch.randn(7, 5), torch.linspace(0.05, 0.95, 7)
    loss = DenoisingLoss(Knowing(clean, 0.5, objective), objective, weighting, snr_limit=3.0)
    if objective == "flow":
        snr, noise_share = ((1 - time) / time).square(), time.square()
    else:
        product = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[(time * 1000).long()]
        snr, noise_share = product / (1 - product), 1 - product
    expected = {
        "plain": torch.ones(7) if objective == "x0" else 1 / noise_share,
        "snr-plus-one": (snr + 1).clamp(max=3),
        "min-snr": snr.clamp(max=3),
    }[weighting]
    torch.testing.assert_close(loss.at(clean, noise, time), expected * 0.25, rtol=2e-3, atol=1e-5)


def test_velocity_is_that_of_diffusers() -> None:
    clean, noise, time = torch.randn(6, 5), torch.randn(6, 5), torch.linspace(0.1, 0.9, 6)
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")

    class Velocity(Denoiser):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *_: object) -> torch.Tensor:
            torch.testing.assert_close(sample, scheduler.add_noise(clean, noise, timestep))
            return scheduler.get_velocity(clean, noise, timestep)

    assert DenoisingLoss(Velocity(5), "v", "plain").at(clean, noise, time).max() < 1e-10


def test_size_of_an_error_in_closed_form() -> None:
    error = torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(penalty(error, "mse"), torch.tensor([2.25, 1.0]))
    huber = penalty(error, "pseudo-huber", scale=2.0)
    torch.testing.assert_close(huber, torch.tensor([0.5, 5**0.5 - 2]))  # √(9/4 + 4) − 2


def test_latent_noise_reaches_training_and_not_validation() -> None:
    clean = torch.zeros(4000, 3)
    loss = DenoisingLoss(Knowing(clean, 0.0, "x0"), "x0", "plain", latent_noise=0.3)
    loss.denoiser.latent_std.fill_(2.0)
    assert loss(clean, instance_keys(0, 0, torch.arange(4000))).item() == pytest.approx(0.09, rel=0.05)
    assert loss.at(clean, torch.randn_like(clean), torch.rand(4000)).max() == 0


class Gaussian(Denoiser):
    """The posterior mean, or the velocity, of data N(1.5, 0.4²) per dimension, in closed form."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *_: object) -> torch.Tensor:
        alpha, sigma = (level.double() for level in noise_levels("x0", timestep.reshape(-1, 1)))
        gain = alpha * 0.4**2 / (alpha**2 * 0.4**2 + sigma**2)
        clean = 1.5 + gain * (sample - alpha * 1.5)
        return (clean if self.objective == "x0" else (alpha * sample - clean) / sigma).to(sample.dtype)


@pytest.mark.parametrize(
    ("objective", "scheduler", "steps"),
    [
        ("x0", sampling_scheduler("x0", ancestral=True), 1000),
        ("v", sampling_scheduler("v", ancestral=True), 1000),
        ("v", sampling_scheduler("v"), 20),
        ("x0", student_scheduler(), 50),
    ],
)
def test_schedulers_reach_a_gaussian_whose_denoiser_is_known(
    objective: Objective, scheduler: DDPMScheduler, steps: int
) -> None:
    assert objective_of(scheduler) == objective
    denoiser, generator = Gaussian(4), torch.Generator().manual_seed(0)
    denoiser.objective = objective
    samples = torch.randn(2000, 4, generator=generator)
    scheduler.set_timesteps(steps)
    noise = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
    for timestep in scheduler.timesteps:
        samples = scheduler.step(denoiser(samples, timestep), timestep, samples, **noise).prev_sample
    assert samples.mean().item() == pytest.approx(1.5, abs=0.02)
    assert samples.std().item() == pytest.approx(0.4, rel=0.06)


def test_what_schedulers_do_not_fit() -> None:
    assert objective_of(sampling_scheduler("flow")) == "flow"
    with pytest.raises(UserError, match="prediction_type 'epsilon'"):
        objective_of(DDPMScheduler())
    with pytest.raises(UserError, match="a flow is sampled without noise"):
        sampling_scheduler("flow", ancestral=True)


def test_the_papers_denoiser_has_the_papers_size() -> None:
    with torch.device("meta"):
        assert PaperDenoiser(latent_dim=1024).num_parameters() / 1e6 == pytest.approx(279, abs=0.5)


def test_skips_of_the_papers_denoiser() -> None:
    """Block depth/2 + i gets what went into block depth/2 − 1 − i besides what came out of the block before it."""
    torch.manual_seed(0)
    denoiser = PaperDenoiser(latent_dim=3, width=32, depth=6)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    into: list[torch.Tensor] = []
    out: list[torch.Tensor] = []

    def note(block: torch.nn.Module, given: tuple, made: torch.Tensor) -> None:
        into.append(given[0])
        out.append(made)

    for block in denoiser.blocks:
        block.register_forward_hook(note)
    denoiser(torch.randn(4, 3), 500)
    for index in range(1, 6):
        skip = into[5 - index] if index >= 3 else 0
        torch.testing.assert_close(into[index], out[index - 1] + skip)


@pytest.mark.parametrize(
    "denoiser", [ResMLPDenoiser(6, 16, 2), PaperDenoiser(6, 64, 2), TransformerDenoiser(6, 3, 16, 2)]
)
def test_one_time_for_all_is_as_good_as_one_for_each(denoiser: Denoiser) -> None:
    torch.manual_seed(0)
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    sample = torch.randn(3, 6)
    together = denoiser(sample, torch.tensor([700, 700, 700]))
    torch.testing.assert_close(denoiser(sample, 700), together, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(denoiser(sample, 100), together)


def test_the_paper_preset_is_the_papers_recipe() -> None:
    parsed = parse_prior_arguments(["--run", "x", "--preset", "paper"])
    recipe = {"objective": "x0", "weighting": "plain", "loss": "mse", "sampler": "ancestral", "denoiser": "paper"}
    recipe |= {"width": 4096, "depth": 8, "train_batch_size": 64, "num_train_epochs": 1000, "learning_rate": 1e-4}
    recipe |= {
        "weight_decay": 0.01,
        "ema_decay": 0.9999,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 0,
        "keep": "last",
    }
    assert {name: getattr(parsed, name) for name in recipe} == recipe
    shorter = parse_prior_arguments(["--run", "x", "--preset", "paper", "--max_train_steps", "7"])
    assert (shorter.max_train_steps, shorter.num_train_epochs) == (7, None)
    edge = parse_prior_arguments(["--run", "x", "--preset", "edge"])
    assert ResMLPDenoiser(128, edge.width, edge.depth).num_parameters() < 1.2e6


@pytest.fixture
def run(decoder: MNIFModel, tmp_path: Path) -> Path:
    """What `mnif prior` needs of `mnif fit`: a decoder and its latents."""
    save_component(tmp_path / "run/model", "decoder", decoder)
    table_of(decoder).save(tmp_path / "run/latents.safetensors")
    return tmp_path / "run"


def table_of(decoder: MNIFModel, fingerprint: str | None = None) -> LatentTable:
    held_out = torch.arange(40) % 5 == 0
    ids = [str(index) for index in range(40)]
    return LatentTable(torch.randn(40, 12), ids, held_out, fingerprint or decoder.fingerprint(), "noise")


QUICK = ["--max_train_steps", "4", "--train_batch_size", "16", "--compile", "off"]


def test_the_papers_prior_stands_in_the_folder_and_draws(run: Path) -> None:
    (run / "metrics.json").write_text("{}")
    small = ["--preset", "paper", "--width", "32", "--depth", "2", *QUICK]
    assert main(["prior", "--run", str(run), *small]) == 0
    pipeline = load_pipeline(run / "model")
    assert isinstance(pipeline.denoiser, PaperDenoiser)
    assert isinstance(pipeline.scheduler, DDPMScheduler)
    assert pipeline.scheduler.config.variance_type == "fixed_large"
    assert not pipeline.scheduler.config.clip_sample
    again = MNIFPipeline.from_pretrained(run / "model")
    drawn = [p(3, torch.Generator().manual_seed(0), 7, output_type="latent").images for p in (pipeline, again)]
    assert torch.equal(*drawn)


def test_extra_latents_are_learned_too(
    run: Path, decoder: MNIFModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.json").write_text("{}")
    extra = table_of(decoder)
    extra.held_out[:] = False
    extra.save(tmp_path / "extra.safetensors")
    command = ["prior", "--run", str(run), "--width", "16", "--depth", "1", *QUICK]
    assert main([*command, "--extra_latents", f"{tmp_path}/extra.safetensors", "--num_train_epochs", "2"]) == 0
    assert "72 latents to train, 8 held out" in capsys.readouterr().out
    assert json.loads((run / "run.json").read_text())["prior"]["arguments"]["max_train_steps"] == 8
    table_of(decoder, "0" * 64).save(tmp_path / "other.safetensors")
    assert main([*command, "--extra_latents", f"{tmp_path}/other.safetensors"]) == 2
    assert "belong to decoder 000000000000" in capsys.readouterr().err


def test_a_fit_that_has_not_finished_is_refused(
    run: Path, decoder: MNIFModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Model and latents of an earlier fit may lie there while a new one is on its way."""
    record = {"command": "mnif fit --data x", "arguments": {}, "inputs": {}, "finished": False}
    (run / "run.json").write_text(json.dumps({"fit": record}))
    (run / "metrics.json").write_text("{}")
    assert main(["prior", "--run", str(run), "--width", "16", "--depth", "1", *QUICK]) == 2
    message = f"mnif prior: {run}: its `mnif fit` has not finished; continue it with: mnif fit --data x\n"
    assert capsys.readouterr().err == message
    assert main(["distill", "--run", str(run)]) == 2
    assert "no denoiser" in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps({"prior": record | {"command": "mnif prior"}}))
    assert main(["distill", "--run", str(run)]) == 2
    assert "its `mnif prior` has not finished" in capsys.readouterr().err


def test_a_run_stands_for_its_model_and_its_flags_for_another_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.json").write_text("{}")
    assert (
        main(["prior", "--run", str(run), "--width", "16", "--depth", "1", "--report_to", "tensorboard", *QUICK]) == 0
    )
    assert [*(run / f"logs/{run.name}/prior").glob("events.*")]
    first = load_pipeline(run / "model").denoiser.state_dict()
    assert main(["sample", "--model", str(run), "--output_dir", f"{tmp_path}/drawn", "--num_samples", "2"]) == 0
    assert (tmp_path / "drawn/000001.png").is_file()
    (tmp_path / "other/model").mkdir(parents=True)
    for name in ("model/decoder", "latents.safetensors", "metrics.json"):
        (shutil.copytree if (run / name).is_dir() else shutil.copy)(run / name, tmp_path / "other" / name)
    again = ["prior", "--config", f"{run}/config.yaml", "--run", f"{tmp_path}/other"]
    capsys.readouterr()
    assert main(again) == 0
    second = load_pipeline(tmp_path / "other/model").denoiser.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--width", "0"], "--width 0: must be at least 1"),
        (["--dropout", "1"], "--dropout 1.0: must be at least 0 and below 1"),
        (["--latent_noise", "-1"], "--latent_noise -1.0: must be at least 0"),
        (["--snr_limit", "0"], "--snr_limit 0.0: must be above 0"),
        (["--objective", "flow", "--sampler", "ancestral"], "a flow is sampled without noise"),
        (["--denoiser", "paper", "--width", "40"], "a multiple of 16 and above it, and an even depth"),
        (
            ["--preset", "poster"],
            "--preset poster: neither a JSON file nor one of edge, paper, transformer-edge, transformer-gpu",
        ),
        (["--learning_rate", "1e30", *QUICK], "not finite at step 4; no checkpoint was written yet; lower --learning"),
    ],
)
def test_bad_input_gets_one_line(
    run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prior", "--run", str(run), *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
    assert len(lines) == 1
    assert message in lines[0]
    assert not (run / "model/denoiser").exists()


def test_latents_of_mirrored_pictures(decoder: MNIFModel, tmp_path: Path, picture_folder: Path) -> None:
    save_component(tmp_path / "model", "decoder", decoder)
    (tmp_path / "mirrored").mkdir()
    for path in sorted(picture_folder.iterdir())[:4]:
        with Image.open(path) as picture:
            (tmp_path / "plain").mkdir(exist_ok=True)
            square = picture.crop((0, 0, 16, 16))
            square.save(tmp_path / "plain" / path.name)
            square.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored" / path.name)
    latents = {}
    for folder, flags in (("plain", ["--mirror"]), ("mirrored", [])):
        command = ["encode", "--model", f"{tmp_path}/model", "--data", f"{tmp_path}/{folder}", *flags]
        assert main([*command, "--refinement_steps", "2", "--output_dir", f"{tmp_path}/out_{folder}"]) == 0
        latents[folder] = LatentTable.load(tmp_path / f"out_{folder}/latents.safetensors").latents
    assert latents["plain"].abs().max() > 0.01
    torch.testing.assert_close(latents["plain"], latents["mirrored"])
