"""`mnif prior`: learns the distribution of the latents of a run (stage two)."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor

from latent_prior.denoiser import Denoiser, LatentDenoiser
from latent_prior.model_card import write_model_card
from latent_prior.noise import initial_noise
from latent_prior.objective import DenoisingLoss, sampling_scheduler, validation_loss
from latent_prior.paper_denoiser import PaperDenoiser
from latent_prior.pipeline import MNIFPipeline
from latent_prior.prior_arguments import PriorArguments, parse_prior_arguments
from mnif.errors import UserError
from mnif.files import folder_written_atomically, merge_json, read_json, sha256_of_file
from mnif.latents import LatentTable
from mnif.model_folder import load_component, save_component, save_index
from mnif.modeling import MNIFModel
from mnif.pictures import picture_grid, save_picture
from mnif.rows import Rows
from mnif.runs import begin_stage, finish_stage, peak_memory_megabytes
from mnif.training import make_accelerator, train


def main(arguments: list[str]) -> None:
    """Runs `mnif prior`."""
    fit_prior(parse_prior_arguments(arguments))


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
    latents = torch.cat([table.train, *_extra_latents(arguments, table)])
    if arguments.num_train_epochs is not None:
        per_epoch = max(len(latents) // min(arguments.train_batch_size, len(latents)), 1)
        arguments.max_train_steps = arguments.num_train_epochs * per_epoch
    accelerator = make_accelerator(arguments, run)
    extra = {f"extra_latents_{i}": sha256_of_file(path) for i, path in enumerate(arguments.extra_latents or [])}
    if begin_stage(run, "prior", arguments, {"decoder_fingerprint": table.fingerprint} | extra):
        print(f"{run}: `mnif prior` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    denoiser = make_denoiser(arguments, table)
    loss = DenoisingLoss(
        denoiser,
        arguments.objective,
        arguments.weighting,
        arguments.snr_limit,
        arguments.loss,
        arguments.latent_noise,
    ).to(accelerator.device)
    held_out = table.latents[table.held_out] if table.held_out.any() else table.train
    accelerator.print(
        f"{len(latents)} latents to train, {int(table.held_out.sum())} held out; "
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
    keep_best = "validation_loss" if arguments.keep == "best" else None
    train(accelerator, arguments, loss, [optimizer], Rows(latents=latents), run, "prior", validate, ema, keep_best)
    if accelerator.is_main_process:
        _finish(arguments, decoder, denoiser.cpu().eval(), time.perf_counter() - started)
    accelerator.wait_for_everyone()


def make_denoiser(arguments: PriorArguments, table: LatentTable) -> Denoiser:
    """The denoiser, freshly drawn, with the statistics of the table's training latents."""
    shape: dict[str, Any] = {"latent_dim": table.latents.shape[1], "width": arguments.width, "depth": arguments.depth}
    shape["decoder_fingerprint"] = table.fingerprint
    if arguments.denoiser == "paper":
        denoiser: Denoiser = PaperDenoiser(**shape)
    else:
        denoiser = LatentDenoiser(**shape, dropout=arguments.dropout)
    mean, std = table.mean_and_std()
    denoiser.latent_mean.copy_(mean)
    denoiser.latent_std.copy_(std)
    return denoiser


def _extra_latents(arguments: PriorArguments, table: LatentTable) -> list[Tensor]:
    """The training latents of the further tables.

    Raises:
        UserError: one is missing, or belongs to another decoder.
    """
    return [LatentTable.load(path, table.fingerprint).train for path in arguments.extra_latents or []]


def _finish(arguments: PriorArguments, decoder: MNIFModel, denoiser: Denoiser, seconds: float) -> None:
    """Completes the model folder to a pipeline and shows some samples."""
    run = arguments.run
    scheduler = sampling_scheduler(arguments.objective, ancestral=arguments.sampler == "ancestral")
    add_prior(run / "model", MNIFPipeline(decoder, denoiser, scheduler))
    pipeline = MNIFPipeline(decoder, denoiser, sampling_scheduler(arguments.objective))
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
    write_model_card(run)
    finish_stage(run, "prior")
    print(f"{run / 'model'}: denoiser and scheduler added; pictures at {run / 'samples' / 'samples.png'}")


def add_prior(folder: Path, pipeline: MNIFPipeline) -> None:
    """Adds denoiser, scheduler and ``model_index.json`` to a model folder that holds the decoder.

    A student of an earlier denoiser goes. The index is written last, so a folder with an index is complete.
    """
    (folder / "model_index.json").unlink(missing_ok=True)
    for name in ("student", "student_scheduler"):
        shutil.rmtree(folder / name, ignore_errors=True)
    save_component(folder, "denoiser", pipeline.denoiser)
    with folder_written_atomically(folder / "scheduler") as temporary:
        pipeline.scheduler.save_pretrained(temporary)
    save_index(folder, pipeline)
