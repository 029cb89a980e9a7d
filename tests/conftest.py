"""Small real models and data that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU then

from jaxtyping import install_import_hook

# Shapes and types in these modules' annotations are checked at every call, in tests only.
install_import_hook(
    [
        "mnif.models.siren",
        "mnif.models.cell_grid",
        "mnif.models.encoders",
        "mnif.models.mnif_model",
        "mnif.models.sparse_coefficients",
        "mnif.signals.base",
        "mnif.signals.volume_rendering",
        "latent_prior.denoiser_blocks",
        "latent_prior.denoisers",
        "latent_prior.diffusion",
        "latent_prior.distillation",
        "latent_prior.sampling",
        "latent_prior.schedulers",
    ],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SchedulerMixin
from PIL import Image

from export.commands.export import ExportArguments, export_bundle
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.models.encoders import PatchEncoder
from mnif.models.mnif_model import MNIFModel
from mnif.signals.volume_rendering import turntable_poses
from mnif.utils import process

torch.set_num_threads(1)
process.BAR_DELAY = float("inf")  # a slow machine would show bars among the lines that tests look at


@pytest.fixture
def decoder() -> MNIFModel:
    return small_decoder()


def small_decoder() -> MNIFModel:
    torch.manual_seed(0)
    return MNIFModel(resolution=16, num_bases=6, width=8, depth=1, latent_dim=12, cells=2)


def small_encoder() -> PatchEncoder:
    torch.manual_seed(2)
    return PatchEncoder(3, 16, latent_dim=12, patches=2, patch_width=16, patch_features=8, width=32).eval()


@pytest.fixture
def pipeline(decoder: MNIFModel) -> MNIFPipeline:
    return small_pipeline(decoder)


def small_pipeline(decoder: MNIFModel) -> MNIFPipeline:
    """A pipeline whose denoiser is random but bounded, so that unrolled steps stay in range."""
    torch.manual_seed(1)
    denoiser = ResMLPDenoiser(latent_dim=12, width=16, depth=2, decoder_fingerprint=decoder.fingerprint())
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser.latent_mean.normal_()
    denoiser.latent_std.uniform_(0.5, 2)
    scheduler: SchedulerMixin = sampling_scheduler("x0")
    pipeline = MNIFPipeline(decoder, denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of 15×15 pictures, two baked, samplers of 1 and 3 steps, an encoder; who changes it copies it."""
    output = tmp_path_factory.mktemp("exported") / "bundle"
    options = ExportArguments(
        model=output.parent,
        output_dir=output,
        num_baked=2,
        num_inference_steps=[1, 3],
        resolution=[15],
        sampler_precision=["fp32", "mixed"],
        compile_rtx="off",
    )
    export_bundle(small_pipeline(small_decoder()), options, encoder=small_encoder())
    return output


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 drawings of 20×16 pixels: a coloured disc on a coloured ground."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:20]
    for index in range(48):
        ground, colour = generator.integers(0, 256, (2, 3))
        centre, radius = generator.uniform(4, 12, 2), generator.uniform(2, 6)
        disc = (rows - centre[0]) ** 2 + (columns - centre[1] - 2) ** 2 < radius**2
        Image.fromarray(np.where(disc[..., None], colour, ground).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def ball_views(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 folders with a ``transforms.json`` and 6 views of 16×16 pixels: a ball of one colour on white."""
    folder = tmp_path_factory.mktemp("balls")
    generator = np.random.default_rng(0)
    poses = np.concatenate([turntable_poses(3, 2.5, elevation).double().numpy() for elevation in (15.0, 50.0)])
    poses = poses[[0, 4, 2, 3, 1, 5]]
    slope = (np.arange(16) + 0.5 - 8) / 8 * np.tan(0.45)
    in_camera = np.stack([*np.meshgrid(slope, -slope), -np.ones((16, 16))], axis=-1)
    for index in range(12):
        (folder / f"{index:02d}").mkdir()
        colour, centre = generator.integers(0, 200, 3), generator.uniform(-0.3, 0.3, 3)
        radius, frames = generator.uniform(0.35, 0.6), []
        for view, pose in enumerate(poses):
            rays = in_camera @ pose[:3, :3].T
            along = rays @ (centre - pose[:3, 3]) / np.square(rays).sum(axis=-1)
            nearest = np.linalg.norm(pose[:3, 3] + along[..., None] * rays - centre, axis=-1)
            pixels = np.where((nearest < radius)[..., None], colour, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index:02d}/{view}.png")
            frames.append({"file_path": f"{view}.png", "transform_matrix": pose.tolist()})
        (folder / f"{index:02d}/transforms.json").write_text(json.dumps({"camera_angle_x": 0.9, "frames": frames}))
    return folder


@pytest.fixture(scope="session")
def ball_run(tmp_path_factory: pytest.TempPathFactory, ball_views: Path) -> Path:
    """A short fit of all of them, on five of the six views."""
    run = tmp_path_factory.mktemp("runs") / "balls"
    fit = ["fit", "--data", str(ball_views), "--output_dir", str(run), "--held_out_views", "1", "--compile", "off"]
    fit += ["--held_out_fraction", "0", "--test_fraction", "0", "--train_batch_size", "12", "--rays_per_step", "64"]
    fit += ["--cells", "1", "--num_bases", "16", "--width", "32", "--depth", "1", "--latent_dim", "16"]
    fit += ["--samples_per_ray", "16", "--max_train_steps", "300", "--learning_rate", "5e-3", "--lr_warmup_steps", "0"]
    assert main([*fit, "--basis_learning_rate", "5e-3", "--latent_learning_rate", "5e-2"]) == 0
    return run
