"""What a finished `mnif fit` or `mnif grow` leaves: model, latents, metrics, and a picture of reconstructions."""

import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from mnif.data.batches import ArrayDataset, evenly_spaced
from mnif.data.dataset import Dataset, Split
from mnif.latents.calibration import TrainingInstances, fit_profile
from mnif.latents.inference import LatentInit, evaluate_latents, infer_latents
from mnif.latents.inner_loop import InnerLoop
from mnif.latents.pca import pca_metrics, pca_warnings
from mnif.latents.table import LatentTable
from mnif.models.io import load_component, save_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.training.checkpoints import newest_checkpoint
from mnif.training.methods import AutoDecoderMethod, EncoderMethod, LearningMethod
from mnif.utils.errors import UserError
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import peak_memory_megabytes


def save_results(
    run: Path,
    method: LearningMethod,
    method_name: str,
    data: Dataset,
    splits: np.ndarray,
    train_rows: ArrayDataset,
    held_rows: ArrayDataset,
    refinement_steps: int,
    stage: str = "fit",
    profile: bool = True,
) -> dict[str, float]:
    """Writes ``model/`` with a profile, ``latents.safetensors`` and ``samples/reconstructions.png`` into a run.

    Args:
        run: the run folder; an auto-decoder's latents are read from its last checkpoint.
        method: what was trained, where it computes.
        method_name: such as ``encoder``, for the names of metrics.
        data: all instances, with their ids.
        splits: for each of them a :class:`~mnif.data.dataset.Split`.
        train_rows: those trained on.
        held_rows: those held out; may be empty.
        refinement_steps: Adam steps that refine the held-out latents.
        stage: the command's name.
        profile: whether to make one, which takes up to a minute.

    Returns:
        Mean metrics of each split, of PCA with as many numbers, and what the model costs.
    """
    signal = method.signal
    latent_init = _save_model(run / "model", method)
    # Through the file and back, so that the fingerprint is that of what later commands will load.
    decoder = load_component(MNIFModel, run / "model", "decoder").to(method.decoder.device)
    if isinstance(method, AutoDecoderMethod):
        train_latents = method.rows.read_all(newest_checkpoint(run / "checkpoints" / stage))
    else:
        train_latents = torch.cat([*infer_latents(decoder, signal, train_rows, latent_init, 0)])
    first, refined = _held_out_latents(decoder, signal, held_rows, latent_init, refinement_steps)

    subjects = {}
    if len(held_rows):
        if latent_init is not None:
            subjects[f"heldout_{method_name}"] = held_rows, first
        subjects["heldout"] = held_rows, refined
    subjects["train"] = train_rows, train_latents
    metrics: dict[str, float] = {}
    for subject, (rows, latents) in subjects.items():
        metrics |= _means(evaluate_latents(decoder, signal, rows, latents), subject)
    metrics |= pca_metrics(signal, train_rows, held_rows, decoder.config.latent_dim)

    _save_latent_table(run, data, splits, train_latents, first, decoder)
    if profile:
        held_out = data.rows(splits == Split.HELD_OUT)
        trained = TrainingInstances(train_rows, data.rows(splits == Split.TRAIN).groups)
        found = (latent_init, first, refined, refinement_steps)
        _save_profile(run / "model", decoder, signal, trained, held_rows, held_out, *found)
    shown = (held_rows, first, refined) if len(held_rows) else (train_rows, train_latents, train_latents)
    _save_reconstructions(run, decoder, signal, *shown)
    print(f"{run / 'model'}: " + ", ".join(f"{name} {value:.3f}" for name, value in metrics.items()))
    if any("_pca_" in name for name in metrics):
        for warning in pca_warnings(decoder.config.latent_dim, len(train_rows)):
            print(f"warning: {warning}")
    if isinstance(method, EncoderMethod) and method.latent_noise:
        metrics["bits_per_instance"] = method.bits_per_instance()
    return metrics | _costs(decoder)


def _save_model(folder: Path, method: LearningMethod) -> LatentInit:
    """Writes the decoder and whatever finds latents to the model folder; gives the latter, or None."""
    save_component(folder, "decoder", method.decoder)
    latent_init = getattr(method, "encoder", None) or getattr(method, "inner_loop", None)
    if isinstance(latent_init, ModelMixin):
        save_component(folder, "inner_loop" if isinstance(latent_init, InnerLoop) else "encoder", latent_init)
    return latent_init


def _held_out_latents(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latent_init: LatentInit, steps: int
) -> tuple[Tensor, Tensor]:
    """Latents [N, D] of held-out instances as they are found at first, and refined.

    Without anything that finds latents at first, both are refined.
    """
    if not len(rows):
        none = torch.empty(0, decoder.config.latent_dim)
        return none, none
    refined = torch.cat([*infer_latents(decoder, signal, rows, latent_init, steps, progress=True)])
    if latent_init is None:
        return refined, refined
    return torch.cat([*infer_latents(decoder, signal, rows, latent_init, 0)]), refined


def _save_profile(
    model: Path,
    decoder: MNIFModel,
    signal: Signal,
    trained: TrainingInstances,
    rows: ArrayDataset,
    data: Dataset,
    latent_init: LatentInit,
    first: Tensor,
    refined: Tensor,
    steps: int,
) -> None:
    """Writes how held-out instances score into the model folder, or says why there is no such profile."""
    try:
        if latent_init is None and not steps:
            raise UserError("nothing found the latents of held-out instances (--refinement_steps 0)")
        search, gaps = (steps, None) if latent_init is None else (0, (refined, steps) if steps else None)
        make = partial(fit_profile, refinement_steps=search, refined=gaps)
        make(decoder, signal, trained, rows, data.groups, first, data.name).save(model)
    except UserError as error:
        print(f"no profile of held-out instances: {error}")


def _save_latent_table(
    run: Path, data: Dataset, splits: np.ndarray, train: Tensor, held_out: Tensor, decoder: MNIFModel
) -> None:
    """Writes the latents of the instances learned from and of those held out, in the order of the data."""
    kept = splits != Split.TEST
    is_held_out = torch.from_numpy(splits[kept] == Split.HELD_OUT)
    latents = torch.empty(len(is_held_out), decoder.config.latent_dim)
    latents[~is_held_out], latents[is_held_out] = train.cpu(), held_out.cpu()
    ids = [id for id, keep in zip(data.ids, kept.tolist(), strict=True) if keep]
    LatentTable.of(decoder, latents, ids, is_held_out, data.name).save(run / "latents.safetensors")


def _costs(decoder: MNIFModel) -> dict[str, float]:
    """Counts what the model and one of its fields are made of, and the memory that it took to come here."""
    config = decoder.config
    field = decoder.bake(decoder.coefficients(torch.zeros(1, config.latent_dim, device=decoder.device)))
    return {
        "peak_rss_mb": peak_memory_megabytes(),
        "decoder_parameters": decoder.num_parameters(),
        "field_parameters": field.parameters_per_field(),
        "fields_per_instance": decoder.num_cells,
        "multiply_adds_per_value": field.multiply_adds_per_point(),
    }


def _means(metrics: dict[str, Tensor], part: str) -> dict[str, float]:
    """Means over instances, named figure_part; what does not exist for any instance is left out."""
    means = {f"{name}_{part}": values.double().mean().item() for name, values in metrics.items()}
    return {name: value for name, value in means.items() if math.isfinite(value)}


_SHOWN = 16  # instances in a picture of reconstructions


@torch.no_grad()
def reconstructions_sheet(method: LearningMethod, rows: ArrayDataset) -> Image.Image:
    """Draws originals above what a method makes of them as it is now, while it trains.

    Of an auto-decoder's rows those are shown that this process has.
    """
    shown = np.arange(len(rows))
    if isinstance(method, AutoDecoderMethod):
        shown = shown[method.rows.owns(torch.from_numpy(shown)).numpy()]
    pick = shown[evenly_spaced(len(shown), _SHOWN)]
    (batch,) = rows.subset(pick).batches(len(pick), method.decoder.device)
    latents = method.latents(method.signal.observe(batch), batch["row"])
    drawn = method.signal.reconstruction_images(method.decoder, latents, batch)
    return _sheet([method.signal.original_images(batch), drawn])


def _sheet(rows_of_images: list[np.ndarray]) -> Image.Image:
    """Lays rows of small images out as one, enlarged."""
    scale = max(1, 64 // rows_of_images[0].shape[1])
    return image_grid(np.concatenate(rows_of_images), columns=len(rows_of_images[0]), scale=scale)


@torch.no_grad()
def _save_reconstructions(
    run: Path, decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latents: Tensor, refined: Tensor
) -> None:
    """Rows of originals, of what the first latents show, and of what refined ones show."""
    pick = np.linspace(0, len(rows) - 1, min(_SHOWN, len(rows))).astype(int)
    (batch,) = rows.subset(pick).batches(len(pick), decoder.device)
    images = [
        signal.original_images(batch),
        signal.reconstruction_images(decoder, latents[pick].to(decoder.device), batch),
        signal.reconstruction_images(decoder, refined[pick].to(decoder.device), batch),
    ]
    save_image(run / "samples" / "reconstructions.png", _sheet(images))
