"""The flags of `mnif eval`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(kw_only=True)
class EvalArguments:
    """Measure samples against a reference set, and reconstructions, each beside its controls."""

    reference: str
    """The data set to compare with: a built-in name, a folder or a file."""
    output_dir: Path
    """Gets metrics.json and pictures."""
    model: Path | None = None
    """A model folder, RUN/model; or give --samples."""
    samples: str | None = None
    """A folder or file of samples; or give --model."""
    num_samples: int = 1000
    """How many samples are drawn, or taken from the folder."""
    num_inference_steps: int = 20
    """Denoising steps."""
    seed: int = 0
    """Of the noise."""
    held_out_fraction: float = 0.1
    """Share of the reference's designs kept out of training, where no latent table beside the model tells."""
    test_fraction: float = 0.05
    """Share of the designs kept for a test, likewise."""
    refinement_steps: int = 60
    """Adam steps on held-out latents; as given to `mnif fit`."""
