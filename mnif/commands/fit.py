"""`mnif fit`: learns the bases and one latent per instance (stage one)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mnif.data.dataset import Dataset, Split
from mnif.data.view_formats import CameraConvention
from mnif.training.arguments import TrainingArguments
from mnif.training.run_record import begin_stage, finish_stage
from mnif.utils.args import parse_given
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.flag_files import laid_over, preset_names, preset_values, read_preset
from mnif.utils.json_files import merge_json
from mnif.utils.output_folders import holds_folder
from mnif.utils.pixels import MAX_IMAGE_PIXELS, limit_image_pixels

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

PRESETS = Path(__file__).parents[1] / "presets"

AUGMENTATIONS = ("random_flip", "random_colours")
"""Flags that change instances at random (:meth:`mnif.signals.base.Signal.augmentations`)."""

SUSTAINED = 5e12  # floating-point operations a second: a quarter of an A100's float32 peak

_TOKENS = 4  # along each axis, unless --tokens says otherwise, or what of it divides the cells

_NOT_OF_A_PRESET = {"data", "output_dir", "signal", "preset"}

_COUNTS = (
    "num_bases",
    "width",
    "latent_dim",
    "cells",
    "tokens",
    "coefficient_sparsity",
    "max_train_steps",
    "num_train_epochs",
    "train_batch_size",
    "stride",
    "inner_steps",
    "samples_per_ray",
    "rays_per_step",
    "encoder_width",
    "resolution",
    "max_image_pixels",
)  # flags that are at least 1


@dataclass(kw_only=True)
class DataFlags:
    """What is learned from."""

    resolution: list[int] | None = None
    """Pixels per axis: one number, or height and width. Pictures: 32 unless given; others: as the data are."""
    channels: Literal[1, 3, 4] = 3
    """Of pictures: grey, RGB, or RGBA."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels that a picture file may have; larger ones stop the run."""
    stride: int = 1
    """Grids: a step looks at every stride-th pixel along each axis, with a random offset."""
    held_out_fraction: float = 0.1
    """Share of the designs kept out of training, to choose settings on."""
    test_fraction: float = 0.05
    """Share of the designs that `mnif fit` never looks at, for final figures (`mnif encode --split test`)."""


@dataclass(kw_only=True)
class ModelFlags:
    """The shape of the bases and of the fields they make."""

    num_bases: int = 96
    """Basis networks per layer."""
    width: int = 24
    """Hidden units of a field."""
    depth: int = 2
    """Hidden-to-hidden layers of a field."""
    latent_dim: int = 128
    """Numbers in a latent (direct coefficients have their own number)."""
    cells: int | None = None
    """Cells per axis, each with a field of its own; 1 is one global field, as in the paper. Unless given: 4, and of
    pictures over 32 pixels so many that a cell has 8 (at most 16)."""
    latent_layout: Literal["global", "tokens"] = "global"
    """One latent that all cells hear, or tokens on a grid, of which a cell hears its own and those around it."""
    tokens: int | None = None
    """Tokens per axis, which share the latent's numbers (--latent_layout tokens); they divide the cells. Unless given:
    4, or what of it divides the cells."""
    overlap: float = 0.1875
    """How far a cell's field reaches over its borders, as a fraction of its width (0 to 0.5)."""
    omega: float = 10.0
    """Frequency w0 of the sines."""
    output_sine: bool = False
    """A sine after the last layer too, as the paper's image fields have it."""


@dataclass(kw_only=True)
class MixingFlags:
    """How bases become fields."""

    mixing: Literal["delta", "average"] = "delta"
    """Mean network plus mixed differences, or the paper's plain weighted average."""
    coefficient_form: Literal["layer", "shared", "direct"] = "layer"
    """Coefficients for each layer, one vector for all layers, or the latent itself."""
    coefficient_sparsity: int | None = None
    """Bases that a layer of a cell takes at most, of --num_bases; unless given, all. Needs --mixing delta."""


@dataclass(kw_only=True)
class MethodFlags:
    """What the ways of finding latents differ in."""

    random_flip: bool = False
    """Mirror half of the instances while training (encoder)."""
    random_colours: bool = False
    """Reorder the channels of every RGB picture while training (encoder): less learned by heart."""
    latent_noise: float = 0.3
    """Standard deviation of the noise added to the encoder's latents while training."""
    encoder_width: int = 512
    """Hidden units of the encoder."""
    latent_learning_rate: float = 1e-2
    """Peak learning rate of the latents (auto-decoding)."""
    latent_regularisation: float = 1e-4
    """Weight of the latents' mean square in the loss (auto-decoding)."""
    inner_steps: int = 3
    """Gradient steps of the inner loop (meta)."""
    inner_learning_rate: float = 4000.0
    """Multiplies the inner loop's learned rates (meta)."""
    inner_order: Literal["first", "second"] = "second"
    """Whether training differentiates through the inner loop (meta)."""
    refinement_steps: int = 60
    """Adam steps on the held-out latents alone, bases frozen (auto-decoding starts from zero and takes five times
    as many); 0 for none."""


@dataclass(kw_only=True)
class RadianceFlags:
    """Of posed views."""

    samples_per_ray: int = 32
    """Depths per ray (radiance)."""
    rays_per_step: int = 512
    """Rays of each object in a step (radiance)."""
    held_out_views: int = 0
    """The last views of each object are not learned from, but measured on (radiance)."""
    max_views: int | None = None
    """Take the first views of each object only (radiance)."""
    bound: float | None = None
    """Half the edge of the cube that holds the object; default: what near and far leave (radiance)."""
    near: float | None = None
    """Distance from the cameras where the object may begin; default: of the data (radiance)."""
    far: float | None = None
    """Distance from the cameras where the object ends; default: of the data (radiance)."""
    background: Literal["white", "black"] = "white"
    """Behind the object, and behind transparent pixels (radiance)."""
    camera_convention: CameraConvention = "auto"
    """Of the poses in the files; auto: OpenCV's of SRN folders, OpenGL's of transforms.json (radiance)."""
    center_views: bool = False
    """Move the point that the cameras of an object look at to the origin (radiance)."""


@dataclass(kw_only=True)
class OptimizerFlags:
    """How bases and networks move."""

    basis_learning_rate: float = 1.2e-2
    """Peak learning rate of the bases."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """Of the latent → coefficients map and the encoder's narrow matrices; all else is AdamW's."""
    adam_beta2: float = 0.99
    """Of Adam, for bases and networks."""


@dataclass(kw_only=True)
class FitArguments(DataFlags, ModelFlags, MixingFlags, MethodFlags, RadianceFlags, OptimizerFlags, TrainingArguments):
    """Learn basis networks and latents from data; the same command again continues or reuses the run."""

    data: str
    """Built-in (avatars, emoji, twemoji, furniture, furniture-views), or a folder, file or hf:NAME (docs/data.md)."""
    output_dir: Path
    """The run folder: gets model/, latents.safetensors, metrics.jsonl, metrics.json and samples/."""
    signal: str = "auto"
    """What the data are: image, voxels or radiance; auto tells by the data."""
    method: Literal["encoder", "auto-decoding", "meta"] = "encoder"
    """How latents are found: by an encoder trained with the bases, as a learned row per instance, or by a few gradient
    steps that the bases are trained for (CAVIA)."""
    preset: str | None = None
    """Other defaults: a name such as celeba-hq-s, or the path of a JSON file. Flags given win over it."""
    dry_run: bool = False
    """Print sizes and an estimate of GPU hours and memory, and stop."""

    max_train_steps: int = 5000
    """Optimizer steps; given here, they win over the epochs of a preset."""
    learning_rate: float = 4e-3
    """Peak learning rate of all but bases and latents."""


DECODER_SETTINGS = tuple(
    field.name
    for group in (ModelFlags, MixingFlags)
    for field in fields(group)
    if field.name not in ("latent_dim", "latent_layout")
)
"""The flags that the decoder is made with as they are."""

T = TypeVar("T", bound=FitArguments)


def parse_fit_arguments(arguments: list[str]) -> FitArguments:
    """Reads the flags over the defaults of a preset.

    Raises:
        UserError: a flag, the preset, or what the data are cannot be understood.
    """
    return with_preset(FitArguments, parse_given(FitArguments, arguments, "mnif fit"))


def with_preset(kind: type[T], given: dict[str, Any]) -> T:
    """The flags given over the defaults of a preset: the one named, or the signal's own.

    Args:
        kind: the dataclass to make, :class:`FitArguments` or one that adds to it.
        given: the flags on the command line and their values; ``data`` and ``output_dir`` are among them.

    Raises:
        UserError: the preset or what the data are cannot be understood, or a flag is out of range.
    """
    preset = _preset_for(given)
    settings = preset_values(kind, preset["arguments"], given.get("preset"), "mnif fit", _NOT_OF_A_PRESET)
    arguments = kind(**laid_over(settings, given))
    if arguments.signal == "auto":
        arguments.signal = preset["signal"]
    _check(arguments)
    return arguments


def _preset_for(given: dict[str, Any]) -> dict[str, Any]:
    if given.get("preset") is not None:
        return _preset(given["preset"])
    signal = given.get("signal", "auto")
    if signal == "auto":
        from mnif.signals.registry import detect_signal

        signal = detect_signal(given["data"])
    return _preset(signal) if signal in preset_names(PRESETS) else {"signal": signal, "arguments": {}}


def _preset(name: str) -> dict[str, Any]:
    preset = read_preset(name, PRESETS)
    if not isinstance(preset.get("signal"), str):
        raise UserError(f'--preset {name}: an object with "signal", a name, and "arguments", an object, is needed')
    return preset


def _check(arguments: FitArguments) -> None:
    values = asdict(arguments)
    check_at_least(1, **{flag: values[flag] for flag in _COUNTS})
    not_negative = ("depth", "refinement_steps", "held_out_views", "latent_noise")
    check_at_least(0, **{flag: values[flag] for flag in not_negative})
    if not 0 <= arguments.overlap <= 0.5:
        raise UserError(f"--overlap {arguments.overlap}: must lie between 0 and 0.5")
    if not 0 <= arguments.held_out_fraction < 1:
        raise UserError(f"--held_out_fraction {arguments.held_out_fraction}: must be at least 0 and below 1")
    if arguments.tokens is not None and arguments.latent_layout != "tokens":
        raise UserError(f"--tokens {arguments.tokens}: needs --latent_layout tokens")
    if arguments.coefficient_sparsity is not None:
        given = f"--coefficient_sparsity {arguments.coefficient_sparsity}"
        if arguments.mixing != "delta":
            raise UserError(f"{given}: needs --mixing delta, whose layers are their means where coefficients are zero")
        if arguments.coefficient_sparsity >= arguments.num_bases:
            raise UserError(f"{given}: must be below --num_bases, {arguments.num_bases}; leave it out to take all")
    for flag in AUGMENTATIONS:
        if values[flag] and arguments.method != "encoder":
            raise UserError(f"--{flag} needs --method encoder: otherwise an instance has one latent, not several")


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


def main(arguments: list[str]) -> None:
    """Runs `mnif fit`."""
    fit(parse_fit_arguments(arguments))


@holds_folder("output_dir", "fit")
def fit(arguments: FitArguments) -> None:
    """Trains stage one into ``arguments.output_dir``.

    Raises:
        UserError: the data cannot be read, the folder is another command's or holds another run, or training diverges.
    """
    from accelerate.utils import set_seed

    from mnif.signals.registry import signal_class
    from mnif.training.loop import check_machine, fill_in_steps, make_accelerator

    started = time.perf_counter()
    check_machine(arguments)
    limit_image_pixels(arguments.max_image_pixels)
    kind = signal_class(arguments.signal)
    data = kind.load(arguments.data, asdict(arguments))
    signal = kind.from_data(data, asdict(arguments))
    splits = data.split(arguments.held_out_fraction, arguments.test_fraction)
    instances = int((splits == Split.TRAIN).sum())
    if not instances:
        raise UserError(f"--data {arguments.data}: no {signal.noun} is left to train on; lower --held_out_fraction")
    fill_in_steps(arguments, instances)
    _augmentations(arguments, signal)
    arguments.cells, arguments.tokens = cells_and_tokens(arguments, signal)
    if arguments.dry_run:
        print("\n".join(dry_run_report(arguments, make_decoder(arguments, signal), signal, instances)))
        return
    run = arguments.output_dir
    accelerator = make_accelerator(arguments, run)
    if begin_stage(run, "fit", arguments, {"data_fingerprint": data.fingerprint()}):
        print(f"{run}: `mnif fit` has finished here before with these arguments; nothing to do")
        return
    set_seed(arguments.seed)
    metrics = _train(arguments, accelerator, signal, data, splits)
    if accelerator.is_main_process:
        merge_json(run / "metrics.json", metrics | {"seconds": round(time.perf_counter() - started, 1)})
        finish_stage(run, "fit")


def _train(
    arguments: FitArguments, accelerator: Accelerator, signal: Signal, data: Dataset, splits: np.ndarray
) -> dict[str, float]:
    """Learns from the data and saves what was learned; the main process gets figures of it."""
    decoder = make_decoder(arguments, signal)
    method = make_method(arguments, decoder, signal, int((splits == Split.TRAIN).sum()), accelerator)
    return learn(arguments, accelerator, method.to(accelerator.device), data, splits)


def learn(
    arguments: FitArguments,
    accelerator: Accelerator,
    method: LearningMethod,
    data: Dataset,
    splits: np.ndarray,
    stage: str = "fit",
    replay: Replay | None = None,
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
    steps = arguments.refinement_steps
    return save_results(arguments.output_dir, method, arguments.method, data, splits, rows, held_rows, steps, stage)


def cells_and_tokens(arguments: FitArguments, signal: Signal) -> tuple[int, int | None]:
    """Settles what the flags may leave open: cells and tokens along each axis, None where the latent is global.

    Raises:
        UserError: the latent cannot be laid out so, or the signal has no encoder for tokens.
    """
    from mnif.models.token_map import check_tokens

    cells = arguments.cells or signal.default_cells()
    if arguments.latent_layout == "global":
        return cells, None
    tokens = arguments.tokens or math.gcd(cells, _TOKENS)
    try:
        check_tokens(tokens, cells, signal.dimensions, arguments.latent_dim, arguments.coefficient_form)
    except ValueError as error:
        raise UserError(f"--{error}") from None  # it begins with the name of the flag
    if arguments.method == "encoder" and signal.token_encoder_class is None:
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
    from mnif.training.loop import batch_size_of
    from mnif.training.methods import AutoDecoderMethod, EncoderMethod, MetaMethod

    latent_dim = decoder.config.latent_dim
    if arguments.method == "encoder":
        tokens, width = decoder.config.tokens, arguments.encoder_width
        encoder = latent_init or (
            signal.encoder(latent_dim, width) if tokens is None else signal.token_encoder(latent_dim, tokens, width)
        )
        return EncoderMethod(decoder, signal, encoder, arguments.latent_noise, _augmentations(arguments, signal))
    if arguments.method == "meta":
        inner_loop = (
            latent_init
            if isinstance(latent_init, InnerLoop)
            else InnerLoop(latent_dim, arguments.inner_steps, arguments.inner_learning_rate)
        )
        return MetaMethod(decoder, signal, inner_loop, arguments.inner_order == "second")
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
    return AutoDecoderMethod(decoder, signal, latent_embedding, arguments.latent_regularisation)


def _augmentations(arguments: FitArguments, signal: Signal) -> list[Augmentation]:
    """What the flags ask for.

    Raises:
        UserError: the signal cannot be changed so.
    """
    known, requested = signal.augmentations(), [flag for flag in AUGMENTATIONS if getattr(arguments, flag)]
    for flag in requested:
        if flag not in known:
            raise UserError(f"--{flag}: {signal.noun}s of this kind cannot be changed so; leave it out")
    return [known[flag] for flag in requested]


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
    return TrainLoop(
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


def bare_steps(arguments: FitArguments, signal: Signal, train_data: Dataset) -> Generator[int]:
    """Takes the optimizer steps of `mnif fit` alone, to be timed: nothing is validated, and no results are saved."""
    from mnif.data.batches import array_dataset
    from mnif.training.loop import make_accelerator

    accelerator = make_accelerator(arguments, arguments.output_dir)
    decoder = make_decoder(arguments, signal)
    method = make_method(arguments, decoder, signal, len(train_data), accelerator).to(accelerator.device)
    yield from train_loop(arguments, accelerator, method, array_dataset(train_data.arrays()), validate=dict).steps()
