"""What is drawn does not depend on how many threads there are to draw it."""

import pytest
import torch

from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import sample_latents
from mnif.models.mnif_model import MNIFModel
from mnif.signals.outputs import decode_images
from mnif.utils.errors import UserError
from mnif.utils.process import one_thread


def test_one_thread_gives_the_others_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    with pytest.raises(UserError, match="within"), one_thread():
        raise UserError("within")
    assert torch.get_num_threads() == before


def test_pictures_are_the_same_on_one_thread_and_on_two() -> None:
    torch.manual_seed(0)
    decoder = MNIFModel(resolution=16, num_bases=96, width=24, latent_dim=128, cells=4)
    torch.nn.init.normal_(decoder.coefficient_map.weight, std=0.1)
    denoiser = ResMLPDenoiser(128, width=512, depth=2, decoder_fingerprint=decoder.fingerprint())
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    pipeline = MNIFPipeline(decoder, denoiser, sampling_scheduler("x0"))
    pipeline.set_progress_bar_config(disable=True)
    before, drawn = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            latents = sample_latents(pipeline, 0, range(64), num_inference_steps=4)
            with torch.no_grad():
                drawn.append((latents, torch.cat([*decode_images(decoder, latents)])))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
