"""`python3 device/sample.py`: new pictures from a bundle, on whatever is there, without torch."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np

from .cli import Parser, check_output_folder, number, run_command
from .files import write_atomically
from .pictures import to_uint8, write_png
from .runtime import Bundle, Camera, Sampler, load_bundle


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    parser = Parser("sample", "Draw pictures (voxels: volumes, radiance fields: views) from a bundle, without torch.")
    parser.add_bundle()
    parser.add_argument("--num", "--num_samples", type=number(1), default=16, dest="num_samples", help="how many (16)")
    parser.add_argument("--seed", type=number(0), default=0)
    parser.add_argument("--start", type=number(0), default=0, help="number of the first sample")
    parser.add_argument("--batch_size", type=number(1), default=16)
    parser.add_argument("--steps", type=number(1), help="evaluations of the denoiser (default: the most)")
    parser.add_runtime()
    parser.add_argument("--output_dir", type=Path, default=Path("samples"))
    return run_command(parser, arguments, _sample)


def _sample(options: Any) -> int:
    check_output_folder(options.output_dir)
    bundle = load_bundle(options.bundle, options.backend, options.threads)
    sampler = Sampler(bundle, options.precision, options.steps)
    begun = time.perf_counter()
    drawn = sampler(options.num_samples, options.seed, options.start, options.batch_size)
    shown = _shown(bundle, drawn, options.precision)
    seconds = time.perf_counter() - begun
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for index, each in enumerate(shown, start=options.start):
        if each.dtype == np.uint8:
            write_png(options.output_dir / f"{index:06d}.png", each)
        else:
            content = io.BytesIO()
            np.save(content, each)
            write_atomically(options.output_dir / f"{index:06d}.npy", content.getvalue(), flush=False)
    kind = "pictures" if shown[0].dtype == np.uint8 else "volumes"
    print(f"{options.output_dir}: {len(shown)} {kind} drawn, {len(shown) / seconds:.1f} a second")
    return 0


def _shown(bundle: Bundle, drawn: np.ndarray, precision: str | None) -> np.ndarray:
    """Makes pictures uint8, of radiance fields one view each; the values of voxels stay as they are."""
    if bundle.manifest["radiance"] is not None:
        camera = Camera(bundle, precision)
        return np.stack([to_uint8(camera(coefficients[None], azimuth=30.0)) for coefficients in drawn])
    return to_uint8(drawn) if bundle.manifest["grid"]["dimensions"] == 2 else drawn
