"""Priors guided by a weaker one (Karras et al., Guiding a Diffusion Model with a Bad Version of Itself, 2024).

    python benchmarks/trials/guidance.py --run runs/emoji --weak runs/emoji/priors/edge-300-steps-0

The prediction is weak + weight · (strong − weak), of the clean latent, in every step. --run holds the strong prior,
--weak another prior of the same stage one, such as one that `benchmarks/priors.py` trained for fewer steps. --distill
measures students of the guided teachers too: their pairs come from those, and distribution matching follows them. What
was trained stays in RUN/guided.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tyro
from diffusers import DPMSolverMultistepScheduler

from latent_prior import distillation, distribution_matching
from latent_prior.commands.distill import DistillArguments, distill
from latent_prior.denoisers import Denoiser
from latent_prior.distribution_matching import DistributionMatchingLoss
from latent_prior.guidance import GuidedDenoiser, guided_pipeline
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import sample_latents
from mnif.utils.args import parse_arguments

sys.path.append(str(Path(__file__).parents[1]))
from judges import judge_of
from priors import copied, slug


@dataclass
class Arguments:
    """Measure samples by the weight of the guidance."""

    run: Path
    """The run folder of the strong prior; its fit names the data."""
    weak: Path
    """The run folder of the weak one."""
    weights: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0)
    """1 is no guidance."""
    starts: tuple[float, ...] = (0.0,)
    """Shares of the way that are gone without guidance, as `mnif sample --guidance_start`; each with each weight."""
    truncations: tuple[float, ...] = (1.0,)
    """As of the pipeline; each with each weight."""
    steps: int = 8
    """Of sampling."""
    new_noise: bool = False
    """Add noise in every step, by the stochastic form of DPM-Solver++, in place of UniPC."""
    num_samples: int = 1000
    """That distances are taken over."""
    distill: bool = False
    """Also distil a student of each weight, and measure it in all its numbers of steps."""
    distill_flags: str = ""
    """Of `mnif distill`, in one string."""


def main(arguments: Arguments) -> None:
    judge, pipeline = judge_of(arguments.run), load_pipeline(arguments.run / "model")

    def measure(what: str, drawing: MNIFPipeline, steps: int, truncation: float = 1.0) -> None:
        drawing.set_progress_bar_config(disable=True)
        latents = sample_latents(drawing, 0, range(arguments.num_samples), steps, truncation=truncation)
        figures = judge.of_latents(latents.numpy())
        shown = (judge.distance, "precision", "recall", "coverage", "nn_ratio_latents")
        print(what, {name: round(figures[name], 3) for name in shown if name in figures}, flush=True)

    if arguments.new_noise:
        settings = pipeline.scheduler.config
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(settings, algorithm_type="sde-dpmsolver++")
    for weight, start, truncation in product(arguments.weights, arguments.starts, arguments.truncations):
        guided = guided_pipeline(pipeline, arguments.weak, weight, start)
        what = f"weight {weight}, start {start}, truncation {truncation}"
        measure(what, guided, arguments.steps, truncation)
    for weight in arguments.weights if arguments.distill else ():
        run = arguments.run / "guided" / slug(f"{weight} {arguments.distill_flags}")
        copied(arguments.run, run, ["fit", "prior"])
        with guided_teachers(arguments.weak, weight):
            typed = ["--run", str(run), *arguments.distill_flags.split()]
            distill(parse_arguments(DistillArguments, typed, "mnif distill"))
        drawing = load_pipeline(run / "model")
        for steps in drawing.student.config.distilled_steps:
            measure(f"student of weight {weight}, {steps} steps", drawing, steps)


@contextmanager
def guided_teachers(weak: Path, weight: float) -> Iterator[None]:
    """Within it `mnif distill` draws its pairs from guided teachers, and its matching follows them."""
    pairs, loss = distillation.teacher_pairs, distribution_matching.DistributionMatchingLoss

    def guided_pairs(folder: Path, model: Path, pipeline: MNIFPipeline, *others: Any) -> distillation.Pairs:
        return pairs(folder, model, guided_pipeline(pipeline, weak, weight), *others)

    def guided_loss(student: Denoiser, teacher: Denoiser, *others: Any) -> DistributionMatchingLoss:
        away = load_pipeline(weak / "model").denoiser.to(teacher.device).requires_grad_(False)
        return loss(student, GuidedDenoiser(teacher, away, weight), *others)

    distillation.teacher_pairs = guided_pairs
    distribution_matching.DistributionMatchingLoss = guided_loss  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        distillation.teacher_pairs, distribution_matching.DistributionMatchingLoss = pairs, loss  # type: ignore[misc]


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
