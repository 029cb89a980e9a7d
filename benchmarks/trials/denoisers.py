"""Which denoiser learns a run's latents best in the same time: networks of several forms, one loss, one thread each.

    python benchmarks/trials/denoisers.py --runs runs/demo runs/furniture --cpu_seconds 60

A candidate trains until its processor seconds are used up, its learning rate falling to zero as they are. What counts
is the least loss on held-out latents on the way, of the weights' moving average. The candidates with attention take a
latent as a row of tokens; they are the only ones that `mnif prior` does not offer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from latent_prior.denoisers import Denoiser, PaperDenoiser, ResMLPDenoiser
from latent_prior.diffusion import DenoisingLoss, validation_loss
from mnif.data.batches import instance_keys
from mnif.latents.table import LatentTable


class TokenDenoiser(Denoiser):
    """A transformer over a latent cut into tokens, with layer norms as the time wants them (Peebles and Xie, 2023).

    Args:
        latent_dim: D, numbers in a latent.
        tokens: into how many it is cut.
        width, depth: of the transformer; heads have 32 numbers.
    """

    def __init__(self, latent_dim: int, tokens: int, width: int, depth: int, dropout: float = 0.1):
        super().__init__(latent_dim)
        self.tokens = tokens
        self.time = ResMLPDenoiser(latent_dim, width=8, depth=0)  # for its embedding of the time alone
        self.read = nn.Linear(latent_dim // tokens, width)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(2 * depth))
        self.modulations = nn.ModuleList(nn.Linear(128, 3 * width) for _ in range(2 * depth))
        self.attentions = nn.ModuleList(
            nn.MultiheadAttention(width, width // 32, dropout, batch_first=True) for _ in range(depth)
        )
        self.perceptrons = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Dropout(dropout), nn.Linear(2 * width, width))
            for _ in range(depth)
        )
        for modulation in self.modulations:
            nn.init.zeros_(modulation.weight)
            nn.init.zeros_(modulation.bias)
        self.write = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, latent_dim // tokens))
        nn.init.zeros_(self.write[1].weight)

    def forward(self, sample: Tensor, timestep: Tensor | float, *_: object) -> Tensor:
        time = self.time.time_embedding(timestep)
        hidden = self.read(sample.view(len(sample), self.tokens, -1)) + self.places
        for index, (norm, modulation) in enumerate(zip(self.norms, self.modulations, strict=True)):
            scale, shift, gate = modulation(time)[:, None].chunk(3, dim=-1)
            inner = norm(hidden) * (1 + scale) + shift
            if index % 2 == 0:
                inner, _ = self.attentions[index // 2](inner, inner, inner, need_weights=False)
            else:
                inner = self.perceptrons[index // 2](inner)
            hidden = hidden + gate * inner
        return self.write(hidden).flatten(1)


CANDIDATES: dict[str, Callable[[int], Denoiser]] = {
    "modulated 512 x 4 (default)": lambda d: ResMLPDenoiser(d, 512, 4, dropout=0.1),
    "modulated 256 x 3 (edge)": lambda d: ResMLPDenoiser(d, 256, 3, dropout=0.1),
    "modulated 768 x 4": lambda d: ResMLPDenoiser(d, 768, 4, dropout=0.1),
    "paper's 512 x 8": lambda d: PaperDenoiser(d, 512, 8),
    "paper's 1024 x 4": lambda d: PaperDenoiser(d, 1024, 4),
    "tokens: 16 of width 128, 4 layers": lambda d: TokenDenoiser(d, 16, 128, 4),
    "tokens: 8 of width 256, 4 layers": lambda d: TokenDenoiser(d, 8, 256, 4),
}


@dataclass
class Arguments:
    """Train every candidate on the latents of runs."""

    runs: list[Path]
    """Run folders in which `mnif fit` has finished."""
    cpu_seconds: float = 60.0
    """Of training, for each."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Of everything."""


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    print("| run | denoiser | parameters, M | steps | loss on held-out latents | at step |")
    print("|---|---|---|---|---|---|")
    for run in arguments.runs:
        table = LatentTable.load(run / "latents.safetensors")
        for name, make in CANDIDATES.items():
            torch.manual_seed(arguments.seed)
            denoiser = make(table.latents.shape[1])
            mean, std = table.mean_and_std()
            denoiser.latent_mean.copy_(mean)
            denoiser.latent_std.copy_(std)
            best, at, steps = trained(arguments, DenoisingLoss(denoiser, "x0"), table)
            size = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
            print(f"| {run.name} | {name} | {size:.2f} | {steps} | {best:.4f} | {at} |", flush=True)


def trained(arguments: Arguments, loss: DenoisingLoss, table: LatentTable) -> tuple[float, int, int]:
    """The least held-out loss, the step it was found at, and how many there were."""
    optimizer = torch.optim.AdamW(loss.parameters(), lr=arguments.learning_rate, weight_decay=0.05, fused=True)
    ema = EMAModel(loss.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    held_out = table.latents[table.held_out]
    used, steps, best, at = 0.0, 0, float("inf"), 0
    while used < arguments.cpu_seconds:
        started = time.process_time()
        for group in optimizer.param_groups:
            falling = 0.5 * (1 + np.cos(np.pi * used / arguments.cpu_seconds))
            group["lr"] = arguments.learning_rate * falling * min(1.0, steps / 100)
        rows = torch.randint(len(table.train), (256,))
        optimizer.zero_grad()
        loss(table.train[rows], instance_keys(arguments.seed, steps, rows)).backward()
        nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
        optimizer.step()
        ema.step(loss.parameters())
        steps += 1
        used += time.process_time() - started
        if steps % 50 == 0 or used >= arguments.cpu_seconds:
            ema.store(loss.parameters())
            ema.copy_to(loss.parameters())
            loss.eval()
            found = validation_loss(loss, held_out)
            loss.train()
            ema.restore(loss.parameters())
            best, at = min((best, at), (found, steps))
    return best, at, steps


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
