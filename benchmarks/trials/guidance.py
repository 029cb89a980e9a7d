"""Priors guided by a weaker one (Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024).

    python benchmarks/trials/guidance.py --run runs/emoji --weak runs/emoji/priors/edge-300-steps-0

The prediction is weak + weight · (strong − weak), of the clean latent, in every step. --run holds the strong prior,
--weak another prior of the same stage one, such as one that `benchmarks/priors.py` trained for fewer steps.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
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
    num_samples: int = 1000
    """That distances are taken over."""


class Guided(ResMLPDenoiser):
    """The strong denoiser, led away from the weak one."""

    strong: Denoiser
    weak: Denoiser
    weight: float

    def forward(self, sample: Tensor, timestep: Tensor | float, *_: object) -> Tensor:
        near, far = self.weak(sample, timestep), self.strong(sample, timestep)
        return near + self.weight * (far - near)


def main(arguments: Arguments) -> None:
    judge, pipeline = judge_of(arguments.run), load_pipeline(arguments.run / "model")
    strong = pipeline.denoiser
    guided = Guided(strong.config.latent_dim, 1, 0, decoder_fingerprint=strong.config.decoder_fingerprint).eval()
    guided.latent_mean.copy_(strong.latent_mean)
    guided.latent_std.copy_(strong.latent_std)
    guided.strong, guided.weak = strong, load_pipeline(arguments.weak / "model").denoiser
    pipeline = MNIFPipeline(pipeline.decoder, guided, pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    for guided.weight in arguments.weights:
        figures = judge.of_latents(sample_latents(pipeline, 0, range(arguments.num_samples)).numpy())
        print(
            guided.weight, {name: round(figures[name], 3) for name in (judge.distance, "nn_ratio_latents")}, flush=True
        )


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
