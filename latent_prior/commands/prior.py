"""`mnif prior`: learns the distribution of the latents of a run (stage two)."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np

from latent_prior.settings import PAPER_GROUPS, DenoiserName, HubFlags, LossType, Objective, Weighting, check_heads
from mnif.training.arguments import TrainingArguments
from mnif.training.run_record import STAGE_ONE, begin_stage, check_finished, finish_stage
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.files import folder_written_atomically, sha256_of_file, sha256_of_folder
from mnif.utils.flag_files import laid_over, preset_values, read_preset
from mnif.utils.json_files import merge_json, read_object
from mnif.utils.output_folders import holds_folder
from mnif.utils.pixels import image_grid, save_image
from mnif.utils.process import peak_memory_megabytes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from PIL.Image import Image
    from torch import Tensor

    from latent_prior.denoisers import Denoiser
    from latent_prior.diffusion import DenoisingLoss
    from latent_prior.pipeline import MNIFPipeline
    from mnif.latents.table import LatentTable
    from mnif.models.mnif_model import MNIFModel

PRESETS = Path(__file__).parents[1] / "presets"
_PRESETS_OF_DENOISERS = {"transformer": "transformer-edge"}  # where none is named
_NOT_OF_A_PRESET = {"run", "preset", "extra_latents", "push_to_hub", "hub_model_id"}


@dataclass(kw_only=True)
class DenoiserFlags:
    """The network."""

    denoiser: DenoiserName = "modulated"
    """Blocks scaled and shifted by the time, the paper's network, or a transformer over the tokens of a latent, which
    has the size of --preset transformer-edge unless a preset is given."""
    width: int = 512
    """Hidden units of the denoiser; of a transformer at each token."""
    depth: int = 4
    """Residual blocks of the denoiser."""
    dropout: float = 0.1
    """Dropout in the blocks (modulated, transformer)."""


@dataclass(kw_only=True)
class DiffusionFlags:
    """What the network learns to predict, and how it is sampled."""

    objective: Objective = "x0"
    """Predict the clean latent, the velocity of a diffusion, or the velocity of a straight flow."""
    weighting: Weighting = "snr-plus-one"
    """Of errors at different noise levels: as they are; as errors of the velocity, bounded; or min-SNR."""
    snr_limit: float = 5.0
    """Bounds the weight of nearly clean latents; not for plain weighting."""
    loss: LossType = "mse"
    """Mean square, or pseudo-Huber, in which outliers weigh less."""
    sampler: Literal["solver", "ancestral"] = "solver"
    """The scheduler that is stored: a deterministic one of few steps, or the paper's DDPM of 1000."""


@dataclass(kw_only=True)
class OptimizerFlags:
    """How the network moves."""

    weight_decay: float = 0.05
    """Of AdamW."""
    ema_decay: float = 0.999
    """Largest decay of the weights' moving average, which is what is validated, kept and sampled from."""
    keep: Literal["best", "last"] = "best"
    """The weights with the smallest loss on held-out latents, or those of the last step."""
    latent_noise: float = 0.0
    """Noise added to the latents while training, in their standard deviations: makes copies of them worth less."""


@dataclass(kw_only=True)
class PriorArguments(DenoiserFlags, DiffusionFlags, OptimizerFlags, TrainingArguments, HubFlags):
    """Learn the distribution of a run's latents; adds denoiser and scheduler to RUN/model."""

    run: Path
    """The run folder of `mnif fit`."""
    preset: str | None = None
    """Other defaults: paper (the paper's prior, exactly), edge (small enough for a board), transformer-edge or
    transformer-gpu (over tokens), or the path of a JSON file. Flags given win over it."""
    extra_latents: list[Path] | None = None
    """More latents to learn from: tables that `mnif encode` wrote, such as of mirrored instances (--mirror)."""
    augment: bool = False
    """Learn from instances mirrored and recoloured too, in all ways of the fit's --random_flip and --random_colours;
    told in which, the denoiser draws them as they are."""
    from_scratch: bool = False
    """Of a model that was grown: begin with a fresh denoiser, in place of the old model's, whose shape is kept."""

    train_batch_size: int = 256
    """Latents per step, over all processes together."""
    max_train_steps: int = 1000
    """Optimizer steps; given here, they win over the epochs of a preset."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    validation_steps: int = 100
    """Steps between validations."""


def parse_prior_arguments(arguments: list[str]) -> PriorArguments:
    """Reads the flags over the defaults of a preset, if one is named.

    Raises:
        UserError: a flag or the preset cannot be understood.
    """
    given, settings = parse_given(PriorArguments, arguments, "mnif prior"), {}
    of_denoiser = _PRESETS_OF_DENOISERS.get(given.get("denoiser", ""))
    if (named := given.get("preset", of_denoiser)) is not None:
        preset = read_preset(named, PRESETS)["arguments"]
        settings = preset_values(PriorArguments, preset, named, "mnif prior", _NOT_OF_A_PRESET)
    parsed = PriorArguments(**laid_over(settings, given))
    _check(parsed)
    return parsed


def _check(arguments: PriorArguments) -> None:
    check_at_least(
        1,
        width=arguments.width,
        depth=arguments.depth,
        max_train_steps=arguments.max_train_steps,
        num_train_epochs=arguments.num_train_epochs,
        train_batch_size=arguments.train_batch_size,
        validation_steps=arguments.validation_steps,
    )
    check_at_least(0, latent_noise=arguments.latent_noise, weight_decay=arguments.weight_decay)
    if not arguments.snr_limit > 0:
        raise UserError(f"--snr_limit {arguments.snr_limit}: must be above 0")
    if not 0 <= arguments.dropout < 1:
        raise UserError(f"--dropout {arguments.dropout}: must be at least 0 and below 1")
    if arguments.augment and arguments.extra_latents:
        raise UserError("--augment: of --extra_latents nobody knows how they were changed; give one of the two")
    if arguments.objective == "flow" and arguments.sampler == "ancestral":
        raise UserError("--sampler ancestral: a flow is sampled without noise; take --objective x0 or v")
    fits = arguments.width % PAPER_GROUPS == 0 and arguments.width > PAPER_GROUPS and arguments.depth % 2 == 0
    if arguments.denoiser == "paper" and not fits:
        raise UserError(
            f"--width {arguments.width} --depth {arguments.depth}: the paper's denoiser needs a width that is a "
            f"multiple of {PAPER_GROUPS} and above it, and an even depth"
        )
    if arguments.denoiser == "transformer":
        check_heads(arguments.width)


def main(arguments: list[str]) -> None:
    """Runs `mnif prior`."""
    fit_prior(parse_prior_arguments(arguments))


@holds_folder("run")
def fit_prior(arguments: PriorArguments) -> None:
    """Trains stage two on the latent table of ``arguments.run``.

    Raises:
        UserError: the run has no finished stage one, the latents belong to another decoder, or training diverges.
    """
    import torch
    from accelerate.utils import set_seed

    from latent_prior.augmentation import changed_in_all_generations, changed_latents
    from latent_prior.denoisers import settings_of_tokens
    from latent_prior.hub import push, repository_for
    from mnif.latents.table import LatentTable
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.training.inheritance import inherited_tables
    from mnif.training.loader import fill_in_steps
    from mnif.training.loop import check_machine, make_accelerator

    started = time.perf_counter()
    run = arguments.run
    if not run.is_dir():
        raise UserError(f"--run {run}: no such run folder; `mnif fit --output_dir {run}` makes it")
    check_machine(arguments)
    for stage in STAGE_ONE:
        check_finished(run, stage)
    decoder = load_component(MNIFModel, run / "model", "decoder")
    own = LatentTable.load_for(decoder, run / "latents.safetensors")
    table = _with_inherited(run, own, decoder)
    settings_of_tokens(arguments.denoiser, decoder)  # in time: nothing has been written yet
    latents = torch.cat([table.train, *_extra_latents(arguments, decoder)])
    augmented = changed_in_all_generations(run, decoder, own) if arguments.augment else []
    fill_in_steps(arguments, len(latents))
    repository = repository_for(arguments, run / "model")
    accelerator = make_accelerator(arguments, run)
    extra = {f"extra_latents_{i}": sha256_of_file(path) for i, path in enumerate(arguments.extra_latents or [])}
    extra |= {f"inherited_latents_{i}": sha256_of_file(path) for i, path in enumerate(inherited_tables(run))}
    if (old := _inherited_model(arguments, decoder)) is not None:
        extra["inherited_denoiser"] = sha256_of_folder(old / "denoiser")
    if begin_stage(run, "prior", arguments, {"decoder_fingerprint": table.fingerprint} | extra):
        print(f"{run}: `mnif prior` has finished here before with these arguments; nothing to do")
        push(run / "model", repository)
        return
    changed = {"changed": changed_latents(augmented, accelerator.device)} if augmented else {}
    rows = {"latents": latents} | changed
    set_seed(arguments.seed)
    if old is None:
        denoiser = make_denoiser(arguments, table, decoder)
    else:
        denoiser = _continued_denoiser(run, decoder, table, old)
    _train(arguments, accelerator, decoder, denoiser, table, rows)
    if accelerator.is_main_process:
        _finish(arguments, decoder, denoiser.eval(), time.perf_counter() - started)
        push(run / "model", repository)
    accelerator.wait_for_everyone()


def _train(
    arguments: PriorArguments,
    accelerator: Accelerator,
    decoder: MNIFModel,
    denoiser: Denoiser,
    table: LatentTable,
    rows: dict[str, Tensor],
) -> None:
    """Leaves in ``denoiser`` what was learned of ``latents`` [N, D], and perhaps of ``changed`` [N, ways, D]."""
    import torch
    from diffusers.training_utils import EMAModel

    from latent_prior.diffusion import DenoisingLoss
    from mnif.data.batches import array_dataset
    from mnif.training.loop import TrainLoop

    ways = rows["changed"].shape[1] if "changed" in rows else 0
    loss = DenoisingLoss(
        denoiser,
        arguments.objective,
        arguments.weighting,
        arguments.snr_limit,
        arguments.loss,
        arguments.latent_noise,
        ways,
    ).to(accelerator.device)
    accelerator.print(
        f"{len(rows['latents'])} latents to train{f', also changed in {ways} ways' if ways else ''}, "
        f"{int(table.held_out.sum())} held out; denoiser {denoiser.num_parameters():,} parameters"
    )
    validate = partial(_validation_losses, loss, table, accelerator.device)
    optimizer = torch.optim.AdamW(
        loss.parameters(), lr=arguments.learning_rate, weight_decay=arguments.weight_decay, fused=True
    )
    ema = EMAModel(loss.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    keep_best = "validation_loss" if arguments.keep == "best" else None
    data, run = array_dataset(rows), arguments.run

    def show() -> Image:
        return samples_sheet(decoder, denoiser, arguments)

    TrainLoop(accelerator, arguments, loss, [optimizer], data, run, "prior", validate, ema, keep_best, show=show).run()


def make_denoiser(arguments: PriorArguments, table: LatentTable, decoder: MNIFModel) -> Denoiser:
    """The denoiser, freshly drawn, with the statistics of the table's training latents."""
    from latent_prior.denoisers import DENOISERS, settings_of_tokens

    shape: dict[str, Any] = {"latent_dim": table.latents.shape[1], "width": arguments.width, "depth": arguments.depth}
    shape |= {"decoder_fingerprint": table.fingerprint} | settings_of_tokens(arguments.denoiser, decoder)
    if arguments.denoiser != "paper":
        shape["dropout"] = arguments.dropout
    denoiser = DENOISERS[arguments.denoiser](**shape)
    mean, std = table.mean_and_std()
    denoiser.latent_mean.copy_(mean)
    denoiser.latent_std.copy_(std)
    return denoiser


def _with_inherited(run: Path, table: LatentTable, decoder: MNIFModel) -> LatentTable:
    """Joins the latents of a run that was grown with those of the generations before, so that a prior learns all."""
    import torch

    from mnif.latents.table import LatentTable
    from mnif.training.inheritance import inherited_tables

    every = [table, *(LatentTable.load_for(decoder, path) for path in inherited_tables(run))]
    if len(every) == 1:
        return table
    latents, held_out = (torch.cat([getattr(one, name) for one in every]) for name in ("latents", "held_out"))
    return replace(table, latents=latents, held_out=held_out, ids=[id for one in every for id in one.ids])


def _inherited_model(arguments: PriorArguments, decoder: MNIFModel) -> Path | None:
    """The old model's folder, if the run was grown from one with a prior to go on with.

    Raises:
        UserError: its denoiser predicts something else than is to be learned now.
    """
    from latent_prior.diffusion import objective_of
    from latent_prior.schedulers import load_scheduler
    from mnif.models.lineage import fingerprints
    from mnif.training.inheritance import inherited_folder

    if arguments.from_scratch or not decoder.later:
        return None
    old = inherited_folder(arguments.run, fingerprints(decoder)[-2]) / "model"
    if not (old / "denoiser").is_dir():
        return None
    if (before := objective_of(load_scheduler(old / "scheduler"))) != arguments.objective:
        reason = f"the old model's denoiser was trained with {before}; take that, or --from_scratch"
        raise UserError(f"--objective {arguments.objective}: {reason}")
    return old


def _continued_denoiser(run: Path, decoder: MNIFModel, table: LatentTable, old: Path) -> Denoiser:
    """The old model's denoiser, for longer latents; of what has mean and spread now, its own numbers keep theirs."""
    from latent_prior.denoisers import continued, load_denoiser

    print(f"{run}: the denoiser of decoder {old.parent.name} goes on learning")
    return continued(load_denoiser(old), decoder, *table.mean_and_std())


def _validation_losses(loss: DenoisingLoss, table: LatentTable, device: torch.device) -> dict[str, float]:
    """The loss on held-out latents, if there are any, and on as many of those learned from."""
    from latent_prior.diffusion import validation_loss

    held_out = table.latents[table.held_out] if table.held_out.any() else table.train
    probes = {"validation_loss": held_out, "validation_loss_train": table.train[: len(held_out)]}
    return {name: validation_loss(loss, latents.to(device)) for name, latents in probes.items()}


def _extra_latents(arguments: PriorArguments, decoder: MNIFModel) -> list[Tensor]:
    """The training latents of the further tables.

    Raises:
        UserError: one is missing, or belongs to another decoder.
    """
    from mnif.latents.table import LatentTable

    return [LatentTable.load_for(decoder, path).train for path in arguments.extra_latents or []]


def _finish(arguments: PriorArguments, decoder: MNIFModel, denoiser: Denoiser, seconds: float) -> None:
    """Completes the model folder to a pipeline and shows some samples."""
    from latent_prior.diffusion import sampling_scheduler
    from latent_prior.model_card import write_model_card
    from latent_prior.pipeline import MNIFPipeline

    run = arguments.run
    scheduler = sampling_scheduler(arguments.objective, ancestral=arguments.sampler == "ancestral")
    add_prior(run / "model", MNIFPipeline(decoder, denoiser, scheduler))
    save_image(run / "samples" / "samples.png", samples_sheet(decoder, denoiser, arguments))
    metrics = {
        "seconds": round(seconds, 1),
        "peak_rss_mb": peak_memory_megabytes(),
        "denoiser_parameters": denoiser.num_parameters(),
    }
    recorded = read_object(run / "metrics.json", RunFigures)
    merge_json(run / "metrics.json", {"prior": recorded.get("prior", {}) | metrics})
    write_model_card(run)
    finish_stage(run, "prior")
    print(f"{run / 'model'}: denoiser and scheduler added; pictures at {run / 'samples' / 'samples.png'}")


def samples_sheet(decoder: MNIFModel, denoiser: Denoiser, arguments: PriorArguments) -> Image:
    """Draws 64 samples of a denoiser, where it is."""
    import torch

    from latent_prior.diffusion import sampling_scheduler
    from latent_prior.pipeline import MNIFPipeline
    from latent_prior.sampling import sample_latents
    from mnif.signals.outputs import postprocess

    pipeline = MNIFPipeline(decoder.to(denoiser.device), denoiser, sampling_scheduler(arguments.objective))
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = postprocess(decoder, sample_latents(pipeline, arguments.seed, range(64)), "pil")
    return image_grid([np.asarray(image) for image in images], 16, scale=2)


class RunFigures(msgspec.Struct):
    """What a run's ``metrics.json`` holds of this stage."""

    prior: dict[str, Any] = {}


def add_prior(folder: Path, pipeline: MNIFPipeline) -> None:
    """Adds denoiser, scheduler and ``model_index.json`` to a model folder that holds the decoder.

    A student of an earlier denoiser goes. The index is written last, so a folder with an index is complete.
    """
    from latent_prior.pipeline_folder import save_index
    from mnif.models.io import save_component

    (folder / "model_index.json").unlink(missing_ok=True)
    for name in ("student", "student_scheduler"):
        shutil.rmtree(folder / name, ignore_errors=True)
    save_component(folder, "denoiser", pipeline.denoiser)
    with folder_written_atomically(folder / "scheduler") as temporary:
        pipeline.scheduler.save_pretrained(temporary)
    save_index(folder, pipeline)
