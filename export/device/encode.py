"""`python3 device/encode.py`: observations to latents and coefficients, on whatever is there, without torch."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import BundleError, write_atomically, write_json
from .cli import Parser, check_output_folder, number, run_command
from .latent_file import write_latents
from .observations import Form, Observations, read_mask, read_observations
from .runtime import Bundle, Encoded, Encoder, load_bundle


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    parser = Parser("encode", "Find latents and coefficients of observations by a bundle's encoder, without torch.")
    parser.add_bundle()
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, metavar="PATH", help="pictures, .npy files, or folders of them"
    )
    parser.add_argument(
        "--mask", type=Path, help="what was seen: a picture (white is seen), or an .npy with one mask or one for each"
    )
    parser.add_argument("--batch_size", type=number(1), default=16)
    parser.add_runtime()
    parser.add_argument("--output_dir", type=Path, default=Path("latents"))
    return run_command(parser, arguments, _encode)


def _encode(options: Any) -> int:
    _check_output(options.output_dir)
    bundle = load_bundle(options.bundle, options.backend, options.threads)
    encoder = Encoder(bundle, options.precision)
    form = Form(bundle.manifest["signal"], encoder.shape[:-1], encoder.shape[-1])
    observed = read_observations(options.data, form)
    mask = None if options.mask is None else read_mask(options.mask, form, len(observed.ids))
    bundle.graph(encoder.name)  # loading is not timed
    begun = time.perf_counter()
    encoded = encoder(observed.values, mask, options.batch_size)
    seconds = time.perf_counter() - begun
    _write(options, bundle, observed, encoded)
    error = float(encoded.residual.mean(dtype=np.float64))
    print(
        f"{options.output_dir}: {len(observed.ids)} latents, mean squared error {error:.2g} on average, "
        f"{len(observed.ids) / seconds:.0f} a second"
    )
    return 0


_SCORES = "scores"

_WRITTEN = ("latents.safetensors", "coefficients.npy")


def _check_output(folder: Path) -> None:
    """Refuses a folder of another command, and one whose files this one would replace."""
    check_output_folder(folder, _SCORES)
    if not (folder / f"{_SCORES}.json").exists():
        for name in _WRITTEN:
            if (folder / name).exists():
                raise BundleError(f"{folder / name} is of something else; choose another --output_dir")


def _write(options: Any, bundle: Bundle, observed: Observations, encoded: Encoded) -> None:
    """Writes latents, coefficients and scores."""
    data = " ".join(map(str, options.data))
    fingerprint = bundle.manifest["decoder_fingerprint"]
    write_latents(options.output_dir / _WRITTEN[0], encoded.latents, observed.ids, fingerprint, data)
    content = io.BytesIO()
    np.save(content, encoded.coefficients)
    write_atomically(options.output_dir / _WRITTEN[1], content.getvalue())
    scores = {
        name: {"residual": float(whole), "cell_residuals": [float(each) for each in cells]}
        for name, whole, cells in zip(observed.ids, encoded.residual, encoded.cell_residuals)
    }
    write_json(options.output_dir / f"{_SCORES}.json", scores)
