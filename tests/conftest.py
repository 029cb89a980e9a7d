"""Small real models and data that many tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from latent_prior.denoiser import LatentDenoiser
from latent_prior.objective import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from mnif.modeling import MNIFModel

torch.set_num_threads(1)


@pytest.fixture
def decoder() -> MNIFModel:
    torch.manual_seed(0)
    return MNIFModel(resolution=16, num_bases=6, width=8, depth=1, latent_dim=12, cells=2)


@pytest.fixture
def pipeline(decoder: MNIFModel) -> MNIFPipeline:
    """A pipeline whose denoiser is random but bounded, so that unrolled steps stay in range."""
    torch.manual_seed(1)
    denoiser = LatentDenoiser(latent_dim=12, width=16, depth=2, decoder_fingerprint=decoder.fingerprint())
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    denoiser.latent_mean.normal_()
    denoiser.latent_std.uniform_(0.5, 2)
    scheduler: DPMSolverMultistepScheduler = sampling_scheduler("x0")
    pipeline = MNIFPipeline(decoder, denoiser, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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
