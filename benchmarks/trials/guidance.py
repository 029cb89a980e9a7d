"""Priors guided by a weaker one (Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024).

    python benchmarks/trials/guidance.py --run runs/emoji --weak runs/emoji/priors/edge-300-steps-0

The prediction is weak + weight · (strong − weak), of the clean latent, in every step. --run holds the strong prior,
--weak another prior of the same stage one, such as one that `benchmarks/priors.py` trained for fewer steps.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from latent_prior.denoisers import Denoiser, ResMLPDenoiser
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import sample_latents

sys.path.append(str(Path(__file__).parents[1]))
from judges import judge_of


@dataclass
class Arguments:
    """Measure samples by the weight of the guidance."""

    run: Path
    """The run folder of the strong prior; its fit names the data."""
    weak: Path
    """The run folder of the weak one."""
    weights: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    """1 is no guidance."""
    below: tuple[int, ...] = (1000,)
    """Guide at timesteps below this alone, of 1000 (Kynkäänniemi et al., Applying Guidance in a Limited Interval,
    2024); each with each weight."""
    above: int = 0
    """Guide at timesteps from this on."""
    truncations: tuple[float, ...] = (1.0,)
    """As of the pipeline; each with each weight."""
    steps: int = 8
    """Of sampling."""
    new_noise: bool = False
    """Add noise in every step, by the stochastic form of DPM-Solver++, in place of UniPC."""
    num_samples: int = 1000
    """That distances are taken over."""


class Guided(ResMLPDenoiser):
    """The strong denoiser, led away from the weak one."""

    strong: Denoiser
    weak: Denoiser
    weight: float
    between: tuple[int, int]

    def forward(self, sample: Tensor, timestep: Tensor | float, *_: object) -> Tensor:
        near = self.strong(sample, timestep)
        if self.weight == 1 or not self.between[0] <= float(timestep) < self.between[1]:
            return near
        far = self.weak(sample, timestep)
        return far + self.weight * (near - far)


def main(arguments: Arguments) -> None:
    judge, pipeline = judge_of(arguments.run), load_pipeline(arguments.run / "model")
    strong, scheduler = pipeline.denoiser, pipeline.scheduler
    guided = Guided(strong.config.latent_dim, 1, 0, decoder_fingerprint=strong.config.decoder_fingerprint).eval()
    guided.latent_mean.copy_(strong.latent_mean)
    guided.latent_std.copy_(strong.latent_std)
    guided.strong, guided.weak = strong, load_pipeline(arguments.weak / "model").denoiser
    if arguments.new_noise:
        scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config, algorithm_type="sde-dpmsolver++")
    pipeline = MNIFPipeline(pipeline.decoder, guided, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for below, guided.weight, truncation in product(arguments.below, arguments.weights, arguments.truncations):
        guided.between = (arguments.above, below)
        indices = range(arguments.num_samples)
        latents = sample_latents(pipeline, 0, indices, arguments.steps, truncation=truncation, use_student=False)
        figures = judge.of_latents(latents.numpy())
        shown = (judge.distance, "precision", "recall", "coverage", "nn_ratio_latents")
        place = f"weight {guided.weight}, below {below}, truncation {truncation}"
        print(place, {name: round(figures[name], 3) for name in shown if name in figures}, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
