"""Pictures per second of the decoder at batch 1 and 32: PyTorch eager, PyTorch compiled, ONNX Runtime.

    python benchmarks/decoding.py --model runs/demo/model --bundle runs/demo/bundle

Prints medians of alternating rounds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

from export.runtime import load_bundle
from mnif.model_folder import load_component
from mnif.modeling import MNIFModel

ROUNDS = 31


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
        times: dict[str, list[float]] = {name: [] for name in work}
        for round_number in range(ROUNDS + 3):
            for name, function in work.items():
                started = time.perf_counter()
                function()
                if round_number >= 3:
                    times[name].append(time.perf_counter() - started)
        for name, values in times.items():
            seconds = sorted(values)[len(values) // 2]
            print(f"  {name:16} {batch:5d} {seconds * 1e3:9.2f} {batch / seconds:9.0f}")


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
