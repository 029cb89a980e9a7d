"""The amortised encoder: a picture becomes its latent in one pass of matrix products."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn


class PatchEncoder(ModelMixin, ConfigMixin):
    """Patches through a shared two-layer network, then all patches together through a residual one.

    The latent is normalised to zero mean and unit variance over its own numbers, so that noise added to it in
    training has a fixed meaning, and an instance's latent does not depend on its batch.

    Args:
        channels: values per pixel.
        resolution: pixels per axis, a multiple of ``patch_size``.
        patch_size: pixels per axis of a patch.
        patch_width: hidden units per patch.
        patch_features: numbers each patch hands on.
        width: hidden units over all patches.
        latent_dim: D, numbers in a latent.
    """

    @register_to_config
    def __init__(
        self,
        channels: int = 3,
        resolution: int = 32,
        patch_size: int = 8,
        patch_width: int = 256,
        patch_features: int = 64,
        width: int = 512,
        latent_dim: int = 128,
    ):
        super().__init__()
        if resolution % patch_size:
            raise ValueError(f"resolution {resolution} is not a multiple of the patch size {patch_size}")
        self.patches = (resolution // patch_size) ** 2
        features = self.patches * patch_features
        self.patch_in = nn.Linear(channels * patch_size**2, patch_width)
        self.patch_position = nn.Parameter(torch.zeros(self.patches, patch_width))
        self.patch_out = nn.Linear(patch_width, patch_features)
        self.mix_in = nn.Linear(features, width)
        self.mix_residual = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, latent_dim)
        self.skip = nn.Linear(features, latent_dim)

    def forward(self, values: Tensor) -> Tensor:
        """Values [B, resolution, resolution, channels] in [-1, 1] → latents [B, D], each of mean 0, variance 1."""
        size = self.config.patch_size
        batch, side = len(values), self.config.resolution // size
        patches = values.view(batch, side, size, side, size, -1).transpose(2, 3).reshape(batch, self.patches, -1)
        features = self.patch_out(F.gelu(self.patch_in(patches) + self.patch_position)).flatten(1)
        hidden = F.gelu(self.mix_in(features))
        hidden = hidden + F.gelu(self.mix_residual(hidden))
        return F.layer_norm(self.mix_out(hidden) + self.skip(features), (self.config.latent_dim,))
