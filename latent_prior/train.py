"""`mnif prior`: learns the distribution of the latents of a run (stage two)."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel

from latent_prior.denoiser import LatentDenoiser
from latent_prior.noise import initial_noise
from latent_prior.objective import DenoisingLoss, sampling_scheduler, validation_loss
from latent_prior.pipeline import MNIFPipeline
from mnif.arguments import parse_arguments
from mnif.errors import UserError
from mnif.files import folder_written_atomically, merge_json, read_json
from mnif.latents import LatentTable
from mnif.model_folder import load_component, save_component
from mnif.modeling import MNIFModel
from mnif.pictures import picture_grid, save_picture
from mnif.rows import Rows
from mnif.runs import begin_stage, finish_stage, peak_memory_megabytes
from mnif.training import TrainingArguments, make_accelerator, train


@dataclass(kw_only=True)
class PriorArguments(TrainingArguments):
    """Learn the distribution of a run's latents; adds denoiser and scheduler to RUN/model."""

    run: Path
    """The run folder of `mnif fit`."""
    objective: Literal["x0", "flow"] = "x0"
    """Predict the clean latent (diffusion) or the velocity (flow matching)."""
    width: int = 512
    """Hidden units of the denoiser."""
    depth: int = 4
    """Residual blocks of the denoiser."""
    dropout: float = 0.1
    """Dropout in the blocks."""
    train_batch_size: int = 256
    """Latents per step, over all processes together."""
    max_train_steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Of AdamW."""
    ema_decay: float = 0.999
    """Largest decay of the weights' moving average, which is what is validated, kept and sampled from."""
    validation_steps: int = 100
    """Steps between validations; the weights with the smallest loss on held-out latents are kept."""


def main(arguments: list[str]) -> None:
    """Runs `mnif prior`."""
    fit_prior(parse_arguments(PriorArguments, arguments, "mnif prior"))


def fit_prior(arguments: PriorArguments) -> None:
    """Trains stage two on the latent table of ``arguments.run``.

    Raises:
        UserError: the run has no finished stage one, the latents belong to another decoder, or training diverges.
    """
    started = time.perf_counter()
    run = arguments.run
    if not run.is_dir():
        raise UserError(f"--run {run}: no such run folder; `mnif fit --output_dir {run}` makes it")
    decoder = load_component(MNIFModel, run / "model", "decoder")
    table = LatentTable.load(run / "latents.safetensors", decoder.fingerprint())
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "prior", arguments, {"decoder_fingerprint": table.fingerprint}):
        print(f"{run}: `mnif prior` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    mean, std = table.mean_and_std()
    denoiser = LatentDenoiser(
        latent_dim=table.latents.shape[1],
        width=arguments.width,
        depth=arguments.depth,
        dropout=arguments.dropout,
        decoder_fingerprint=table.fingerprint,
    )
    denoiser.latent_mean.copy_(mean)
    denoiser.latent_std.copy_(std)
    loss = DenoisingLoss(denoiser, arguments.objective).to(accelerator.device)
    held_out = table.latents[table.held_out] if table.held_out.any() else table.train
    accelerator.print(
        f"{len(table.train)} latents to train, {int(table.held_out.sum())} held out; "
        f"denoiser {denoiser.num_parameters():,} parameters"
    )

    def validate() -> dict[str, float]:
        probes = {"validation_loss": held_out, "validation_loss_train": table.train[: len(held_out)]}
        return {name: validation_loss(loss, latents.to(accelerator.device)) for name, latents in probes.items()}

    optimizer = torch.optim.AdamW(
        denoiser.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, fused=True
    )
    ema = EMAModel(loss.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    rows = Rows(latents=table.train)
    train(accelerator, arguments, loss, [optimizer], rows, run, "prior", validate, ema, keep_best="validation_loss")
    if accelerator.is_main_process:
        _finish(arguments, decoder, denoiser.cpu().eval(), time.perf_counter() - started)
    accelerator.wait_for_everyone()


def _finish(arguments: PriorArguments, decoder: MNIFModel, denoiser: LatentDenoiser, seconds: float) -> None:
    """Completes the model folder to a pipeline and shows some samples."""
    run = arguments.run
    pipeline = MNIFPipeline(decoder, denoiser, sampling_scheduler(arguments.objective))
    add_prior(run / "model", pipeline)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(initial_noise(arguments.seed, range(64), denoiser.config.latent_dim))
    (images,) = pipeline(latents=noise, return_dict=False)
    save_picture(run / "samples" / "samples.png", picture_grid([np.asarray(i) for i in images], 16, scale=2))
    figures = {
        "seconds": round(seconds, 1),
        "peak_rss_mb": peak_memory_megabytes(),
        "denoiser_parameters": denoiser.num_parameters(),
    }
    recorded = read_json(run / "metrics.json")
    merge_json(run / "metrics.json", {"prior": recorded.get("prior", {}) | figures})
    finish_stage(run, "prior")
    print(f"{run / 'model'}: denoiser and scheduler added; pictures at {run / 'samples' / 'samples.png'}")


def add_prior(folder: Path, pipeline: MNIFPipeline) -> None:
    """Adds denoiser, scheduler and ``model_index.json`` to a model folder that holds the decoder.

    The index is written last, so a folder with an index is complete.
    """
    save_component(folder, "denoiser", pipeline.denoiser)
    with folder_written_atomically(folder / "scheduler") as temporary:
        pipeline.scheduler.save_pretrained(temporary)
    pipeline.save_config(folder)
