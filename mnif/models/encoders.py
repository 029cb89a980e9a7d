"""Amortised encoders: an observation becomes its latent in one pass of matrix products."""

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor, nn

from mnif.models.io import OwnMemory
from mnif.utils.json_files import Depth, Size
from mnif.utils.pixels import as_axes

_HEADS = 4  # of attention among tokens


class Patches(nn.Module):
    """A grid cut into patches, each of which goes through one shared two-layer network.

    Args:
        channels: values per pixel.
        axes: pixels of each axis; padded with zeros to whole patches.
        per_axis: patches along each axis.
        width: hidden units per patch.
        features: numbers each patch hands on.
    """

    def __init__(self, channels: int, axes: Sequence[int], per_axis: int, width: int, features: int):
        super().__init__()
        self.per_axis, self.shape = per_axis, [-(-pixels // per_axis) for pixels in axes]
        self.padding = [0, 0]  # F.pad counts from the last axis; channels come last and are not padded
        for pixels, size in zip(reversed(axes), reversed(self.shape), strict=True):
            self.padding += [0, size * per_axis - pixels]
        self.count = per_axis ** len(axes)
        self.outputs = self.count * features
        self.read = nn.Linear(channels * torch.Size(self.shape).numel(), width)
        self.position = nn.Parameter(torch.zeros(self.count, width))
        self.write = nn.Linear(width, features)

    def forward(self, values: Float[Tensor, "batch *grid channels"]) -> Float[Tensor, "batch features"]:
        """Maps values [B, ..., C] in [-1, 1] to [B, patches · features]."""
        values = F.pad(values, self.padding)
        axes = len(self.shape)
        split = [size for axis in self.shape for size in (self.per_axis, axis)]
        order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
        patches = values.reshape(len(values), *split, -1).permute(*order).reshape(len(values), self.count, -1)
        return self.write(F.gelu(self.read(patches) + self.position)).flatten(1)


class PatchEncoder(OwnMemory, ModelMixin, ConfigMixin):
    """Patches through a shared two-layer network, then all patches together through a residual one.

    The latent is normalised to zero mean and unit variance over its own numbers, so that noise added to it in
    training has a fixed meaning, and an instance's latent does not depend on its batch.

    Args:
        channels: values per pixel.
        resolution: pixels per axis: one number, or one for each axis.
        latent_dim: D, numbers in a latent.
        dimensions: axes of the grid.
        patches: patches along each axis.
        patch_width: hidden units per patch.
        patch_features: numbers each patch hands on.
        width: hidden units over all patches.
        dropout: share of the hidden units over all patches left out in training.
    """

    @register_to_config
    def __init__(
        self,
        channels: Size = 3,
        resolution: Size | Sequence[Size] = 32,
        latent_dim: Size = 128,
        dimensions: Annotated[int, Meta(ge=1, le=8)] = 2,
        patches: Size = 4,
        patch_width: Size = 256,
        patch_features: Size = 64,
        width: Size = 512,
        dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0,
    ):
        super().__init__()
        self.patch_network = Patches(channels, as_axes(resolution, dimensions), patches, patch_width, patch_features)
        self.mix_in = nn.Linear(self.patch_network.outputs, width)
        self.mix_residual = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, latent_dim)
        self.skip = nn.Linear(self.patch_network.outputs, latent_dim)
        self.drop = nn.Dropout(dropout)

    def forward(
        self, values: Float[Tensor, "batch *grid channels"], mask: Float[Tensor, "batch *grid"] | None = None
    ) -> Float[Tensor, "batch latent_dim"]:
        """Infers latents [B, D], each of mean 0 and variance 1.

        Args:
            values: [B, ..., C] in [-1, 1], the whole grid.
            mask: [B, ...], 1 for what was seen; the rest is read as 0, the middle of the range.
        """
        features = self.patch_network(values if mask is None else values * mask[..., None])
        hidden = self.drop(F.gelu(self.mix_in(features)))
        hidden = hidden + self.drop(F.gelu(self.mix_residual(hidden)))
        return F.layer_norm(self.mix_out(hidden) + self.skip(features), (self.config.latent_dim,))


class AttentionBlock(nn.Module):
    """Attention among tokens, then a two-layer network at each; both read normalised tokens and add to them.

    Vaswani et al., *Attention Is All You Need* (NeurIPS 2017), with the norms ahead.

    Args:
        width: numbers in a token, a multiple of ``heads``.
        hidden: hidden units of the network.
        heads: of the attention.
    """

    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.read = nn.Linear(width, 3 * width)
        self.write = nn.Linear(width, width)
        self.norm_network = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        """Maps tokens [B, T, width] to as many."""
        parts = self.read(self.norm_attention(tokens)).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        heard = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        tokens = tokens + self.write(heard)
        return tokens + self.down(F.gelu(self.up(self.norm_network(tokens))))


class TokenEncoder(OwnMemory, ModelMixin, ConfigMixin):
    """Patches that lie as the tokens of the latent do, one for each, and attention among them.

    The latent is normalised over all of its numbers, as that of :class:`PatchEncoder`.

    Args:
        channels: values per pixel.
        resolution: pixels per axis: one number, or one for each axis.
        latent_dim: D, numbers in a latent, a multiple of the number of tokens.
        dimensions: axes of the grid.
        tokens: along each axis.
        patch_width: hidden units per patch.
        width: a block's network has half as many hidden units, a token within the blocks a quarter as many numbers.
        depth: blocks.

    Raises:
        ValueError: the tokens cannot share the latent.
    """

    @register_to_config
    def __init__(
        self,
        channels: Size = 3,
        resolution: Size | Sequence[Size] = 32,
        latent_dim: Size = 128,
        dimensions: Annotated[int, Meta(ge=1, le=8)] = 2,
        tokens: Size = 4,
        patch_width: Size = 256,
        width: Size = 512,
        depth: Depth = 2,
    ):
        super().__init__()
        count = tokens**dimensions
        if latent_dim % count:
            raise ValueError(
                f"latent_dim {latent_dim}: {count} tokens share it evenly; a multiple of {count} is needed"
            )
        stream = max(width // (4 * _HEADS), 1) * _HEADS
        self.patch_network = Patches(channels, as_axes(resolution, dimensions), tokens, patch_width, stream)
        self.blocks = nn.ModuleList(AttentionBlock(stream, 2 * stream, _HEADS) for _ in range(depth))
        self.norm = nn.LayerNorm(stream)
        self.write = nn.Linear(stream, latent_dim // count)

    def forward(
        self, values: Float[Tensor, "batch *grid channels"], mask: Float[Tensor, "batch *grid"] | None = None
    ) -> Float[Tensor, "batch latent_dim"]:
        """Infers latents [B, D], each of mean 0 and variance 1.

        Args:
            values: [B, ..., C] in [-1, 1], the whole grid.
            mask: [B, ...], 1 for what was seen; the rest is read as 0, the middle of the range.
        """
        features = self.patch_network(values if mask is None else values * mask[..., None])
        tokens = features.view(len(values), self.patch_network.count, -1)
        for block in self.blocks:
            tokens = block(tokens)
        return F.layer_norm(self.write(self.norm(tokens)).flatten(1), (self.config.latent_dim,))


class ViewsEncoder(OwnMemory, ModelMixin, ConfigMixin):
    """Every posed view through :class:`Patches`, told where its camera stood; then the mean over the views.

    Any number of views will do, in any order, so a subset of them can be encoded too.

    Args:
        resolution: pixels per axis of the views.
        latent_dim: D, numbers in a latent.
        channels: values per pixel.
        patches: patches along each axis.
        patch_width: hidden units per patch.
        patch_features: numbers each patch hands on.
        width: hidden units.
    """

    @register_to_config
    def __init__(
        self,
        resolution: Size | Sequence[Size] = 64,
        latent_dim: Size = 128,
        channels: Size = 3,
        patches: Size = 4,
        patch_width: Size = 256,
        patch_features: Size = 32,
        width: Size = 512,
    ):
        super().__init__()
        self.patch_network = Patches(channels, as_axes(resolution, 2), patches, patch_width, patch_features)
        self.view_in = nn.Linear(self.patch_network.outputs + 12, width)
        self.view_residual = nn.Linear(width, width)
        self.mix_residual = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, latent_dim)

    def forward(
        self,
        values: Float[Tensor, "batch views height width channels"],
        poses: Float[Tensor, "batch views 4 4"],
        mask: Float[Tensor, "batch views height width"] | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        """Infers latents [B, D], each of mean 0 and variance 1.

        Args:
            values: [B, V, H, W, C] in [-1, 1].
            poses: [B, V, 4, 4] camera-to-world.
            mask: [B, V, H, W], 1 for what was seen; a view of which nothing was seen does not count.
        """
        seen = values if mask is None else values * mask[..., None]
        features = self.patch_network(seen.flatten(0, 1))
        cameras = poses[:, :, :3].flatten(2).flatten(0, 1)
        hidden = F.gelu(self.view_in(torch.cat([features, cameras], dim=1)))
        hidden = hidden + F.gelu(self.view_residual(hidden))
        hidden = hidden.view(*values.shape[:2], -1)
        weight = torch.ones_like(hidden[..., :1]) if mask is None else mask.flatten(2).amax(dim=2)[..., None]
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1)
        return F.layer_norm(self.mix_out(mean + F.gelu(self.mix_residual(mean))), (self.config.latent_dim,))
