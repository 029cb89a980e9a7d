"""The flags of `mnif fit`, their presets, and what they may not be."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from mnif.arguments import given_flag, parse_arguments, preset_defaults, preset_names, read_preset
from mnif.data import signal_of
from mnif.errors import UserError
from mnif.training import TrainingArguments

PRESETS = Path(__file__).parent / "presets"
AUGMENTATIONS = ("random_flip", "random_colours")
"""Flags that change instances at random (:meth:`mnif.signals.Signal.augmentations`)."""
_NOT_OF_A_PRESET = {"data", "output_dir", "signal", "preset"}


@dataclass(kw_only=True)
class FitArguments(TrainingArguments):
    """Learn basis networks and latents from data; the same command again continues or reuses the run."""

    data: str
    """A built-in set (twemoji, furniture, furniture-views), a folder, a file, or hf:NAME; see docs/data.md."""
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

    resolution: list[int] | None = None
    """Pixels per axis: one number, or height and width. Pictures: 32 unless given; others: as the data are."""
    channels: Literal[1, 3, 4] = 3
    """Of pictures: grey, RGB, or RGBA."""
    stride: int = 1
    """Grids: a step looks at every stride-th pixel along each axis, with a random offset."""
    held_out_fraction: float = 0.1
    """Share of the designs kept out of training, to choose settings on."""
    test_fraction: float = 0.05
    """Share of the designs that `mnif fit` never looks at, for final figures (`mnif encode --split test`)."""

    num_bases: int = 96
    """Basis networks per layer."""
    width: int = 24
    """Hidden units of a field."""
    depth: int = 2
    """Hidden-to-hidden layers of a field."""
    latent_dim: int = 128
    """Numbers in a latent (direct coefficients have their own number)."""
    cells: int = 4
    """Cells per axis, each with a field of its own; 1 is one global field, as in the paper."""
    overlap: float = 0.1875
    """How far a cell's field reaches over its borders, as a fraction of its width (0 to 0.5)."""
    omega: float = 10.0
    """Frequency w0 of the sines."""
    mixing: Literal["delta", "average"] = "delta"
    """Mean network plus mixed differences, or the paper's plain weighted average."""
    coefficient_form: Literal["layer", "shared", "direct"] = "layer"
    """Coefficients for each layer, one vector for all layers, or the latent itself."""
    output_sine: bool = False
    """A sine after the last layer too, as the paper's image fields have it."""

    max_train_steps: int = 5000
    """Optimizer steps; given here, they win over the epochs of a preset."""
    num_train_epochs: int | None = None
    """Passes over the data; takes the place of --max_train_steps."""
    learning_rate: float = 4e-3
    """Peak learning rate of all but bases and latents."""
    basis_learning_rate: float = 1.2e-2
    """Peak learning rate of the bases."""
    matrix_optimizer: Literal["muon", "adamw"] = "muon"
    """Of the latent → coefficients map and the encoder's narrow matrices; all else is AdamW's."""
    adam_beta2: float = 0.99
    """Of Adam, for bases and networks."""
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


def parse_fit_arguments(arguments: list[str], program: str = "mnif fit", kind: type = FitArguments) -> Any:
    """Reads the flags over the defaults of a preset: the one named, or the signal's own.

    Args:
        arguments: what follows the command.
        program: for messages.
        kind: the dataclass, :class:`FitArguments` or one that adds to it.

    Raises:
        UserError: a flag, the preset, or what the data are cannot be understood.
    """
    plain = {"data": tyro.MISSING, "output_dir": tyro.MISSING}
    if {"-h", "--help"} & set(arguments):
        return parse_arguments(kind, arguments, program, kind(**plain))
    named, data, signal = (given_flag(arguments, name) for name in ("preset", "data", "signal"))
    if named is not None:
        preset = _preset(named)
    elif signal not in (None, "auto"):
        preset = _preset(signal) if signal in preset_names(PRESETS) else {"signal": signal, "arguments": {}}
    elif data is not None:
        preset = _preset(signal_of(data))
    else:
        preset = {"signal": "auto", "arguments": {}}
    if given_flag(arguments, "max_train_steps") is not None:
        preset["arguments"].pop("num_train_epochs", None)
    defaults: Any = preset_defaults(kind, preset["arguments"], named, "mnif fit", plain, _NOT_OF_A_PRESET)
    parsed = parse_arguments(kind, arguments, program, dataclasses.replace(defaults, **plain, signal=preset["signal"]))
    parsed.signal = preset["signal"] if parsed.signal == "auto" else parsed.signal
    _check(parsed)
    return parsed


def _preset(name: str) -> dict[str, Any]:
    preset = read_preset(name, PRESETS)
    if not isinstance(preset.get("signal"), str):
        raise UserError(f'--preset {name}: an object with "signal", a name, and "arguments", an object, is needed')
    return preset


def _check(arguments: FitArguments) -> None:
    counts = "num_bases width latent_dim cells max_train_steps train_batch_size stride inner_steps samples_per_ray"
    for flag in (*counts.split(), "rays_per_step", "encoder_width"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least 1")
    for flag in ("depth", "refinement_steps", "held_out_views", "latent_noise"):
        if getattr(arguments, flag) < 0:
            raise UserError(f"--{flag} {getattr(arguments, flag)}: must be at least 0")
    if arguments.num_train_epochs is not None and arguments.num_train_epochs < 1:
        raise UserError(f"--num_train_epochs {arguments.num_train_epochs}: must be at least 1")
    if any(pixels < 1 for pixels in arguments.resolution or []):
        raise UserError(f"--resolution {' '.join(map(str, arguments.resolution or []))}: at least 1 pixel is needed")
    if not 0 <= arguments.overlap <= 0.5:
        raise UserError(f"--overlap {arguments.overlap}: must lie between 0 and 0.5")
    if not 0 <= arguments.held_out_fraction < 1:
        raise UserError(f"--held_out_fraction {arguments.held_out_fraction}: must be at least 0 and below 1")
    for flag in AUGMENTATIONS:
        if getattr(arguments, flag) and arguments.method != "encoder":
            raise UserError(f"--{flag} needs --method encoder: otherwise an instance has one latent, not several")
