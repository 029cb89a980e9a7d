"""The flags of `mnif eval`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from latent_prior.objective import INFERENCE_STEPS


@dataclass(kw_only=True)
class EvalArguments:
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
    preset: Literal["offline", "paper", "pytorch-fid", "clean", "tf1"] = "offline"
    """The protocol for pictures: extractor, resize filter, rounding, part of the reference, counts, neighbours."""
    extractor: Literal["lite0", "inception"] | None = None
    """Feature extractor for pictures, in place of the preset's."""
    inception_weights: Path | None = None
    """The file of FID's Inception; default: MNIF_INCEPTION_WEIGHTS, the cache, or a download whose hash is checked."""
    neighbours: int | None = None
    """k of precision, recall, density and coverage, in place of the preset's."""
    save_statistics: Path | None = None
    """Also write the reference's mu and sigma to this .npz; it may stand for --reference later."""
    num_samples: int | None = None
    """How many samples are drawn, or taken from the folder; default: the preset's (offline: 1000)."""
    num_inference_steps: int = INFERENCE_STEPS
    """Denoising steps."""
    seed: int = 0
    """Of the noise."""
    held_out_fraction: float = 0.1
    """Share of the reference's designs kept out of training, where no latent table beside the model tells."""
    test_fraction: float = 0.05
    """Share of the designs kept for a test, likewise."""
    refinement_steps: int = 60
    """Adam steps on held-out latents; as given to `mnif fit`."""
    emd_points: int = 0
    """Compare shapes by earth mover's distances too, of so many points on each (256 takes minutes, 2048 hours)."""
