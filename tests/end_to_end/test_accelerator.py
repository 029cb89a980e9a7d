"""What crosses between the host and an accelerator: in a loop nothing but its batches, and nobody waits for them.

The accelerator is one of host memory (:mod:`tests.fakes.accelerator`), in a process of its own, which runs some whole
commands, and then each loop for a while and for longer. What comes on top for each step, batch or latent more is all
that may grow.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import small_decoder, small_encoder, small_pipeline

# How many copies to the device, and waits of the host, each step, batch or latent costs.
ALLOWED = {
    "steps of fit by an encoder": (2, 0),  # "images" and "row" of a batch
    "steps of fit by auto-decoding": (2, 0),
    "steps of fit by meta-learning": (2, 0),
    "steps of fit, data on the device": (1, 0),  # the numbers of the rows
    "steps of fit, batches summed up": (6, 0),
    "steps of fit to views": (6, 0),  # "poses" and "intrinsics" too, and which rays at which depths
    "steps of fit to views in cells": (6, 2),  # the points that fields share, and the most that one gets
    "steps of prior": (2, 0),
    "steps of distill that match distributions": (2, 0),  # "row", and which training latents
    "steps of distill": (3, 0),
    "steps of refinement": (0, 0),
    "steps of robust refinement": (0, 0),
    "batches to encode": (2, 0),
    "batches to encode through masks": (2, 0),
    "batches to measure": (3, 0),
    "batches of patches": (3, 0),
    "latents to decode": (1, 1),  # a picture comes back
    "chunks of samples": (2, 2),  # pictures come back, and whether all is finite
    "denoising steps of a student": (0, 0),
    "denoising steps of a prior": (0, 6),  # small tensors that diffusers' UniPC makes of numbers
    "batches of pictures to evaluate": (1, 1),
    "batches of pictures for Inception": (1, 1),
}
FEWER, MORE = 2, 5


@pytest.fixture(scope="module")
def grown(
    picture_folder: Path, ball_views: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, int]]:
    """For each loop what came on top, by kind and place."""
    output = tmp_path_factory.mktemp("accelerator")
    command = [sys.executable, "-m", "tests.end_to_end.test_accelerator", picture_folder, ball_views, output]
    folder = Path(__file__).parents[2]
    done = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((output / "grown.json").read_text())


@pytest.mark.parametrize("name", ALLOWED)
def test_in_a_loop_nothing_but_batches_crosses(name: str, grown: dict[str, dict[str, int]]) -> None:
    for kind, each in zip(("upload", "wait"), ALLOWED[name], strict=True):
        found = {place: count for place, count in grown[name].items() if place.startswith(kind)}
        assert sum(found.values()) == each * (MORE - FEWER), "\n".join(f"{n} {place}" for place, n in found.items())
    if name == "denoising steps of a prior":
        assert all("in diffusers.schedulers" in place for place in grown[name])


def loops(pictures: Path, views: Path, output: Path) -> dict[str, Callable[[int], Any]]:
    """What runs each loop for a number of steps, batches or latents."""
    size = ["--resolution", "16", "--num_bases", "4", "--width", "8", "--latent_dim", "8", "--encoder_width", "32"]
    rays = ["--num_bases", "4", "--width", "16", "--depth", "1", "--samples_per_ray", "8", "--rays_per_step", "8"]
    rays += ["--latent_dim", "8"]

    def fit(data: Path, *flags: str) -> Callable[[int], None]:
        from mnif.commands.fit import parse_fit_arguments
        from mnif.signals.registry import signal_class
        from mnif.training.assembly import bare_steps

        given = ["--data", str(data), "--output_dir", f"{output}/run", "--resume_from_checkpoint", "no"]
        arguments = parse_fit_arguments([*given, "--train_batch_size", "8", *flags])
        kind = signal_class(arguments.signal)
        loaded = kind.load(arguments.data, asdict(arguments))
        signal = kind.from_data(loaded, asdict(arguments))
        return lambda steps: [*bare_steps(replace(arguments, max_train_steps=steps), signal, loaded)]

    return {
        "steps of fit by an encoder": fit(pictures, *size, "--random_flip", "--random_colours"),
        "steps of fit by auto-decoding": fit(pictures, *size, "--method", "auto-decoding"),
        "steps of fit by meta-learning": fit(pictures, *size, "--method", "meta"),
        "steps of fit, data on the device": fit(pictures, *size, "--data_on_device", "on"),
        "steps of fit, batches summed up": fit(
            pictures, *size, "--method", "auto-decoding", "--gradient_accumulation_steps", "3"
        ),
        "steps of fit to views": fit(views, *rays, "--cells", "1"),
        "steps of fit to views in cells": fit(views, *rays, "--cells", "2"),
        **stage_two_loops(output),
        **inference_loops(output),
        **sampling_loops(output),
    }


def stage_two_loops(output: Path) -> dict[str, Callable[[int], Any]]:
    from latent_prior.commands import distill, prior
    from latent_prior.distillation import Pairs
    from mnif.latents.table import LatentTable
    from mnif.training.loop import make_accelerator

    decoder, latents = small_decoder(), torch.randn(40, 12)
    table = LatentTable.of(decoder, latents, [*map(str, range(40))], torch.arange(40) < 4, "none")
    pairs = Pairs(torch.tensor([999, 499]), torch.randn(80, 2, 12), torch.randn(80, 2, 12))
    given: dict[str, Any] = {"train_batch_size": 8, "resume_from_checkpoint": "no"}

    def train_prior(steps: int) -> None:
        arguments = prior.PriorArguments(run=output / "prior", max_train_steps=steps, **given)
        accelerator, denoiser = make_accelerator(arguments, arguments.run), small_pipeline(small_decoder()).denoiser
        prior._train(arguments, accelerator, small_decoder(), denoiser, table, {"latents": table.train})

    def train_student(steps: int) -> None:
        arguments = distill.DistillArguments(run=output / "distill", max_train_steps=steps, num_pairs=80, **given)
        accelerator, student = make_accelerator(arguments, arguments.run), small_pipeline(small_decoder()).denoiser
        distill._train(arguments, accelerator, student, pairs)

    def match_student(steps: int) -> None:
        arguments = distill.DistillArguments(run=output / "distill", matching_steps=steps, num_pairs=80, **given)
        accelerator = make_accelerator(arguments, arguments.run)
        pipeline = small_pipeline(small_decoder()).to(accelerator.device)
        student = small_pipeline(small_decoder()).denoiser.to(accelerator.device)
        distill._match(arguments, accelerator, student, pipeline, table)

    return {
        "steps of prior": train_prior,
        "steps of distill": train_student,
        "steps of distill that match distributions": match_student,
    }


def inference_loops(output: Path) -> dict[str, Callable[[int], Any]]:
    from evals.features.inception import Inception
    from evals.features.resize import bilinear
    from evals.image_sets import latent_images
    from mnif.data.batches import array_dataset
    from mnif.latents.inference import evaluate_latents, infer_latents
    from mnif.latents.masks import masked
    from mnif.latents.patches import patch_residuals
    from mnif.latents.robust import RobustLoss
    from mnif.signals.image import Image, ImageWriter
    from mnif.utils.devices import default_device, sent

    device, signal = default_device(), Image(16, 3)
    decoder, encoder = small_decoder().to(device), small_encoder().to(device)
    images, latents = np.random.default_rng(0).integers(0, 256, (320, 16, 16, 3), dtype=np.uint8), torch.randn(320, 12)
    robust = RobustLoss(1e-3, torch.zeros(12, device=device), torch.eye(12, device=device))
    observe = masked(signal, images[..., 0] > 99, device)
    inception = Inception.__new__(Inception)
    inception.network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    inception.device, inception.grey = device, 128.0

    def rows(count: int) -> Any:
        return array_dataset({"images": images[:count]})

    def found(count: int, steps: int, **options: Any) -> None:
        torch.cat([*infer_latents(decoder, signal, rows(count), encoder, steps, batch_size=4, **options)])

    @torch.no_grad()
    def decode(count: int) -> None:
        for row in range(count):
            ImageWriter().write(decoder, signal, sent(latents[row : row + 1], device), output, f"{row}")

    def evaluated(batches: int) -> None:
        pictures = latent_images(decoder, latents.numpy(), "none", quantise=True)
        for batch in range(batches):
            pictures.read(range(4 * batch, 4 * batch + 4))

    return {
        "steps of refinement": lambda steps: found(4, steps),
        "steps of robust refinement": lambda steps: found(4, steps, loss=robust),
        "batches to encode": lambda batches: found(4 * batches, 0),
        "batches to encode through masks": lambda batches: found(4 * batches, 0, observe=observe),
        "batches to measure": lambda n: evaluate_latents(decoder, signal, rows(4 * n), latents[: 4 * n], 4),
        "batches of patches": lambda n: patch_residuals(decoder, signal, rows(64 * n), latents[: 64 * n], (2, 2)),
        "latents to decode": decode,
        "batches of pictures to evaluate": evaluated,
        "batches of pictures for Inception": lambda n: [*inception.features(images[: 32 * n], bilinear)],
    }


def sampling_loops(output: Path) -> dict[str, Callable[[int], Any]]:
    from latent_prior.diffusion import student_scheduler
    from latent_prior.sample_writers import FolderOfSamples
    from latent_prior.sampling import sample_latents
    from mnif.signals.image import Image, ImageWriter
    from mnif.utils.devices import default_device

    prior, student = (small_pipeline(small_decoder()).to(default_device()) for _ in range(2))
    student.scheduler = student_scheduler()

    @torch.no_grad()
    def sampled(chunks: int) -> None:
        folder, options = Path(mkdtemp(dir=output)), {"num_inference_steps": 1}
        samples = FolderOfSamples(folder, 64 * chunks, student, 0, options, Image(16, 3), ImageWriter(), 64)
        for chunk in samples.chunks():
            assert len([*samples.write(chunk)]) == 64

    return {
        "chunks of samples": sampled,
        "denoising steps of a student": lambda steps: sample_latents(student, 0, range(64), steps),
        "denoising steps of a prior": lambda steps: sample_latents(prior, 0, range(64), 4 + steps),
    }


def run_commands(pictures: Path, output: Path) -> None:
    """Runs whole commands, which end where something is on another device than it should be."""
    from mnif.cli import main as mnif

    run, few = output / "whole", ["--max_train_steps", "1", "--compile", "off"]
    model, size = ["--model", f"{run}/model"], ["--resolution", "8", "--cells", "1", "--num_bases", "4"]
    for command in (
        ["fit", "--data", pictures, "--output_dir", run, *size, *few, "--refinement_steps", "1"],
        ["prior", "--run", run, "--width", "16", "--depth", "1", *few],
        ["sample", *model, "--output_dir", output / "drawn", "--num_samples", "2"],
        ["encode", *model, "--data", pictures, "--output_dir", output / "encoded", "--refinement_steps", "1"],
        ["decode", *model, "--latents", output / "encoded/latents.safetensors", "--output_dir", output / "decoded"],
    ):
        assert mnif([*map(str, command)]) == 0, command


def main(pictures: Path, views: Path, output: Path) -> None:
    """Writes what came on top in each loop to ``grown.json``."""
    from accelerate.state import AcceleratorState

    from tests.fakes import accelerator

    accelerator.plug_in()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("run", "prior", "distill"):
        (output / name).mkdir()
    run_commands(pictures, output)
    found: dict[str, dict[str, int]] = {}
    for name, run in loops(pictures, views, output).items():
        crossings = []
        for count in (FEWER, FEWER, MORE):  # grids and the like are made in the first
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator.crossings.clear()
            run(count)
            crossings.append(accelerator.crossings.copy())
        _, fewer, more = crossings
        found[name] = dict(more - fewer)
    (output / "grown.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
