"""The alternative a user would pick: a U-Net diffusion over pixels, at the training time and the size of a run.

    python benchmarks/unet_baseline.py --run runs/demo --output_dir runs/unet

Trains diffusers' UNet2DModel with DDPM on the training pictures of the run, for as many seconds of the processor as
the run took and with as many parameters as it has, and prints a table of both. Each row is measured in a process of
its own, so that peak memory is the row's. Run again, it measures the U-Net that is there.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import tyro
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from judges import PictureJudge, judge_of

from evals.features.extractor import IndexedImages
from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import initial_noise
from mnif.data.dataset import Split
from mnif.utils.files import folder_written_atomically, write_json
from mnif.utils.json_files import read_json
from mnif.utils.process import peak_memory_megabytes, progress_bar

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


@dataclass
class Arguments:
    """Compare a run with a U-Net of the same cost."""

    run: Path
    """The run folder: `mnif fit` and `mnif prior` (and `mnif distill`, if you like) have finished in it."""
    output_dir: Path
    """Gets unet/, pictures and metrics.json."""
    cpu_seconds: float | None = None
    """Processor seconds of training; default: the run's seconds times this machine's threads."""
    steps: tuple[int, ...] = (50,)
    """DDIM steps of the U-Net; a row for each."""
    num_samples: int = 1000
    """Pictures that distances are taken over."""
    batch_size: int = 32
    """Pictures per training step."""
    learning_rate: float = 4e-4
    """Peak learning rate, of a cosine schedule."""
    rounds: int = 5
    """Of timing; medians are reported."""
    seed: int = 0
    """Of everything."""


def main(arguments: Arguments) -> None:
    diffusers.utils.logging.disable_progress_bar()
    pipeline = load_pipeline(arguments.run / "model")
    ours = parameters_of(pipeline.decoder, pipeline.denoiser)
    recorded = read_json(arguments.run / "metrics.json")
    stages = [recorded, recorded["prior"], recorded.get("distill", {"seconds": 0.0})]
    budget = arguments.cpu_seconds or sum(stage["seconds"] for stage in stages) * torch.get_num_threads()
    folder = arguments.output_dir / "unet"
    if not (folder / "config.json").exists():
        alone(partial(train, arguments, budget, ours))
    rows = {f"U-Net, {steps} steps": partial(draw_unet, folder, steps) for steps in arguments.steps}
    rows["mnif, 8 steps"] = partial(draw_ours, arguments.run, 8, False)
    for steps in pipeline.student.config.distilled_steps if pipeline.student is not None else ():
        rows[f"mnif student, {steps} steps"] = partial(draw_ours, arguments.run, steps, True)
    measured = {name: alone(partial(measure, arguments, draw)) for name, draw in rows.items()}
    training = read_json(folder / "training.json")
    write_json(arguments.output_dir / "metrics.json", {"rows": measured, "training": training})
    print("| | fd_lite0 | one picture, ms | 64 pictures, ms | peak memory, MB | parameters, M |")
    print("|---|---|---|---|---|---|")
    for name, row in measured.items():
        times = f"{row['milliseconds_1']:.1f} | {row['milliseconds_64']:.1f}"
        sizes = f"{row['peak_rss_mb']:.0f} | {row['parameters'] / 1e6:.2f}"
        print(f"| {name} | {row['fd_lite0']:.1f} | {times} | {sizes} |")
    floor = judge_of(arguments.run).controls(arguments.num_samples)["real"]
    print(f"| real pictures | {floor['fd_lite0']:.1f} | | | | |")


def train(arguments: Arguments, budget: float, parameters: int) -> None:
    """Trains until ``budget`` processor seconds are used up."""
    torch.manual_seed(arguments.seed)
    judge = judge_of(arguments.run)
    assert isinstance(judge, PictureJudge)
    flip = read_json(arguments.run / "run.json")["fit"]["arguments"].get("random_flip")
    images = torch.from_numpy(judge.data.images[judge.splits == Split.TRAIN]).permute(0, 3, 1, 2)
    unet = unet_of(images.shape[2], parameters)
    noising = DDPMScheduler(**SCHEDULE)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.learning_rate)
    ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, power=0.75)
    started, used, steps = time.process_time(), 0.0, 0
    with progress_bar(total=round(budget), desc="U-Net", unit="CPU second") as bar:
        for batch in shuffled(images, arguments.batch_size):
            optimizer.param_groups[0]["lr"] = arguments.learning_rate * (1 + np.cos(np.pi * used / budget)) / 2
            clean = batch.float() / 127.5 - 1
            if flip:
                clean = torch.where(torch.rand(len(clean), 1, 1, 1) < 0.5, clean.flip(3), clean)
            noise, timesteps = torch.randn_like(clean), torch.randint(1000, (len(clean),))
            error = unet(noising.add_noise(clean, noise, timesteps), timesteps).sample - noise
            optimizer.zero_grad()
            error.square().mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            ema.step(unet.parameters())
            steps += 1
            before, used = used, time.process_time() - started
            bar.update(round(used) - round(before))
            if used >= budget:
                break
    ema.copy_to(unet.parameters())
    with folder_written_atomically(arguments.output_dir / "unet") as temporary:
        unet.save_pretrained(temporary)
        metrics = {"cpu_seconds": used, "steps": steps, "pictures": len(images), "parameters": unet.num_parameters()}
        write_json(temporary / "training.json", metrics)
    print(f"U-Net: {unet.num_parameters():,} parameters, {steps} steps in {used:.0f} processor seconds")


def unet_of(resolution: int, parameters: int) -> UNet2DModel:
    """The widest U-Net of three levels, attention in the lowest, that has no more than so many parameters."""

    def made(width: int) -> UNet2DModel:
        return UNet2DModel(
            sample_size=resolution,
            block_out_channels=(width, 2 * width, 2 * width),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )

    width = 8
    with torch.device("meta"):
        while made(width + 8).num_parameters() <= parameters:
            width += 8
    return made(width)


def shuffled(images: torch.Tensor, batch_size: int) -> Iterator[torch.Tensor]:
    """Batches without end, every epoch in an order of its own."""
    while True:
        for index in torch.randperm(len(images)).split(min(batch_size, len(images))):
            yield images[index]


def draw_unet(folder: Path, steps: int) -> tuple[Callable[[range], np.ndarray], int]:
    """What draws pictures [N, H, W, 3] in [0, 1] with the U-Net, and its number of parameters."""
    unet = UNet2DModel.from_pretrained(folder).eval()
    pipeline = DDIMPipeline(unet, DDIMScheduler(**SCHEDULE, timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)

    def draw(indices: range) -> np.ndarray:
        generators = [torch.Generator().manual_seed(index) for index in indices]
        return pipeline(len(generators), generators, num_inference_steps=steps, output_type="np").images

    return draw, unet.num_parameters()


def draw_ours(run: Path, steps: int, use_student: bool) -> tuple[Callable[[range], np.ndarray], int]:
    """The same with the run's model."""
    pipeline = load_pipeline(run / "model")
    pipeline.set_progress_bar_config(disable=True)

    def draw(indices: range) -> np.ndarray:
        noise = torch.from_numpy(initial_noise(0, indices, pipeline.decoder.config.latent_dim))
        settings = {"num_inference_steps": steps, "use_student": use_student, "output_type": "np"}
        return pipeline(latents=noise, **settings).images

    return draw, parameters_of(pipeline.decoder, pipeline.student if use_student else pipeline.denoiser)


def measure(
    arguments: Arguments, prepare: Callable[[], tuple[Callable[[range], np.ndarray], int]]
) -> dict[str, float | dict]:
    """Times, peak memory of sampling, and distance of the samples."""
    draw, parameters = prepare()
    metrics: dict[str, float | dict] = {"parameters": parameters}
    for count in (1, 64):
        draw(range(count))
        seconds = []
        for _ in range(arguments.rounds):
            started = time.perf_counter()
            draw(range(count))
            seconds.append(time.perf_counter() - started)
        metrics[f"milliseconds_{count}"] = 1e3 * statistics.median(seconds)
    metrics["peak_rss_mb"] = peak_memory_megabytes()  # before the evaluation needs some
    begins = progress_bar(range(0, arguments.num_samples, 64), desc="sampling", unit="batch")
    drawn = [draw(range(begin, min(begin + 64, arguments.num_samples))) for begin in begins]
    samples = np.ascontiguousarray((np.concatenate(drawn) * 255).round().astype(np.uint8))
    source = IndexedImages(
        len(samples), samples.shape[1:3], sha256(samples).hexdigest(), lambda rows: samples[rows.start : rows.stop]
    )
    judge = judge_of(arguments.run)
    assert isinstance(judge, PictureJudge)
    return metrics | judge.of_pictures(source)


def parameters_of(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def alone(work: Callable[[], Any]) -> Any:
    """Does ``work`` in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(work).result()


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
