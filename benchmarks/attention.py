"""What attention over tokens costs on this processor, in float32 and in bfloat16: a block, and attention alone.

    OMP_NUM_THREADS=1 python benchmarks/attention.py

Times are processor time of one thread, forward and backward, the least of several: other work on the machine can only
add to them. bfloat16 is what `mnif prior --mixed_precision bf16` does: products in it, weights and norms in float32,
and attention as :func:`latent_prior.denoiser_blocks.attention` has it; that of PyTorch in bfloat16 stands beside it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from latent_prior.denoiser_blocks import TransformerBlock
from latent_prior.settings import HEAD_WIDTH


@dataclass
class Arguments:
    """Time a block and its attention."""

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
    print("| tokens | width | | block, ms | attention alone, ms | M multiply-adds of the block | of attention |")
    print("|---|---|---|---|---|---|---|")
    for count in arguments.tokens:
        for width in arguments.widths:
            torch.manual_seed(0)
            block = TransformerBlock(width, 128, 0.0)
            tokens = torch.randn(arguments.batch_size, count, width, requires_grad=True)
            shape = (arguments.batch_size, width // HEAD_WIDTH, count, HEAD_WIDTH)
            parts = [torch.randn(shape, requires_grad=True) for _ in range(3)]
            for precision in (torch.float32, torch.bfloat16):
                typed = [part.detach().to(precision).requires_grad_() for part in parts]
                whole, alone = (
                    least(arguments.repeats, precision, compute)
                    for compute in (
                        lambda block=block, tokens=tokens: block(tokens, torch.zeros(1, 128)),
                        lambda typed=typed: F.scaled_dot_product_attention(*typed),
                    )
                )
                products, heard = (8 * width**2 * count, 2 * count**2 * width)
                name, costs = (
                    str(precision).removeprefix("torch."),
                    f"{(products + heard) / 1e6:.2f} | {heard / 1e6:.2f}",
                )
                print(f"| {count} | {width} | {name} | {whole:.1f} | {alone:.1f} | {costs} |", flush=True)


def least(repeats: int, precision: torch.dtype, compute: Callable[[], Tensor]) -> float:
    """The least processor time of computing and going back, in milliseconds."""
    found = []
    for _ in range(repeats):
        started = time.process_time()
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            value = compute()
        value.float().sum().backward()
        found.append(time.process_time() - started)
    return min(found) * 1000


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
