"""The blocks that denoisers are made of: how the time acts on what flows through them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from latent_prior.settings import HEAD_WIDTH, PAPER_GROUPS
from mnif.data.batches import InstanceGenerator


class ResidualBlock(nn.Module):
    """x + W₂ silu(W₁ (norm(x) · (1 + scale) + shift)), with scale and shift from the time embedding."""

    def __init__(self, width: int, time_width: int, dropout: float):
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.modulation = nn.Linear(time_width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.dropout = dropout
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(
        self,
        hidden: Float[Tensor, "batch width"],
        time: Float[Tensor, "batch_or_1 time_width"],
        generator: InstanceGenerator | None = None,
    ) -> Float[Tensor, "batch width"]:
        """hidden [B, width], time [B or 1, time_width] → [B, width]; drops out if it is given a generator."""
        scale, shift = self.modulation(time).chunk(2, dim=-1)
        inner = F.silu(self.up(self.norm(hidden) * (1 + scale) + shift))
        if generator is not None:
            inner = generator.dropout(inner, self.dropout)
        return hidden + self.down(inner)


class PaperBlock(nn.Module):
    """x + W₂ silu(norm(W₁ silu(norm(x)) + V silu(time)))."""

    def __init__(self, width: int, time_width: int):
        super().__init__()
        self.norm_in = nn.GroupNorm(PAPER_GROUPS, width)
        self.up = nn.Linear(width, width)
        self.time = nn.Linear(time_width, width)
        self.norm_out = nn.GroupNorm(PAPER_GROUPS, width)
        self.down = nn.Linear(width, width)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(
        self, hidden: Float[Tensor, "batch width"], time: Float[Tensor, "batch_or_1 time_width"]
    ) -> Float[Tensor, "batch width"]:
        """hidden [B, width], time [B or 1, time_width] → [B, width]."""
        inner = self.up(F.silu(self.norm_in(hidden))) + self.time(F.silu(time))
        return hidden + self.down(F.silu(self.norm_out(inner)))


def attention(
    query: Float[Tensor, "batch heads tokens width"],
    key: Float[Tensor, "batch heads tokens width"],
    value: Float[Tensor, "batch heads tokens width"],
) -> Float[Tensor, "batch heads tokens width"]:
    """Softmax(query · keyᵀ / √width) · value, of each head.

    In half precision it goes back eight times slower than in float32 on a CPU, where it is counted in float32.
    """
    if query.device.type != "cpu" or query.dtype.itemsize >= 4:
        return F.scaled_dot_product_attention(query, key, value)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(query.float(), key.float(), value.float()).to(query.dtype)


class TransformerBlock(nn.Module):
    """Attention among tokens, then a two-layer network at each token; the time scales, shifts and gates both.

    Gates start at zero, so a block begins by leaving tokens as they are (adaLN-zero, Peebles and Xie, 2023).

    Args:
        width: numbers in a token; attention has a head for every 32 (:data:`latent_prior.settings.HEAD_WIDTH`).
        time_width: numbers in the time embedding.
        dropout: of what attention hands on and of the network's hidden units, while training.
    """

    def __init__(self, width: int, time_width: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = max(width // HEAD_WIDTH, 1), dropout
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(time_width, 6 * width)
        self.attend = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens width"],
        time: Float[Tensor, "batch_or_1 time_width"],
        generator: InstanceGenerator | None = None,
    ) -> Float[Tensor, "batch tokens width"]:
        """tokens [B, T, width], time [B or 1, time_width] → [B, T, width]; drops out if it is given a generator."""
        scale, shift, gate, scale_up, shift_up, gate_down = self.modulation(time)[:, None].chunk(6, dim=-1)
        parts = self.attend(self.norm(tokens) * (1 + scale) + shift).unflatten(2, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        heard = attention(query, key, value).transpose(1, 2).flatten(2)
        if generator is not None:
            heard = generator.dropout(heard, self.dropout)
        tokens = tokens + gate * self.merge(heard)
        inner = F.silu(self.up(self.norm(tokens) * (1 + scale_up) + shift_up))
        if generator is not None:
            inner = generator.dropout(inner, self.dropout)
        return tokens + gate_down * self.down(inner)
