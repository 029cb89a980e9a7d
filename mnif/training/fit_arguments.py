"""The flags of `mnif fit`, what they are checked for, and the presets that give them other defaults."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from mnif.data.view_formats import CameraConvention
from mnif.training.arguments import TrainingArguments
from mnif.utils.errors import UserError, check_at_least
from mnif.utils.flag_files import laid_over, preset_names, preset_values, read_preset
from mnif.utils.pixels import MAX_IMAGE_PIXELS

PRESETS = Path(__file__).parents[1] / "presets"

AUGMENTATIONS = ("random_flip", "random_colours")
"""Flags that change instances at random (:meth:`mnif.signals.base.Signal.augmentations`)."""

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
    """Bases that a layer of a cell takes, of --num_bases; unless given, all. Needs --mixing delta."""
    sparsity_rule: Literal["place", "largest"] = "place"
    """Which these are: those of the cell's own region, which loses least, or those with the largest coefficients."""


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

    gradient_weight: float = 0.0
    """Weight in the loss of the squared error of differences between neighbouring pixels: sharper edges, as with 0.5
    (grids)."""
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


def defaults_of_signal(kind: type, signal: str) -> dict[str, Any]:
    """What a signal's own preset says of the flags that ``kind`` has too, beside the way of learning."""
    if signal not in preset_names(PRESETS):
        return {}
    shared = {field.name for field in fields(kind)} - _NOT_OF_A_PRESET - {"method"}
    arguments = {name: value for name, value in _preset(signal)["arguments"].items() if name in shared}
    return preset_values(kind, arguments, signal, "mnif fit", _NOT_OF_A_PRESET)


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
    not_negative = ("depth", "refinement_steps", "held_out_views", "latent_noise", "gradient_weight")
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
