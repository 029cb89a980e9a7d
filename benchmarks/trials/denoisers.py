"""Which denoiser learns a run's latents best in the same time: networks of several forms, one loss, one thread each.

    python benchmarks/trials/denoisers.py --runs runs/demo runs/furniture --cpu_seconds 60
    python benchmarks/trials/denoisers.py --runs runs/tokens --cpu_seconds 300 --num_samples 1000

Candidates take their steps in turn, whoever has used the least processor time, so that other work on the machine slows
all of them alike. Each trains until its processor seconds are used up, its learning rate falling to zero as they are.
What counts is the least loss on held-out latents on the way, of the weights' moving average, and what is drawn with
those weights. A global latent is cut into 16 tokens for those that attend; `mnif prior` refuses to.
"""

import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers.training_utils import EMAModel
from torch import nn

from latent_prior.denoisers import Denoiser, PaperDenoiser, ResMLPDenoiser, TransformerDenoiser
from latent_prior.diffusion import DenoisingLoss, sampling_scheduler, validation_loss
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import sample_latents
from mnif.data.batches import instance_keys
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel

sys.path.append(str(Path(__file__).parents[1]))
from judges import judge_of


@dataclass(frozen=True)
class Candidate:
    """A denoiser for latents of so many numbers, in so many tokens, and how many latents it learns from at a time."""

    make: Callable[[int, int], Denoiser]
    batch_size: int = 256


CANDIDATES = {
    "modulated 512 x 4 (default)": Candidate(lambda d, tokens: ResMLPDenoiser(d, 512, 4, dropout=0.1)),
    "modulated 256 x 3 (edge)": Candidate(lambda d, tokens: ResMLPDenoiser(d, 256, 3, dropout=0.1)),
    "modulated 768 x 4": Candidate(lambda d, tokens: ResMLPDenoiser(d, 768, 4, dropout=0.1)),
    "paper's 512 x 8": Candidate(lambda d, tokens: PaperDenoiser(d, 512, 8)),
    "paper's 1024 x 4": Candidate(lambda d, tokens: PaperDenoiser(d, 1024, 4)),
    "transformer 128 x 4": Candidate(lambda d, tokens: TransformerDenoiser(d, tokens, 128, 4, dropout=0.1)),
    "transformer 128 x 4, batch 64, no dropout": Candidate(
        lambda d, tokens: TransformerDenoiser(d, tokens, 128, 4), 64
    ),
    "transformer 128 x 2": Candidate(lambda d, tokens: TransformerDenoiser(d, tokens, 128, 2, dropout=0.1)),
    "transformer 256 x 4": Candidate(lambda d, tokens: TransformerDenoiser(d, tokens, 256, 4, dropout=0.1)),
}


_BETWEEN_VALIDATIONS = 0.04  # of the processor seconds


@dataclass
class Arguments:
    """Train candidates on the latents of runs."""

    runs: list[Path]
    """Run folders in which `mnif fit` has finished."""
    candidates: list[str] = field(default_factory=lambda: list(CANDIDATES))
    """Of those in this file."""
    cpu_seconds: float = 60.0
    """Of training, for each."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """As of `mnif prior`."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    num_samples: int = 0
    """Drawn with each in 8 steps and measured, if there are any."""
    seed: int = 0
    """Of everything."""


def main(arguments: Arguments) -> None:
    torch.set_num_threads(1)
    print(
        "| run | denoiser | parameters, M | steps | loss on held-out latents | at step | training loss there |", end=""
    )
    print(" fd_lite0 | nn_ratio_latents |\n|---|---|---|---|---|---|---|---|---|")
    for run in arguments.runs:
        decoder = load_component(MNIFModel, run / "model", "decoder")
        table = LatentTable.load(run / "latents.safetensors", decoder.fingerprint())
        learners = [Learner(arguments, name, table, decoder) for name in arguments.candidates]
        while (learner := min(learners, key=lambda one: one.used)).used < arguments.cpu_seconds:
            learner.step()
        judge = judge_of(run) if arguments.num_samples else None
        for learner in learners:
            figures = {}
            if judge is not None:
                pipeline = MNIFPipeline(decoder, learner.best, sampling_scheduler("x0"))
                pipeline.set_progress_bar_config(disable=True)
                latents = sample_latents(pipeline, arguments.seed, range(arguments.num_samples))
                figures = judge.of_latents(latents.numpy())
            found = " | ".join(f"{figures.get(name, float('nan')):.4g}" for name in ("fd_lite0", "nn_ratio_latents"))
            print(f"| {run.name} | {learner.row()} | {found} |", flush=True)


class Learner:
    """A candidate on its way."""

    def __init__(self, arguments: Arguments, name: str, table: LatentTable, decoder: MNIFModel):
        torch.manual_seed(arguments.seed)
        self.arguments, self.name, self.train = arguments, name, table.train
        self.candidate = CANDIDATES[name]
        self.held_out = table.latents[table.held_out]
        tokens = 16 if decoder.config.tokens is None else decoder.config.tokens**decoder.config.dimensions
        denoiser = self.candidate.make(table.latents.shape[1], tokens)
        denoiser.register_to_config(decoder_fingerprint=table.fingerprint)
        mean, std = table.mean_and_std()
        denoiser.latent_mean.copy_(mean)
        denoiser.latent_std.copy_(std)
        self.loss, self.best = DenoisingLoss(denoiser, "x0"), denoiser
        parameters = list(self.loss.parameters())
        self.optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=0.05, fused=True)
        self.ema = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75)
        self.random = torch.Generator().manual_seed(arguments.seed)
        self.used, self.steps, self.found = 0.0, 0, (float("inf"), 0, float("nan"))
        self.due = _BETWEEN_VALIDATIONS * arguments.cpu_seconds

    def step(self) -> None:
        """Takes a step, and validates now and then; that is not counted."""
        started, share = time.process_time(), self.used / self.arguments.cpu_seconds
        for group in self.optimizer.param_groups:
            group["lr"] = self.arguments.learning_rate * 0.5 * (1 + np.cos(np.pi * share)) * min(1.0, self.steps / 100)
        rows = torch.randint(len(self.train), (self.candidate.batch_size,), generator=self.random)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.arguments.mixed_precision == "bf16"):
            loss = self.loss(self.train[rows], instance_keys(self.arguments.seed, self.steps, rows))
        loss.backward()
        nn.utils.clip_grad_norm_(self.loss.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.loss.parameters())
        self.steps += 1
        self.used += time.process_time() - started
        if self.used >= self.due:
            self.validate()
            self.due += _BETWEEN_VALIDATIONS * self.arguments.cpu_seconds

    def validate(self) -> None:
        """Measures the moving average, and keeps it if it is the best so far."""
        self.ema.store(self.loss.parameters())
        self.ema.copy_to(self.loss.parameters())
        found = validation_loss(self.loss, self.held_out)
        if found < self.found[0]:
            of_train = validation_loss(self.loss, self.train[: len(self.held_out)])
            self.found, self.best = (found, self.steps, of_train), copy.deepcopy(self.loss.denoiser).eval()
        self.ema.restore(self.loss.parameters())

    def row(self) -> str:
        """The cells of the table that tell of its training."""
        size = sum(parameter.numel() for parameter in self.loss.parameters()) / 1e6
        found, at, of_train = self.found
        return f"{self.name} | {size:.2f} | {self.steps} | {found:.4f} | {at} | {of_train:.4f}"


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
