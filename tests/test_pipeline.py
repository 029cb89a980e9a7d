import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from PIL import Image

from latent_prior.denoiser import LatentDenoiser
from latent_prior.noise import initial_noise
from latent_prior.objective import DenoisingLoss, sampling_scheduler, validation_loss
from latent_prior.pipeline import MNIFPipeline, load_pipeline, scheduler_by_name
from latent_prior.train import add_prior
from mnif.errors import UserError
from mnif.model_folder import save_component


def test_output_types_agree(pipeline: MNIFPipeline) -> None:
    noise = torch.randn(3, 12)
    pictures = {kind: pipeline(latents=noise, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert pictures["latent"].shape == (3, 12)
    assert pictures["np"].shape == (3, 16, 16, 3)
    torch.testing.assert_close(pictures["pt"].permute(0, 2, 3, 1), torch.from_numpy(pictures["np"]))
    np.testing.assert_array_equal(np.asarray(pictures["pil"][1]), (pictures["np"][1] * 255).round().astype(np.uint8))
    decoded = (pipeline.decoder(pictures["latent"]) / 2 + 0.5).clamp(0, 1).detach()
    torch.testing.assert_close(decoded, torch.from_numpy(pictures["np"]))


def test_generator_steps_resolution_and_return_dict(pipeline: MNIFPipeline) -> None:
    def draw(seed: int, **settings: object) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        (images,) = pipeline(2, generator, output_type="np", return_dict=False, **settings)
        return images

    np.testing.assert_array_equal(draw(0), draw(0))
    assert not np.array_equal(draw(0), draw(1))
    assert not np.array_equal(draw(0), draw(0, num_inference_steps=3))
    assert draw(0, resolution=37).shape == (2, 37, 37, 3)


@pytest.mark.parametrize("settings", [{"output_type": "jpg"}, {"num_inference_steps": 0}])
def test_settings_out_of_range_are_refused(pipeline: MNIFPipeline, settings: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        pipeline(**settings)


def test_saved_pipeline_draws_the_same_in_a_fresh_process(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    expected = pipeline(generator=torch.Generator().manual_seed(3)).images[0]
    program = (
        "import sys, torch; from latent_prior.pipeline import MNIFPipeline; "
        "pipeline = MNIFPipeline.from_pretrained(sys.argv[1]); "
        "pipeline(generator=torch.Generator().manual_seed(3)).images[0].save(sys.argv[2])"
    )
    picture = tmp_path / "0.png"
    subprocess.run([sys.executable, "-c", program, tmp_path / "model", picture], check=True, capture_output=True)
    np.testing.assert_array_equal(np.asarray(Image.open(picture)), np.asarray(expected))
    assert not [path for path in (tmp_path / "model").rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_sample_depends_on_seed_and_number_alone(pipeline: MNIFPipeline) -> None:
    noise = initial_noise(7, range(5), 12)
    np.testing.assert_array_equal(initial_noise(7, [3], 12)[0], noise[3])
    together = pipeline(latents=torch.from_numpy(noise), output_type="latent").images
    alone = pipeline(latents=torch.from_numpy(noise[3:4]), output_type="latent").images
    torch.testing.assert_close(together[3:4], alone, atol=1e-5, rtol=0)


def test_loading_names_what_is_missing(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder"):
        load_pipeline(tmp_path / "model")
    save_component(tmp_path / "model", "decoder", pipeline.decoder)
    with pytest.raises(UserError, match="has no denoiser; `mnif prior` makes it"):
        load_pipeline(tmp_path / "model")
    add_prior(tmp_path / "model", pipeline)
    load_pipeline(tmp_path / "model")
    with torch.no_grad():
        pipeline.decoder.bases[0].add_(0.1)
    save_component(tmp_path / "model", "decoder", pipeline.decoder)
    with pytest.raises(UserError, match="the denoiser was trained for decoder"):
        load_pipeline(tmp_path / "model")
    (tmp_path / "model/decoder/diffusion_pytorch_model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="damaged component"):
        load_pipeline(tmp_path / "model")


def test_scheduler_by_name() -> None:
    current = sampling_scheduler("x0")
    swapped = scheduler_by_name("DDIMScheduler", current)
    assert isinstance(swapped, DDIMScheduler)
    assert swapped.config.prediction_type == "sample"
    with pytest.raises(UserError, match="no such scheduler"):
        scheduler_by_name("PlanetScheduler", current)
    with pytest.raises(UserError, match="does not fit"):
        scheduler_by_name("FlowMatchEulerDiscreteScheduler", current)
    with pytest.raises(UserError, match="scales its samples"):
        scheduler_by_name("EulerDiscreteScheduler", current)


class ExactDenoiser(LatentDenoiser):
    """The posterior mean of x0 for data N(mean, std²) per dimension, in closed form; or the flow's velocity."""

    mean, std = 1.5, 0.4

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        time = torch.as_tensor(timestep).reshape(-1, 1).double()
        if self.flow:
            signal, noise = 1 - time / 1000, time / 1000
        else:
            alphas = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()
            product = alphas[time.long()]
            signal, noise = product.sqrt(), (1 - product).sqrt()
        variance = signal**2 * self.std**2 + noise**2
        clean = self.mean + signal * self.std**2 / variance * (sample - signal * self.mean)
        return ((sample - clean) / noise if self.flow else clean).to(sample.dtype)


@pytest.mark.parametrize("objective", ["x0", "flow"])
def test_sampler_reaches_a_gaussian_whose_denoiser_is_known(pipeline: MNIFPipeline, objective: str) -> None:
    denoiser = ExactDenoiser(latent_dim=12, width=16, depth=1)
    denoiser.flow = objective == "flow"
    exact = MNIFPipeline(pipeline.decoder, denoiser, sampling_scheduler(objective))
    exact.set_progress_bar_config(disable=True)
    steps = 100 if objective == "flow" else 20
    latents = exact(2000, torch.Generator().manual_seed(0), steps, output_type="latent").images
    assert latents.mean().item() == pytest.approx(ExactDenoiser.mean, abs=0.02)
    assert latents.std().item() == pytest.approx(ExactDenoiser.std, rel=0.05)


@pytest.mark.parametrize("objective", ["x0", "flow"])
def test_exact_denoiser_has_a_smaller_loss_than_its_neighbours(objective: str) -> None:
    torch.manual_seed(0)
    latents = ExactDenoiser.mean + ExactDenoiser.std * torch.randn(512, 12)
    denoiser = ExactDenoiser(latent_dim=12, width=16, depth=1)
    denoiser.flow = objective == "flow"
    losses = {}
    for std in (0.3, 0.4, 0.55):
        denoiser.std = std
        losses[std] = validation_loss(DenoisingLoss(denoiser, objective), latents)
    assert min(losses, key=losses.__getitem__) == 0.4


def test_default_scheduler_is_deterministic() -> None:
    scheduler = sampling_scheduler("x0")
    assert isinstance(scheduler, DPMSolverMultistepScheduler)
    assert scheduler.config.algorithm_type == "dpmsolver++"
