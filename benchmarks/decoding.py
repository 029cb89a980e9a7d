"""Pictures per second of the decoder at batch 1 and 32: PyTorch eager, PyTorch compiled, ONNX Runtime.

    python benchmarks/decoding.py --model runs/demo/model --bundle runs/demo/bundle

Prints medians of alternating rounds.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from evals.timing import median_seconds
from export.device.runtime import load_bundle
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel


@dataclass
class Arguments:
    """Measure the decoder of a model folder."""

    model: Path
    """The model folder."""
    bundle: Path
    """Its exported bundle."""


@torch.no_grad()
def main(arguments: Arguments) -> None:
    decoder = load_component(MNIFModel, arguments.model, "decoder")
    bundle = load_bundle(arguments.bundle)
    grid = decoder.grid()
    compiled = torch.compile(decoder.decode_coefficients)
    print(f"{decoder.config.resolution}×{decoder.config.resolution} pixels, {torch.get_num_threads()} threads")
    print(f"  {'runtime':16} {'batch':>5} {'ms':>9} {'images/s':>9}")
    for batch in (1, 32):
        coefficients = decoder.coefficients(torch.randn(batch, decoder.config.latent_dim))
        work: dict[str, Callable[[], object]] = {
            "PyTorch eager": partial(decoder.decode_coefficients, coefficients, grid),
            "PyTorch compiled": partial(compiled, coefficients, grid),
            "ONNX Runtime": partial(bundle.run, "decoder", coefficients.numpy()),
        }
        for name, seconds in median_seconds(work).items():
            print(f"  {name:16} {batch:5d} {seconds * 1e3:9.2f} {batch / seconds:9.0f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
