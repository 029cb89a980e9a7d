"""The paper's denoiser: a wide residual network of group norms, with additive skips from its first half to its second.

You, Kim, Kim and Han, Generative Neural Fields by Mixtures of Neural Implicit Functions, NeurIPS 2023.
"""

import torch
import torch.nn.functional as F
from diffusers import ModelMixin  # noqa: F401  diffusers looks for the name where a component's class is defined
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor, nn

from latent_prior.denoiser import Denoiser

GROUPS = 16


class PaperBlock(nn.Module):
    """x + W₂ silu(norm(W₁ silu(norm(x)) + V silu(time)))."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.norm_in = nn.GroupNorm(GROUPS, width)
        self.up = nn.Linear(width, width)
        self.time = nn.Linear(time_width, width)
        self.norm_out = nn.GroupNorm(GROUPS, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """hidden [B, width], time [B or 1, time_width] → [B, width]."""
        inner = self.up(F.silu(self.norm_in(hidden))) + self.time(F.silu(time))
        return hidden + self.down(F.silu(self.norm_out(inner)))


class PaperDenoiser(Denoiser):
    """The residual network of the paper, of any width and even depth; ``width=4096, depth=8`` is the paper's own.

    Block depth/2 + i gets what went into block depth/2 − 1 − i added to its input.

    Args:
        latent_dim: D, numbers in a latent.
        width: hidden units, a multiple of 16, at least 32: alone in its group, a unit is normalised to nothing.
        depth: residual blocks, an even number.
        time_width: numbers in the sinusoidal time embedding.
        decoder_fingerprint: of the decoder whose latents these are (:meth:`mnif.modeling.MNIFModel.fingerprint`).
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: int = 128,
        width: int = 4096,
        depth: int = 8,
        time_width: int = 64,
        decoder_fingerprint: str = "",
    ):
        super().__init__(latent_dim)
        self.read = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(PaperBlock(width, time_width) for _ in range(depth))
        self.norm = nn.GroupNorm(GROUPS, width)
        self.write = nn.Linear(width, latent_dim)

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Noisy standardised latents [B, D] at the scheduler's timestep, [B] or one number → the prediction [B, D]."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).reshape(-1)
        time = get_timestep_embedding(timestep, self.config.time_width).to(self.dtype)
        hidden = self.read(sample)
        inputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index < len(self.blocks) // 2:
                inputs.append(hidden)
            else:
                hidden = hidden + inputs.pop()
            hidden = block(hidden, time)
        return self.write(F.silu(self.norm(hidden)))
