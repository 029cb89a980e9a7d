"""Priors told which cluster a latent is of, in place of the labels that a data set lacks.

    python benchmarks/trials/clusters.py --run runs/emoji --clusters 8 16 32 64

After Adaloglou, Kaiser, Michels and Kollmann (Rethinking Cluster-Conditioned Diffusion Models, 2024): k-means of the
standardised training latents makes labels, the denoiser is told by numbers that start far apart, as `mnif prior
--augment` tells how a picture was changed, and for a tenth of a batch it is told nothing. Samples take their labels by
the clusters' shares of the training latents. --scales above 1 lead away from what is drawn without a label.
What was trained stays in RUN/clusters.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans
from torch import Tensor, nn

import latent_prior.diffusion
from latent_prior.commands.prior import fit_prior, parse_prior_arguments
from latent_prior.denoisers import Denoiser, ResMLPDenoiser
from latent_prior.diffusion import DenoisingLoss
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import denoised, initial_noise
from mnif.data.batches import InstanceGenerator
from mnif.latents.table import LatentTable

sys.path.append(str(Path(__file__).parents[1]))
from judges import Judge, judge_of
from priors import copied, slug

_UNTOLD = 0.1
"""The share of a batch that is told nothing of its cluster."""

_APART = 0.4  # standard deviation of what is told at first, as for changes


@dataclass
class Arguments:
    """Train a prior for each number of clusters, and measure what it draws."""

    run: Path
    """A run folder in which `mnif fit` has finished."""
    clusters: tuple[int, ...] = (8, 16, 32, 64)
    """Numbers of clusters."""
    scales: tuple[float, ...] = (1.0, 1.5)
    """Of guidance by labels; 1 is none."""
    flags: str = "--preset edge --max_train_steps 2500 --augment"
    """Of `mnif prior`."""
    steps: int = 8
    """Of sampling."""
    num_samples: int = 1000
    """That distances are taken over."""


class LabelledLoss(DenoisingLoss):
    """Tells the denoiser which of the centres [K, D] a latent is nearest to, changed ones too."""

    def __init__(self, *arguments: object, centres: Tensor, trained: list["LabelledLoss"]):
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.register_buffer("centres", centres, persistent=False)
        width = self.denoiser.config.time_width
        self.cluster_embedding = nn.Parameter(_APART * torch.randn(len(centres), width))
        trained.append(self)

    def at(
        self,
        latents: Tensor,
        noise: Tensor,
        time: Tensor,
        generator: InstanceGenerator | None = None,
        told: Tensor | None = None,
    ) -> Tensor:
        label = torch.cdist(self.denoiser.standardised(latents), self.centres).argmin(dim=1)
        cluster = self.cluster_embedding[label]
        if generator is not None:
            cluster = cluster * (generator.uniform() >= _UNTOLD)[:, None]
        return super().at(latents, noise, time, generator, cluster if told is None else cluster + told)


class Told(ResMLPDenoiser):
    """A denoiser that is told a label of each sample, and led away from what it guesses without."""

    denoiser: Denoiser
    told: Tensor
    scale: float

    def forward(self, sample: Tensor, timestep: Tensor | float, *_: object) -> Tensor:
        near = self.denoiser(sample, timestep, told=self.told)
        return near if self.scale == 1 else torch.lerp(self.denoiser(sample, timestep), near, self.scale)


def main(arguments: Arguments) -> None:
    judge = judge_of(arguments.run)
    for count in arguments.clusters:
        run = arguments.run / "clusters" / (slug(arguments.flags) + f"-{count}")
        copied(arguments.run, run, ["fit"])
        embedding, shares = trained(run, judge.table, count, arguments.flags)
        for scale in arguments.scales:
            figures = measured(judge, run, embedding, shares, scale, arguments)
            shown = (judge.distance, "precision", "recall", "coverage", "nn_ratio_latents")
            print(f"{count} clusters, scale {scale}", {name: round(figures[name], 3) for name in shown}, flush=True)


def trained(run: Path, table: LatentTable, count: int, flags: str) -> tuple[Tensor, Tensor]:
    """Trains what is missing; gives what the denoiser is told of each cluster, [K, time_width], and its share [K]."""
    mean, std = table.mean_and_std()
    standardised = (table.train - mean) / std
    found = KMeans(count, n_init=4, random_state=0).fit(standardised.numpy())
    shares = torch.from_numpy(np.bincount(found.labels_, minlength=count) / len(standardised))
    path, losses, plain = run / "told.safetensors", list[LabelledLoss](), latent_prior.diffusion.DenoisingLoss
    if not path.exists():
        labelled = partial(LabelledLoss, centres=torch.from_numpy(found.cluster_centers_), trained=losses)
        latent_prior.diffusion.DenoisingLoss = labelled  # type: ignore[misc,assignment]
        try:
            fit_prior(parse_prior_arguments(["--run", str(run), *flags.split()]))
        finally:
            latent_prior.diffusion.DenoisingLoss = plain  # type: ignore[misc]
        save_file({"told": losses[0].cluster_embedding.detach().clone()}, path)
    return load_file(path)["told"], shares


@torch.no_grad()
def measured(
    judge: Judge, run: Path, embedding: Tensor, shares: Tensor, scale: float, arguments: Arguments
) -> dict[str, float]:
    """Draws samples of seed 0, the label of each by a generator of its own."""
    pipeline = load_pipeline(run / "model")
    told = Told(pipeline.denoiser.config.latent_dim, 1, 0).eval()
    told.register_to_config(**pipeline.denoiser.config)
    told.latent_mean.copy_(pipeline.denoiser.latent_mean)
    told.latent_std.copy_(pipeline.denoiser.latent_std)
    told.denoiser, told.scale = pipeline.denoiser, scale
    drawing = MNIFPipeline(pipeline.decoder, told, pipeline.scheduler)
    drawing.set_progress_bar_config(disable=True)
    latents, bounds = [], shares.cumsum(0)
    for part in torch.arange(arguments.num_samples).split(64):
        indices = part.tolist()
        chosen = torch.tensor([np.random.default_rng([0, index, 1]).random() for index in indices])
        told.told = embedding[torch.bucketize(chosen, bounds, right=True).clamp(max=len(bounds) - 1)]
        noise = torch.from_numpy(initial_noise(0, indices, pipeline.decoder.config.latent_dim))
        latents.append(denoised(drawing, noise, arguments.steps))
    return judge.of_latents(torch.cat(latents).numpy())


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
