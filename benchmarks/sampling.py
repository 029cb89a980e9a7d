"""From noise to pixels, one picture: the student's one step beside the paper's prior with its 1000.

    python benchmarks/sampling.py --model runs/demo/model

The paper's prior is the network of `mnif prior --preset paper` for the model's latents, sampled by DDPM in 1000 steps.
Time does not depend on weights, so it keeps those it starts with. Medians, milliseconds, all in one run.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from latent_prior.commands.prior import PRESETS
from latent_prior.denoisers import PaperDenoiser
from latent_prior.diffusion import sampling_scheduler
from latent_prior.pipeline import MNIFPipeline, load_pipeline
from latent_prior.sampling import step_generators
from mnif.models.mnif_model import MNIFModel


@dataclass
class Arguments:
    """Measure how long one picture takes."""

    model: Path
    """The model folder of a run in which `mnif distill` has finished."""
    rounds: int = 101
    """Of the short ones; medians are printed."""
    paper_rounds: int = 1
    """Of the paper's 1000 steps, a minute or so each."""


def main(arguments: Arguments) -> None:
    ours = load_pipeline(arguments.model)
    theirs = papers_pipeline(ours.decoder)
    works = {f"student, {steps} step(s)": draw(ours, steps) for steps in ours.student.config.distilled_steps}
    works |= {f"teacher, {steps} steps": draw(ours, steps) for steps in (8, 20)}
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {ours.decoder.config.resolution} pixels")
    found = {name: milliseconds(work, arguments.rounds) for name, work in works.items()}
    found["paper's prior, 1000 steps"] = milliseconds(draw(theirs, 1000), arguments.paper_rounds, warm=False)
    least = found["student, 1 step(s)"]
    for name, value in found.items():
        print(f"{name:28} {value:10.2f} ms {value / least:10.1f}")


def papers_pipeline(decoder: MNIFModel, **sizes: int) -> MNIFPipeline:
    """The paper's prior for a decoder, with the weights it starts with; ``sizes`` replace its own."""
    flags = json.loads((PRESETS / "paper.json").read_text())["arguments"]
    sizes = {name: flags[name] for name in ("width", "depth")} | sizes
    paper = PaperDenoiser(latent_dim=decoder.config.latent_dim, **sizes)
    paper.register_to_config(decoder_fingerprint=decoder.fingerprint())
    return MNIFPipeline(decoder, paper, sampling_scheduler("x0", ancestral=True))


def draw(pipeline: MNIFPipeline, steps: int, batch: int = 1) -> Callable[[], object]:
    """What draws a batch from noise to pixels, in memory that NumPy can read."""
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(batch, pipeline.decoder.config.latent_dim, generator=torch.Generator().manual_seed(0))
    generators = step_generators(0, range(batch))
    return lambda: pipeline(latents=noise, generator=generators, num_inference_steps=steps, output_type="np")


def milliseconds(work: Callable[[], object], rounds: int, warm: bool = True) -> float:
    for _ in range(5 * warm):
        work()
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return 1e3 * statistics.median(seconds)


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
