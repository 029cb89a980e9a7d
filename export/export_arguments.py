"""The flags of `mnif export`, and what they ask for."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from export.contents.browser import BROWSER_KINDS
from export.contents.selection import Selection
from export.graphs.precision import Precision, Storage
from latent_prior.objective import INFERENCE_STEPS
from latent_prior.pipeline import MNIFPipeline
from mnif.errors import UserError
from mnif.modeling import MNIFModel


@dataclass(kw_only=True)
class ExportArguments:
    """Write ONNX graphs, weights and the device's own tools; every graph is measured against float64 first."""

    model: Path
    """The model folder, RUN/model. Without a prior there is no sampler, and rows of RUN/latents.safetensors are
    baked."""
    output_dir: Path
    """The bundle folder; the files of an older bundle there are replaced, all others stay."""
    num_baked: int = 4
    """How many instances are baked into graphs of their own."""
    latents: Path | None = None
    """A latent table whose rows are baked; default: samples of the prior."""
    ids: list[str] | None = None
    """Which rows of the latent table are baked; default: the first --num_baked."""
    num_inference_steps: list[int] = field(default_factory=lambda: [INFERENCE_STEPS])
    """Denoising steps, one sampler for each number; what is baked is sampled with the last."""
    resolution: list[int] | None = None
    """Pixels per axis of decoder and sampler: one number, or one for each axis; default: the training resolution."""
    precision: list[Precision] = field(default_factory=lambda: ["fp32", "mixed"])
    """Of all graphs but the samplers; mixed multiplies hidden layers in float16."""
    sampler_precision: list[Precision] = field(default_factory=lambda: ["mixed"])
    """Of the samplers, each of which holds the whole denoiser."""
    sampler_storage: Storage = "int8"
    """How samplers store their large matrices; they compute as --sampler_precision says."""
    pad_channels: bool = False
    """Values get four channels, the further ones zero: one kernel less in TensorRT."""
    browser: bool = False
    """Add the graphs of the page in examples/browser: noise → coefficients, and values of those at any coordinates."""
    triton: bool = False
    """Add a model repository for Triton Inference Server: triton/, with every decoder and sampler."""
    seed: int = 0
    """Of the baked samples and of the reference inputs."""
    compile_rtx: Literal["auto", "on", "off"] = "auto"
    """Compile every graph with TensorRT-RTX, which needs no GPU: a compile gate, not a Jetson build. auto: where it is
    installed. Of the baked graphs the first alone is compiled."""

    def forms(self, kind: str) -> tuple[Sequence[Precision], Storage | None]:
        """Precisions and storage of a kind of graphs, None for what is multiplied.

        A browser computes in float32, so its graphs have that alone.
        """
        if kind == "sampler":
            return self.sampler_precision, self.sampler_storage
        return (["fp32"] if kind in BROWSER_KINDS else self.precision), None


def selection_of(model: MNIFPipeline | MNIFModel, options: ExportArguments) -> Selection:
    """What the flags ask for.

    Raises:
        UserError: a flag is out of range.
    """
    decoder = model if isinstance(model, MNIFModel) else model.decoder
    counts = [("num_baked", 0, options.num_baked), ("seed", 0, options.seed)]
    counts += [("num_inference_steps", 1, number) for number in options.num_inference_steps]
    counts += [("resolution", 1, number) for number in options.resolution or []]
    for flag, least, value in counts:
        if value < least:
            raise UserError(f"--{flag} {value}: must be at least {least}")
    for flag in ("num_inference_steps", "precision", "sampler_precision", "resolution", "ids"):
        if getattr(options, flag) == []:
            raise UserError(f"--{flag}: give at least one")
    if options.ids is not None and options.latents is None:
        raise UserError("--ids: say --latents too, the table they stand in")
    resolution = options.resolution or decoder.config.resolution
    if not isinstance(resolution, int):
        if len(resolution) not in (1, decoder.config.dimensions):
            given = " ".join(map(str, resolution))
            raise UserError(f"--resolution {given}: one number, or {decoder.config.dimensions}")
        resolution = resolution[0] if len(resolution) == 1 else tuple(resolution)
    if options.browser and not (isinstance(model, MNIFPipeline) and decoder.config.signal == "image"):
        raise UserError("--browser: the page draws new pictures; this model has no prior, or is not of pictures")
    return Selection(
        decoder=decoder,
        pipeline=model if isinstance(model, MNIFPipeline) else None,
        resolution=resolution,
        steps=list(dict.fromkeys(options.num_inference_steps)),
        num_baked=options.num_baked,
        seed=options.seed,
        table=options.latents,
        ids=options.ids,
        pad_channels=options.pad_channels,
        browser=options.browser,
    )
