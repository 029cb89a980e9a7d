"""The flags of `mnif eval`."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from latent_prior.settings import INFERENCE_STEPS, HubFlags
from mnif.utils.devices import DeviceFlags
from mnif.utils.errors import UserError
from mnif.utils.pixels import MAX_IMAGE_PIXELS


@dataclass(kw_only=True)
class ProtocolFlags:
    """How pictures and shapes are compared."""

    preset: Literal["offline", "paper", "pytorch-fid", "clean", "tf1"] = "offline"
    """The protocol for pictures: extractor, resize filter, rounding, part of the reference, counts, neighbours."""
    extractor: Literal["lite0", "resnet", "inception"] | None = None
    """Feature extractor for pictures, in place of the preset's."""
    inception_weights: Path | None = None
    """The file of FID's Inception; default: MNIF_INCEPTION_WEIGHTS, the cache, or a download whose hash is checked."""
    neighbours: int | None = None
    """k of precision, recall, density and coverage, in place of the preset's."""
    num_samples: int | None = None
    """How many samples are drawn, or taken from the folder; default: the preset's (offline: 1000)."""
    save_statistics: Path | None = None
    """Also write the reference's mu and sigma to this .npz; it may stand for --reference later."""
    emd_points: int = 0
    """Compare shapes by earth mover's distances too, of so many points on each (256 takes minutes, 2048 hours)."""


@dataclass(kw_only=True)
class SamplingFlags:
    """How a model draws."""

    num_inference_steps: int = INFERENCE_STEPS
    """Denoising steps."""
    seed: int = 0
    """Of the noise."""


@dataclass(kw_only=True)
class DataFlags:
    """Which part of the reference, and how its latents are found."""

    held_out_fraction: float = 0.1
    """Share of the reference's designs kept out of training, where no latent table beside the model tells."""
    test_fraction: float = 0.05
    """Share of the designs kept for a test, likewise."""
    refinement_steps: int = 60
    """Adam steps on held-out latents; as given to `mnif fit`."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels that a picture file of samples or reference may have."""


@dataclass(kw_only=True)
class EvalArguments(ProtocolFlags, SamplingFlags, DataFlags, HubFlags, DeviceFlags):
    """Measure samples against a reference set, and reconstructions, each beside its controls."""

    compared: tyro.conf.Positional[list[Path]] = field(default_factory=list)
    """Several to compare: outputs of `mnif eval` or run folders; with --reference also models, samples and bundles."""
    reference: str = ""
    """The data set to compare with: a built-in name, a folder or a file."""
    output_dir: Path
    """Gets metrics.json and pictures."""
    model: Path | None = None
    """A model folder, RUN/model; or give --samples."""
    samples: str | None = None
    """A folder or file of samples; or give --model."""
    bundle: Path | None = None
    """An exported bundle, the output of `mnif export`; it draws its samples by ONNX Runtime."""


Part = Literal["half", "train", "all"]


@dataclass(frozen=True)
class Protocol:
    """How pictures are compared.

    Attributes:
        extractor: by name.
        resize: a filter of :data:`evals.features.resize.RESIZES`.
        grey: the value in 0..255 that Inception sees as 0.
        quantise: whether a model's pictures are rounded to uint8, as files hold them; if not, they are clamped only.
        part: of the reference: all of it, what was trained on, or one half of its designs, so that the other half
            measures the floor under the same conditions.
        num_samples: how many.
        neighbours: k of precision, recall, density and coverage.
    """

    extractor: str
    resize: str
    grey: float
    quantise: bool
    part: Part
    num_samples: int
    neighbours: int


PRESETS = {
    "offline": Protocol("lite0", "bicubic-antialias", 128, True, "half", 1000, 5),
    "paper": Protocol("inception", "bilinear", 127.5, False, "train", 50_000, 3),
    "pytorch-fid": Protocol("inception", "bilinear", 127.5, True, "all", 50_000, 5),
    "clean": Protocol("inception", "pillow-bicubic", 128, True, "all", 50_000, 5),
    "tf1": Protocol("inception", "tf1-bilinear", 128, True, "all", 50_000, 5),
}
"""``paper`` is You et al., NeurIPS 2023: pytorch-fid on unrounded pictures, against the training set, with k = 3."""


def protocol_of(arguments: EvalArguments) -> Protocol:
    """Returns the preset with what the flags change in it.

    Raises:
        UserError: a number is out of range.
    """
    protocol = PRESETS[arguments.preset]
    for flag, least in (("num_samples", 2), ("neighbours", 1)):
        value = getattr(arguments, flag)
        if value is not None and value < least:
            raise UserError(f"--{flag} {value}: at least {least} {'are' if least > 1 else 'is'} needed")
        if value is not None:
            protocol = replace(protocol, **{flag: value})
    return replace(protocol, extractor=arguments.extractor or protocol.extractor)
