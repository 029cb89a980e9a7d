"""What attention over tokens costs on this processor, in float32 and in bfloat16: a block, and attention alone.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

Times are processor time of one thread, forward and back, the least of several: other work on the machine can only add
to them. In bfloat16 products are counted in it and all else in float32, as by `mnif prior --mixed_precision bf16`;
attention alone is PyTorch's in either type, of which a block takes that in float32.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from latent_prior.denoiser_blocks import TransformerBlock
from latent_prior.settings import HEAD_WIDTH


@dataclass
class Arguments:
    """Time blocks and their attention."""

    batch_size: int = 256
    """Latents."""
    tokens: tuple[int, ...] = (16, 64)
    """Of a latent."""
    widths: tuple[int, ...] = (128, 256)
    """Numbers in a token."""
    repeats: int = 10
    """Of which the quickest counts."""


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    print("| tokens | width | multiply-adds of a block, M | of attention | block, ms | in bfloat16 |", end="")
    print(" attention alone, ms | in bfloat16 |\n" + "|---" * 8 + "|")
    for count in arguments.tokens:
        for width in arguments.widths:
            block = TransformerBlock(width, 128, 0.0)
            tokens = torch.randn(arguments.batch_size, count, width, requires_grad=True)
            parts = torch.randn(3, arguments.batch_size, width // HEAD_WIDTH, count, HEAD_WIDTH)
            products, heard = 8 * width**2 * count, 2 * count**2 * width
            cells = [f"{count}", f"{width}", f"{(products + heard) / 1e6:.1f}", f"{heard / 1e6:.2f}"]
            for precision in (torch.float32, torch.bfloat16):
                whole = partial(block, tokens, torch.zeros(1, 128))
                cells.append(f"{least(arguments.repeats, precision, whole):.0f}")
            for precision in (torch.float32, torch.bfloat16):
                typed = (part.to(precision).requires_grad_() for part in parts)
                alone = partial(F.scaled_dot_product_attention, *typed)
                cells.append(f"{least(arguments.repeats, precision, alone):.1f}")
            print(f"| {' | '.join(cells)} |", flush=True)


def least(repeats: int, precision: torch.dtype, compute: Callable[[], Tensor]) -> float:
    """The least processor time of computing and going back, in milliseconds."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            value = compute()
        value.float().sum().backward()
        found.append(time.process_time() - started)
    return min(found) * 1000


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
