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

from latent_prior.guidance import guided_pipeline
from latent_prior.pipeline import load_pipeline
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
    truncations: tuple[float, ...] = (1.0,)
    """As of the pipeline; each with each weight."""
    steps: int = 8
    """Of sampling."""
    new_noise: bool = False
    """Add noise in every step, by the stochastic form of DPM-Solver++, in place of UniPC."""
    num_samples: int = 1000
    """That distances are taken over."""


def main(arguments: Arguments) -> None:
    judge, pipeline = judge_of(arguments.run), load_pipeline(arguments.run / "model")
    if arguments.new_noise:
        settings = pipeline.scheduler.config
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings, algorithm_type="sde-dpmsolver++")
    for weight, truncation in product(arguments.weights, arguments.truncations):
        guided = guided_pipeline(pipeline, arguments.weak, weight)
        guided.set_progress_bar_config(disable=True)
        latents = sample_latents(guided, 0, range(arguments.num_samples), arguments.steps, truncation=truncation)
        figures = judge.of_latents(latents.numpy())
        shown = (judge.distance, "precision", "recall", "coverage", "nn_ratio_latents")
        place = f"weight {weight}, truncation {truncation}"
        print(place, {name: round(figures[name], 3) for name in shown if name in figures}, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
