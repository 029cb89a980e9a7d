"""Guidance by a weaker prior: what is predicted, what is drawn, and who may guide whom."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from latent_prior.commands.prior import add_prior
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import OBJECTIVES, Objective, noise_levels, sampling_scheduler
from latent_prior.distillation import Teacher
from latent_prior.guidance import GuidedDenoiser, guided_pipeline
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import sample_latents
from mnif.cli import main
from mnif.models.io import save_component
from mnif.utils.errors import UserError
from tests.conftest import small_decoder, small_pipeline
from tests.latent_prior.test_distill import run

__all__ = ["run"]  # the fixture


def weaker(pipeline: MNIFPipeline, objective: Objective = "x0") -> MNIFPipeline:
    """A prior of the same latents with other weights."""
    weak = small_pipeline(pipeline.decoder).denoiser
    weak.register_to_config(prediction_type=OBJECTIVES[objective].prediction_type)
    for parameter in weak.parameters():
        parameter.data.mul_(0.7)
    return MNIFPipeline(pipeline.decoder, weak, sampling_scheduler(objective))


def test_scales_of_one_and_zero_are_the_strong_and_the_weak_prior_to_the_bit(pipeline: MNIFPipeline) -> None:
    strong, weak = pipeline.denoiser, weaker(pipeline).denoiser
    noisy, timestep = torch.randn(50, 12), torch.arange(0, 1000, 20)
    with torch.no_grad():
        ours, theirs = (denoiser(noisy, timestep) for denoiser in (strong, weak))
        assert torch.equal(GuidedDenoiser(strong, weak, 1)(noisy, timestep), ours)
        assert torch.equal(GuidedDenoiser(strong, weak, 0)(noisy, timestep), theirs)
        guided = GuidedDenoiser(strong, weak, 2)
        torch.testing.assert_close(guided(noisy, timestep), 2 * ours - theirs)
        late = GuidedDenoiser(strong, weak, 2, start=0.3)
        assert torch.equal(late(noisy, timestep), torch.where(timestep[:, None] >= 700, ours, guided(noisy, timestep)))
        assert torch.equal(late(noisy, 700), strong(noisy, 700))
        assert torch.equal(late(noisy, torch.tensor(699)), guided(noisy, torch.tensor(699)))
    assert guided.config == strong.config
    assert torch.equal(guided.to_latents(noisy), strong.to_latents(noisy))


class Gaussian(ResMLPDenoiser):
    """Knows what is clean in noisy numbers of a normal distribution, each by itself."""

    def __init__(self, objective: Objective, mean: float, std: float):
        super().__init__(latent_dim=3, width=8, depth=0)
        self.register_to_config(prediction_type=OBJECTIVES[objective].prediction_type)
        self.objective, self.mean, self.std = objective, mean, std

    def forward(self, sample: Tensor, timestep: Tensor | float, *_: object) -> Tensor:
        alpha, sigma = (
            level[:, None] for level in noise_levels(self.objective, torch.as_tensor(timestep).reshape(-1))
        )
        clean = self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (sample - alpha * self.mean)
        return OBJECTIVES[self.objective].target(clean, (sample - alpha * clean) / sigma, alpha, sigma)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guided_scores_of_gaussians_in_closed_form(objective: Objective) -> None:
    """The score follows the prediction in a line: guided by 3 it is 3 (strong's) − 2 (weak's)."""
    guided = GuidedDenoiser(Gaussian(objective, 1.0, 0.5), Gaussian(objective, 0.4, 0.8), 3)
    timestep, noisy = torch.arange(20, 970, 19), torch.randn(50, 3)
    alpha, sigma = (level[:, None] for level in noise_levels(objective, timestep))
    clean = OBJECTIVES[objective].clean(noisy, guided(noisy, timestep), alpha, sigma)
    score = (alpha * clean - noisy) / sigma**2
    strong, weak = (-(noisy - alpha * mean) / (alpha**2 * std**2 + sigma**2) for mean, std in ((1.0, 0.5), (0.4, 0.8)))
    torch.testing.assert_close(score, 3 * strong - 2 * weak, rtol=1e-3, atol=1e-3)


def test_gaussians_are_led_away_from_a_wider_one() -> None:
    """Of equal means the guided distribution keeps it and is narrower, the more the stronger the guidance."""
    strong, weak = Gaussian("x0", 0.3, 0.5), Gaussian("x0", 0.3, 0.8)
    noise = torch.randn(2000, 3)
    drawn = [Teacher(GuidedDenoiser(strong, weak, scale), "x0", 20).samples(noise, 999) for scale in (1, 1.5, 2)]
    assert drawn[0].std().item() == pytest.approx(0.5, abs=0.02)
    assert drawn[2].std() + 0.03 < drawn[1].std() < drawn[0].std() - 0.03
    assert all(samples.mean().item() == pytest.approx(0.3, abs=0.03) for samples in drawn)


@pytest.fixture
def guide(pipeline: MNIFPipeline, tmp_path: Path) -> Path:
    """A run folder with a weaker prior."""
    save_component(tmp_path / "weak/model", "decoder", pipeline.decoder)
    add_prior(tmp_path / "weak/model", weaker(pipeline))
    return tmp_path / "weak"


def test_a_guided_pipeline_draws_and_is_not_saved(pipeline: MNIFPipeline, guide: Path, tmp_path: Path) -> None:
    noise, guided = torch.randn(4, 12), {scale: guided_pipeline(pipeline, guide, scale) for scale in (1.0, 2.0)}
    drawn = {scale: guided[scale](latents=noise, output_type="latent").images for scale in guided}
    assert torch.equal(drawn[1.0], pipeline(latents=noise, output_type="latent").images)
    assert (drawn[2.0] - drawn[1.0]).abs().max() > 0.1
    with pytest.raises(UserError, match="a GuidedDenoiser is not saved; save the pipelines"):
        guided[2.0].save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_sample_draws_guided_and_knows_by_what(
    run: Path, pipeline: MNIFPipeline, guide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sample", "--model", str(run), "--output_dir", str(tmp_path / "drawn"), "--num_samples", "3"]
    command += ["--num_inference_steps", "2", "--grid", "0", "--guide", str(guide)]
    assert main([*command, "--guidance_scale", "3"]) == 0
    drawn = guided_pipeline(pipeline, guide, 3)
    latents = sample_latents(drawn, 0, range(3), 2)
    shown = np.stack([np.asarray(Image.open(tmp_path / f"drawn/00000{i}.png")) for i in range(3)])
    expected = 255 * (pipeline.decoder(latents) / 2 + 0.5).clamp(0, 1).detach().numpy()
    assert np.abs(shown - expected).max() < 1
    assert not torch.allclose(latents, sample_latents(pipeline, 0, range(3), 2), atol=0.1)
    capsys.readouterr()
    assert main(command) == 2  # 1.5, the default
    assert "drawn with guidance_scale 3.0, not 1.5" in capsys.readouterr().err
    assert main(command[:-2]) == 2
    assert "drawn with denoiser guided, not teacher" in capsys.readouterr().err
    assert main([*command, "--guidance_scale", "3", "--guidance_start", "0.5"]) == 2
    assert "guidance_start" in capsys.readouterr().err
    command[command.index(str(tmp_path / "drawn"))] = str(tmp_path / "late")
    assert main([*command, "--guidance_scale", "3", "--guidance_start", "0.5"]) == 0
    late = sample_latents(guided_pipeline(pipeline, guide, 3, 0.5), 0, range(3), 2)
    shown = np.stack([np.asarray(Image.open(tmp_path / f"late/00000{i}.png")) for i in range(3)])
    expected = 255 * (pipeline.decoder(late) / 2 + 0.5).clamp(0, 1).detach().numpy()
    assert np.abs(shown - expected).max() < 1
    assert not torch.allclose(late, latents, atol=1e-3)


def of_another_decoder(pipeline: MNIFPipeline) -> MNIFPipeline:
    decoder = small_decoder()
    torch.nn.init.zeros_(next(decoder.parameters()))
    return small_pipeline(decoder)


def of_shifted_latents(pipeline: MNIFPipeline) -> MNIFPipeline:
    weak = weaker(pipeline)
    weak.denoiser.latent_mean += 0.01
    return weak


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda pipeline: weaker(pipeline, "flow"), "predicts flow_prediction, the prior's sample; train it with"),
        (of_shifted_latents, "trained on latents of another mean and spread"),
        (of_another_decoder, "its latents are another decoder's"),
        (None, "no such model folder"),
    ],
)
def test_what_cannot_guide_gets_one_line_in_time(
    run: Path,
    pipeline: MNIFPipeline,
    made: Callable[[MNIFPipeline], MNIFPipeline] | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    guide = run.with_name("guide")
    if made is not None:
        weak = made(pipeline)
        save_component(guide, "decoder", weak.decoder)
        add_prior(guide, weak)
    output = run.with_name("drawn")
    assert main(["sample", "--model", str(run), "--guide", str(guide), "--output_dir", str(output)]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert str(guide) in told
    assert not any(path.is_file() for path in output.rglob("*.*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--guidance_scale", "2"], "--guidance_scale 2: away from what? --guide names a prior"),
        (["--guide", "x", "--guidance_scale", "0.5"], "--guidance_scale 0.5: a finite number from 1 on"),
        (["--guide", "x", "--guidance_scale", "inf"], "--guidance_scale inf: a finite number from 1 on"),
        (["--guide", "x", "--guidance_start", "1"], "--guidance_start 1: must be at least 0 and below 1"),
        (["--guidance_start", "0.2"], "--guidance_start 0.2: of which guidance? --guide names a weaker prior"),
    ],
)
def test_scales_out_of_range(run: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--model", str(run), "--output_dir", str(run.with_name("drawn")), *flags]) == 2
    assert message in capsys.readouterr().err
