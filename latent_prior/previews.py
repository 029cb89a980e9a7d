"""Sheets and animations of samples to look at: the first of them, and the ways between them."""

from itertools import pairwise

import numpy as np
import torch

from latent_prior.noise import initial_noise, slerp
from latent_prior.sample_files import Samples
from mnif.animation import save_animation
from mnif.pictures import picture_grid, save_picture

_ROWS = 8  # ways on the sheet of an interpolation


@torch.no_grad()
def save_preview(samples: Samples, count: int) -> None:
    """Writes preview/grid.png, the first ``count`` samples at the training resolution."""
    count = min(count, samples.count)
    latents = samples.drawing.samples(count)
    pictures = np.concatenate([samples.signal.pictures(samples.decoder, latent) for latent in latents.split(64)])
    sheet = picture_grid(pictures, columns=min(count, 8), scale=_scale(pictures))
    save_picture(samples.output / "preview" / "grid.png", sheet)


@torch.no_grad()
def save_interpolation(samples: Samples, steps: int) -> None:
    """Writes preview/interpolation.png, a row for each way from a sample to the next, and all of them as a .gif.

    A way leads through the noise (:func:`latent_prior.noise.slerp`), so that every picture on it is a sample; it is
    cut into ``steps`` parts.
    """
    count = min(samples.count, _ROWS + 1)
    noise = initial_noise(samples.drawing.seed, range(count), samples.decoder.config.latent_dim)
    ways = []
    for start, end in pairwise(noise):
        latents = samples.drawing.latents(torch.from_numpy(slerp(start, end, np.linspace(0, 1, steps + 1))))
        ways.append(samples.signal.pictures(samples.decoder, latents))
    pictures = np.concatenate(ways)
    folder, scale = samples.output / "preview", _scale(pictures)
    save_picture(folder / "interpolation.png", picture_grid(pictures, columns=steps + 1, scale=scale))
    frames = np.concatenate([ways[0], *(way[1:] for way in ways[1:])])  # an end is the next beginning
    save_animation(folder / "interpolation.gif", frames.repeat(scale, axis=1).repeat(scale, axis=2))


def _scale(pictures: np.ndarray) -> int:
    """Enlarges small pictures to 64 pixels."""
    return max(1, 64 // pictures.shape[1])
