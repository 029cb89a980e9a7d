"""What `mnif fit` and `mnif grow` learn with, made from the flags: decoder, method, and the loop around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING

from mnif.data.dataset import Dataset, Split
from mnif.training.fit_arguments import AUGMENTATIONS, DECODER_SETTINGS, FitArguments
from mnif.utils.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from PIL.Image import Image

    from mnif.data.batches import ArrayDataset
    from mnif.latents.inference import LatentInit
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.base import Augmentation, Signal
    from mnif.training.loop import TrainLoop
    from mnif.training.methods import LearningMethod
    from mnif.training.replay import Replay

SUSTAINED = 5e12  # floating-point operations a second: a quarter of an A100's float32 peak

_TOKENS = 4  # along each axis, unless --tokens says otherwise, or what of it divides the cells


def learn(
    arguments: FitArguments,
    accelerator: Accelerator,
    method: LearningMethod,
    data: Dataset,
    splits: np.ndarray,
    stage: str = "fit",
    replay: Replay | None = None,
    profile: bool = True,
) -> dict[str, float]:
    """Trains ``method`` on the training part of the data and saves what it learned; the main process gets figures.

    Args:
        arguments: how to learn, and where to.
        accelerator: of the run.
        method: on the accelerator's device.
        data: all instances.
        splits: for each of them a :class:`~mnif.data.dataset.Split`.
        stage: the command's name.
        replay: keeps what a decoder knew before.
        profile: whether the model gets one of how held-out instances score.
    """
    from mnif.data.batches import array_dataset
    from mnif.training.methods import AutoDecoderMethod, mean_psnr, validation_rows
    from mnif.training.results import reconstructions_sheet, save_results

    rows, held_rows = (array_dataset(data.rows(splits == part).arrays()) for part in (Split.TRAIN, Split.HELD_OUT))
    decoder, signal = method.decoder, method.signal
    accelerator.print(
        f"{data.name}: {len(rows)} {signal.noun}s to train, {len(held_rows)} held out, "
        f"{(splits == Split.TEST).sum()} kept for a test; decoder {decoder.num_parameters():,} parameters"
    )
    probes = {"psnr_train": validation_rows(rows, method, accelerator)}
    if not isinstance(method, AutoDecoderMethod) and len(held_rows):
        probes["psnr_heldout"] = validation_rows(held_rows, method, accelerator)

    def validate() -> dict[str, float]:
        return {name: mean_psnr(method, probe, accelerator) for name, probe in probes.items()}

    def show() -> Image:
        return reconstructions_sheet(method, held_rows if "psnr_heldout" in probes else rows)

    train_loop(arguments, accelerator, method, rows, validate, show, stage, replay).run()
    if not accelerator.is_main_process:
        return {}
    method.eval()
    parts = data, splits, rows, held_rows
    steps = arguments.refinement_steps
    return save_results(arguments.output_dir, method, arguments.method, *parts, steps, stage, profile)


def train_loop(
    arguments: FitArguments,
    accelerator: Accelerator,
    method: LearningMethod,
    rows: ArrayDataset,
    validate: Callable[[], dict[str, float]],
    show: Callable[[], Image] | None = None,
    stage: str = "fit",
    replay: Replay | None = None,
) -> TrainLoop:
    """The loop that trains ``method`` on ``rows``, with the optimizers that the flags ask for."""
    from mnif.training.loop import TrainLoop
    from mnif.training.methods import AutoDecoderMethod, make_optimizers
    from mnif.training.tied_sets import tie_sets

    optimizers = make_optimizers(
        method,
        arguments.learning_rate,
        arguments.basis_learning_rate,
        arguments.adam_beta2,
        use_muon=arguments.matrix_optimizer == "muon",
        earlier_rate=1.0 if replay is None else replay.earlier_rate,
    )
    latent_embedding = method.rows if isinstance(method, AutoDecoderMethod) else None
    run = arguments.output_dir
    loop = TrainLoop(
        accelerator,
        arguments,
        replay or method,
        optimizers,
        rows,
        run,
        stage,
        validate,
        None,
        None,
        latent_embedding,
        show,
    )
    if stage == "fit":
        tie_sets(method.decoder, lambda: loop.progress.step / arguments.max_train_steps)
    return loop


def bare_steps(arguments: FitArguments, signal: Signal, train_data: Dataset) -> Generator[int]:
    """Takes the optimizer steps of `mnif fit` alone, to be timed: nothing is validated, and no results are saved."""
    from mnif.data.batches import array_dataset
    from mnif.training.loop import make_accelerator

    accelerator = make_accelerator(arguments, arguments.output_dir)
    decoder = make_decoder(arguments, signal)
    method = make_method(arguments, decoder, signal, len(train_data), accelerator).to(accelerator.device)
    yield from train_loop(arguments, accelerator, method, array_dataset(train_data.arrays()), validate=dict).steps()


def cells_and_tokens(arguments: FitArguments, signal: Signal) -> tuple[int, int | None]:
    """Settles what the flags may leave open: cells and tokens along each axis, None where the latent is global.

    Raises:
        UserError: there are too few cells for bases that go by place, the latent cannot be laid out so, or the signal
            has no encoder for tokens.
    """
    from mnif.models.sparse_coefficients import check_sparsity
    from mnif.models.token_map import check_tokens

    cells = arguments.cells or signal.default_cells()
    active, rule = arguments.coefficient_sparsity, arguments.sparsity_rule
    tokens = (arguments.tokens or math.gcd(cells, _TOKENS)) if arguments.latent_layout == "tokens" else None
    try:
        check_sparsity(active, arguments.num_bases, arguments.mixing, rule, cells**signal.dimensions)
        if tokens is not None:
            check_tokens(tokens, cells, signal.dimensions, arguments.latent_dim, arguments.coefficient_form)
    except ValueError as error:
        raise UserError(f"--{error}") from None  # it begins with the name of the flag
    if tokens is not None and arguments.method == "encoder" and signal.token_encoder_class is None:
        reason = f"a {signal.noun} of this kind has no encoder for tokens"
        raise UserError(f"--latent_layout tokens: {reason}; take --method auto-decoding or meta")
    return cells, tokens


def make_decoder(arguments: FitArguments, signal: Signal) -> MNIFModel:
    """The bases, freshly drawn."""
    from mnif.models.mnif_model import MNIFModel

    cells, tokens = cells_and_tokens(arguments, signal)
    return MNIFModel(
        channels=signal.channels,
        dimensions=signal.dimensions,
        resolution=signal.grid_resolution,
        latent_dim=None if arguments.coefficient_form == "direct" else arguments.latent_dim,
        signal=signal.name,
        signal_settings=signal.settings(),
        **{name: getattr(arguments, name) for name in DECODER_SETTINGS} | {"cells": cells, "tokens": tokens},
    )


def make_method(
    arguments: FitArguments,
    decoder: MNIFModel,
    signal: Signal,
    instances: int,
    accelerator: Accelerator | None = None,
    latent_init: LatentInit = None,
) -> LearningMethod:
    """The way of learning that ``arguments.method`` names, for ``instances`` rows.

    Encoder or inner loop are ``latent_init``; unless given, they are freshly drawn.
    """
    from mnif.latents.embedding import LatentEmbedding
    from mnif.latents.inner_loop import InnerLoop
    from mnif.training.loader import batch_size_of
    from mnif.training.methods import AutoDecoderMethod, EncoderMethod, MetaMethod

    latent_dim, weight = decoder.config.latent_dim, arguments.gradient_weight
    if arguments.method == "encoder":
        tokens, width = decoder.config.tokens, arguments.encoder_width
        encoder = latent_init or (
            signal.encoder(latent_dim, width) if tokens is None else signal.token_encoder(latent_dim, tokens, width)
        )
        changes = augmentations(arguments, signal)
        return EncoderMethod(decoder, signal, encoder, arguments.latent_noise, changes, weight)
    if arguments.method == "meta":
        inner_loop = (
            latent_init
            if isinstance(latent_init, InnerLoop)
            else InnerLoop(latent_dim, arguments.inner_steps, arguments.inner_learning_rate)
        )
        return MetaMethod(decoder, signal, inner_loop, arguments.inner_order == "second", gradient_weight=weight)
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    latent_embedding = LatentEmbedding(
        instances,
        latent_dim,
        batch_size_of(arguments, instances, processes),
        arguments.latent_learning_rate,
        arguments.seed,
        process,
        processes,
        accelerator.device if accelerator else "cpu",
    )
    return AutoDecoderMethod(decoder, signal, latent_embedding, arguments.latent_regularisation, weight)


def check_loss(arguments: FitArguments, signal: Signal) -> None:
    """Makes sure that the signal has what the loss is to look at.

    Raises:
        UserError: it has no gradient.
    """
    from mnif.signals.base import GridSignal

    if arguments.gradient_weight and not isinstance(signal, GridSignal):
        given = f"--gradient_weight {arguments.gradient_weight}"
        raise UserError(f"{given}: needs values on a grid, and a {signal.noun} of this kind has none; leave it out")


def augmentations(arguments: FitArguments, signal: Signal) -> list[Augmentation]:
    """What the flags ask for.

    Raises:
        UserError: the signal cannot be changed so.
    """
    known, requested = signal.augmentations(), [flag for flag in AUGMENTATIONS if getattr(arguments, flag)]
    for flag in requested:
        if flag not in known:
            raise UserError(f"--{flag}: {signal.noun}s of this kind cannot be changed so; leave it out")
    return [known[flag] for flag in requested]


def dry_run_report(arguments: FitArguments, decoder: MNIFModel, signal: Signal, instances: int) -> list[str]:
    """Sizes, work and memory of a run, as lines to print.

    Work counts the fields' matrix products: a forward pass is one, its gradient two more; an inner step of second
    order nine, of first order three. Memory counts parameters, gradients, Adam's moments, and the activations that
    PyTorch keeps for a step on a GPU (the compiled operator for CPUs keeps none).
    """
    config = decoder.config
    field = decoder.bake(decoder.coefficients(decoder.bases[0].new_zeros(1, config.latent_dim)))
    points = signal.points_per_step(decoder)
    passes = _passes(arguments)
    operations = 2.0 * points * field.multiply_adds_per_point() * passes
    operations += 6.0 * sum(bases.numel() for bases in decoder.bases) * decoder.num_cells
    batch = min(arguments.train_batch_size, instances)
    accumulation = arguments.gradient_accumulation_steps
    total = operations * batch * accumulation * arguments.max_train_steps
    learned = decoder.num_parameters()
    rows = instances * config.latent_dim if arguments.method == "auto-decoding" else 0
    kept = points * sum(shape.outputs + shape.inputs for shape in decoder.shapes) * batch
    if arguments.method == "meta":
        kept *= 3 * arguments.inner_steps + 1 if arguments.inner_order == "second" else 1
    megabytes = (16 * learned + 12 * rows + 4 * kept) / 1e6
    return [
        f"{instances:,} {signal.noun}s to train, {arguments.max_train_steps:,} steps of {batch * accumulation}",
        f"decoder: {learned:,} parameters; {len(field.params)} field(s) of "
        f"{field.parameters_per_field():,} parameters",
        f"a step looks at {points:,} points of each {signal.noun}: {operations / 1e9:.3g} GFLOP each",
        f"about {total / SUSTAINED / 3600:.2g} GPU hours at {SUSTAINED / 1e12:g} TFLOP/s sustained (a quarter of an "
        "A100's float32 peak; an assumption, not a measurement)",
        f"about {megabytes:,.0f} MB for parameters, optimizer and activations"
        + (f", of which {12 * rows / 1e6:,.0f} MB latents, shared out over processes" if rows else ""),
    ]


def _passes(arguments: FitArguments) -> int:
    """Forward passes that the work of a step amounts to."""
    if arguments.method != "meta":
        return 3
    return 3 + arguments.inner_steps * (9 if arguments.inner_order == "second" else 3)
