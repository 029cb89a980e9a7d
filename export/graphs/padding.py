"""Values with four channels in place of one or three, which saves engines a kernel and aligns their memory."""

import torch
import torch.nn.functional as F

from latent_prior.denoiser import LatentDenoiser
from mnif.fields import LayerShape
from mnif.modeling import MNIFModel

CHANNELS = 4


@torch.no_grad()
def padded(decoder: MNIFModel) -> MNIFModel:
    """The same model with four channels, the further ones 0 everywhere; one of four or more is returned as it is."""
    if decoder.config.channels >= CHANNELS:
        return decoder
    settings = {key: value for key, value in decoder.config.items() if not key.startswith("_")}
    wide = MNIFModel(**settings | {"channels": CHANNELS}).eval()
    narrow, last = decoder.shapes[-1], len(decoder.bases) - 1
    state = decoder.state_dict()
    for name in (f"bases.{last}", f"means.{last}"):
        if name in state:
            state[name] = _padded_rows(state[name], narrow)
    wide.load_state_dict(state)
    return wide


@torch.no_grad()
def for_decoder(denoiser: LatentDenoiser, decoder: MNIFModel) -> LatentDenoiser:
    """The same denoiser for a padded decoder, whose fingerprint is another; itself for its own decoder."""
    fingerprint = decoder.fingerprint()
    if denoiser.config.decoder_fingerprint == fingerprint:
        return denoiser
    settings = {key: value for key, value in denoiser.config.items() if not key.startswith("_")}
    moved = LatentDenoiser(**settings | {"decoder_fingerprint": fingerprint}).eval()
    moved.load_state_dict(denoiser.state_dict())
    return moved


def _padded_rows(rows: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    weights, biases = shape.split(rows)
    missing = (0, CHANNELS - shape.outputs)
    return torch.cat([F.pad(weights, missing).flatten(1), F.pad(biases, missing).flatten(1)], dim=1)
