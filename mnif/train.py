"""`mnif fit`: learns the bases and one latent per instance (stage one)."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from mnif.arguments import parse_arguments
from mnif.data import ImageData, load_images
from mnif.encoder import PatchEncoder
from mnif.errors import UserError
from mnif.files import merge_json
from mnif.fitting import AmortisedFitting, AutoDecoding, encoded_latents, in_batches, psnr
from mnif.latents import LatentTable
from mnif.model_folder import load_component, save_component
from mnif.modeling import MNIFModel
from mnif.pictures import picture_grid, save_picture, to_pixels
from mnif.runs import begin_stage, finish_stage, peak_memory_megabytes
from mnif.training import Rows, TrainingArguments, make_accelerator, train


@dataclass(kw_only=True)
class FitArguments(TrainingArguments):
    """Learn basis networks and latents from data; the same command again continues or reuses the run."""

    data: str
    """A built-in set (twemoji), a folder of pictures, or an .npz file."""
    output_dir: Path
    """The run folder: gets model/, latents.safetensors, metrics.jsonl, metrics.json and samples/."""
    signal: Literal["image"] = "image"
    """What the data are."""
    method: Literal["encoder", "auto-decoding"] = "encoder"
    """How latents are found: by an encoder trained with the bases, or as a learned row per instance."""
    resolution: int = 32
    """Pictures are resized to this many pixels per axis."""
    held_out_fraction: float = 0.1
    """Share of the designs kept out of training."""
    num_bases: int = 96
    """Basis networks per layer."""
    width: int = 24
    """Hidden units of a field."""
    depth: int = 2
    """Hidden-to-hidden layers of a field."""
    latent_dim: int = 128
    """Numbers in a latent."""
    cells: int = 4
    """Cells per axis, each with a field of its own; 1 is one global field, as in the paper."""
    overlap: float = 0.1875
    """How far a cell's field reaches over its borders, as a fraction of its width (0 to 0.5)."""
    omega: float = 10.0
    """Frequency w0 of the sines."""
    mixing: Literal["delta", "average"] = "delta"
    """Mean network plus mixed differences, or the paper's plain weighted average."""
    output_sine: bool = False
    """A sine after the last layer too, as the paper's image fields have it."""
    random_flip: bool = False
    """Mirror half of the pictures left to right while training (encoder)."""
    max_train_steps: int = 5000
    """Optimizer steps."""
    learning_rate: float = 4e-3
    """Peak learning rate of the encoder and of the latent → coefficients map."""
    basis_learning_rate: float = 1.2e-2
    """Peak learning rate of the bases."""
    latent_noise: float = 0.3
    """Standard deviation of the noise added to the encoder's latents while training."""
    latent_learning_rate: float = 1e-2
    """Peak learning rate of the latents (auto-decoding)."""
    latent_regularisation: float = 1e-4
    """Weight of the latents' mean square in the loss (auto-decoding)."""
    refinement_steps: int = 60
    """Adam steps on the held-out latents alone, bases frozen (auto-decoding starts from zero and takes five times
    as many); 0 for none."""


def main(arguments: list[str]) -> None:
    """Runs `mnif fit`."""
    fit(parse_arguments(FitArguments, arguments, "mnif fit"))


def fit(arguments: FitArguments) -> None:
    """Trains stage one into ``arguments.output_dir``.

    Raises:
        UserError: the data cannot be read, the run folder holds something else, or training diverges.
    """
    started = time.perf_counter()
    data = load_images(arguments.data, arguments.resolution)
    held_out = data.held_out(arguments.held_out_fraction)
    _check(arguments, held_out)
    run = arguments.output_dir
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "fit", arguments, {"data_fingerprint": data.fingerprint()}):
        print(f"{run}: `mnif fit` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    values = torch.from_numpy(data.images).float() / 127.5 - 1
    train_values, held_values = values[~held_out], values[held_out]
    decoder = _decoder(arguments).to(accelerator.device)
    module = _training_module(arguments, decoder, len(train_values)).to(accelerator.device)
    accelerator.print(
        f"{arguments.data}: {len(train_values)} pictures to train, {len(held_values)} held out; "
        f"decoder {decoder.num_parameters():,} parameters"
    )
    probe_train, probe_held = train_values[:512], held_values[:512]

    def validate() -> dict[str, float]:
        figures = {"psnr_train": _mean_psnr(module, probe_train, torch.arange(len(probe_train)))}
        if isinstance(module, AmortisedFitting) and len(probe_held):
            figures["psnr_heldout"] = _mean_psnr(module, probe_held, None)
        return figures

    rows = Rows(values=train_values, row=torch.arange(len(train_values)))
    optimizers = _optimizers(arguments, module)
    train(accelerator, arguments, module, optimizers, rows, run, "fit", validate)
    if accelerator.is_main_process:
        _finish(arguments, data, held_out, values, module.cpu().eval(), time.perf_counter() - started)
    accelerator.wait_for_everyone()


def _check(arguments: FitArguments, held_out: np.ndarray) -> None:
    if not 0 <= arguments.held_out_fraction < 1:
        raise UserError(f"--held_out_fraction {arguments.held_out_fraction}: must be at least 0 and below 1")
    if not 0 <= arguments.overlap <= 0.5:
        raise UserError(f"--overlap {arguments.overlap}: must lie between 0 and 0.5")
    if held_out.all():
        raise UserError(f"--data {arguments.data}: no picture is left to train on; lower --held_out_fraction")
    if arguments.method == "encoder" and arguments.resolution % 4:
        raise UserError(f"--resolution {arguments.resolution}: the encoder needs a multiple of 4")
    if arguments.random_flip and arguments.method == "auto-decoding":
        raise UserError("--random_flip needs --method encoder: with auto-decoding a picture has one latent, not two")
    for flag in ("num_bases", "width", "latent_dim", "cells", "max_train_steps", "train_batch_size"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least 1")


def _decoder(arguments: FitArguments) -> MNIFModel:
    shape = (
        "resolution",
        "num_bases",
        "width",
        "depth",
        "latent_dim",
        "cells",
        "overlap",
        "omega",
        "mixing",
        "output_sine",
    )
    return MNIFModel(**{name: getattr(arguments, name) for name in shape})


def _training_module(arguments: FitArguments, decoder: MNIFModel, instances: int) -> AmortisedFitting | AutoDecoding:
    if arguments.method == "auto-decoding":
        return AutoDecoding(decoder, instances, arguments.latent_regularisation)
    encoder = PatchEncoder(
        resolution=arguments.resolution, patch_size=arguments.resolution // 4, latent_dim=arguments.latent_dim
    )
    return AmortisedFitting(decoder, encoder, arguments.latent_noise, arguments.random_flip)


def _optimizers(arguments: FitArguments, module: AmortisedFitting | AutoDecoding) -> list[torch.optim.Optimizer]:
    decoder = module.decoder
    fields = [*decoder.shared, *decoder.means, *decoder.bases]
    others: list[nn.Parameter] = [*decoder.coefficient_map.parameters()]
    if isinstance(module, AmortisedFitting):
        others += module.encoder.parameters()
    groups = [
        {"params": fields, "lr": arguments.basis_learning_rate},
        {"params": others, "lr": arguments.learning_rate},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ]
    if isinstance(module, AutoDecoding):
        optimizers.append(torch.optim.SparseAdam(module.latents.parameters(), lr=arguments.latent_learning_rate))
    return optimizers


def _mean_psnr(module: AmortisedFitting | AutoDecoding, values: Tensor, rows: Tensor | None) -> float:
    """Mean PSNR in dB of instances as the module sees them now: through its encoder, or from its table's rows."""
    device = module.decoder.device
    values = values.to(device)
    if isinstance(module, AmortisedFitting):
        latents = in_batches(module.encoder, values)
    else:
        assert rows is not None
        latents = module.latents.weight[rows.to(device)]
    return psnr(in_batches(module.decoder, latents), values).mean().item()


def _finish(
    arguments: FitArguments,
    data: ImageData,
    held_out: np.ndarray,
    values: Tensor,
    module: AmortisedFitting | AutoDecoding,
    seconds: float,
) -> None:
    """Writes model, latent table, figures and a picture of reconstructions."""
    run, decoder = arguments.output_dir, module.decoder
    started = time.perf_counter()
    held = torch.from_numpy(held_out)
    figures: dict[str, float] = {}
    latents = torch.zeros(len(values), arguments.latent_dim)
    encoder = None
    if isinstance(module, AmortisedFitting):
        encoder = module.encoder
        latents = in_batches(encoder, values)
    else:
        latents[~held] = module.latents.weight.detach()
    refined = latents[held]
    if held.any():
        refined = encoded_latents(decoder, encoder, values[held], arguments.refinement_steps, progress=True)
        if encoder is None:
            latents[held] = refined
        else:
            figures["psnr_heldout_encoder"] = _table_psnr(decoder, latents[held], values[held])
        figures["psnr_heldout"] = _table_psnr(decoder, refined, values[held])
    figures["psnr_train"] = _table_psnr(decoder, latents[~held], values[~held])

    save_component(run / "model", "decoder", decoder)
    if encoder is not None:
        save_component(run / "model", "encoder", encoder)
    # Through the file and back, so that the fingerprint is that of what later commands will load.
    decoder = load_component(MNIFModel, run / "model", "decoder")
    LatentTable(latents, data.ids, held, decoder.fingerprint(), data.name).save(run / "latents.safetensors")
    _save_reconstructions(run / "samples" / "reconstructions.png", decoder, values, latents, refined, held)
    field = decoder.bake(decoder.coefficients(latents[:1]))
    merge_json(
        run / "metrics.json",
        figures
        | {
            "seconds": round(seconds + time.perf_counter() - started, 1),
            "peak_rss_mb": peak_memory_megabytes(),
            "decoder_parameters": decoder.num_parameters(),
            "field_parameters": field.parameters_per_field(),
            "fields_per_instance": arguments.cells**2,
        },
    )
    finish_stage(run, "fit")
    shown = ", ".join(f"{name} {value:.2f} dB" for name, value in figures.items())
    print(f"{run / 'model'}: {shown}")


def _table_psnr(decoder: MNIFModel, latents: Tensor, values: Tensor) -> float:
    return psnr(in_batches(decoder, latents), values).mean().item()


def _save_reconstructions(
    path: Path, decoder: MNIFModel, values: Tensor, latents: Tensor, refined: Tensor, held: Tensor
) -> None:
    """Rows of held-out originals, from the encoder's or table's latents, and refined; else of training pictures."""
    shown, start = (values[held], latents[held]) if held.any() else (values, latents)
    refined = refined if held.any() else latents
    pick = torch.linspace(0, len(shown) - 1, min(16, len(shown))).long()
    rows = [shown[pick], in_batches(decoder, start[pick]), in_batches(decoder, refined[pick])]
    save_picture(path, picture_grid(to_pixels(torch.cat(rows)), columns=len(pick), scale=2))
