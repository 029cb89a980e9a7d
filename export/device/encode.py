"""`python3 device/encode.py`: observations to latents and coefficients, on whatever is there, without torch."""

from __future__ import annotations

import io
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .bundle import BundleError
from .cli import Parser, check_output_folder, columns, number, printable, run_command
from .files import write_atomically, write_json
from .gate import Gate, Verdict, describe
from .latent_file import write_latents
from .observations import Form, Observations, read_mask, read_observations
from .runtime import Bundle, Encoded, Encoder, load_bundle
from .surprise import VERDICTS


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
    parser.add_argument(
        "--false_alarm_rate",
        type=float,
        metavar="SHARE",
        help="of what is like the held-out instances (the profile's)",
    )
    parser.add_argument("--batch_size", type=number(1), default=16)
    parser.add_runtime()
    parser.add_argument("--output_dir", type=Path, default=Path("latents"))
    return run_command(parser, arguments, _encode)


def _encode(options: Any) -> int:
    _check_output(options.output_dir)
    bundle = load_bundle(options.bundle, options.backend, options.threads)
    encoder = Encoder(bundle, options.precision)
    gate = _gate(options, bundle, encoder)
    form = Form(bundle.manifest["signal"], encoder.shape[:-1], encoder.shape[-1])
    observed = read_observations(options.data, form)
    mask = None if options.mask is None else read_mask(options.mask, form, len(observed.ids))
    bundle.graph(encoder.name)  # loading is not timed
    begun = time.perf_counter()
    encoded = encoder(observed.values, mask, options.batch_size)
    seconds = time.perf_counter() - begun
    verdicts = [] if gate is None else gate(observed.values, encoded)
    _write(options.output_dir, bundle, " ".join(map(str, options.data)), observed, encoded)
    write_json(options.output_dir / f"{_SCORES}.json", _scores(observed, encoded, gate, verdicts))
    error = float(encoded.residual.mean(dtype=np.float64))
    print(
        f"{options.output_dir}: {len(observed.ids)} latents, mean squared error {error:.2g} on average, "
        f"{len(observed.ids) / seconds:.0f} a second"
    )
    _tell(observed.ids, verdicts)
    return 0


def _gate(options: Any, bundle: Bundle, encoder: Encoder) -> Gate | None:
    """Opens the reference profile, or says why nothing is judged."""
    if bundle.manifest.get("profile") is None:
        if options.false_alarm_rate is not None:
            raise BundleError("--false_alarm_rate: this bundle has no reference profile to judge by")
        print("no reference profile is in this bundle: nothing is said of what to trust")
        return None
    gate = Gate(bundle.folder, encoder.latent_dim, encoder.shape, options.false_alarm_rate)
    if options.mask is not None:
        print("the reference profile is of whole instances: nothing is judged with --mask")
        return None
    return gate


def _counts(verdicts: list[Verdict]) -> dict[str, int]:
    counted = Counter(each.verdict for each in verdicts)
    return {name: counted[name] for name in VERDICTS}


def _tell(ids: list[str], verdicts: list[Verdict]) -> None:
    """Prints how many are trusted, and why others are not, the most doubtful first."""
    if not verdicts:
        return
    print(", ".join(f"{count} {name}" for name, count in _counts(verdicts).items()))
    doubted = sorted((each.p_value, name, each) for name, each in zip(ids, verdicts) if each.verdict != "in")
    rows = [(name, each.verdict, f"p {p_value:.3g}", describe(each)) for p_value, name, each in doubted[:_SHOWN]]
    print("".join(f"{printable(line)}\n" for line in columns(rows)) if rows else "", end="")
    if len(doubted) > _SHOWN:
        print(f"{len(doubted) - _SHOWN} more in {_SCORES}.json")


_SCORES = "scores"

_SHOWN = 20  # instances that are not trusted

_WRITTEN = ("latents.safetensors", "coefficients.npy", "fields.npy")


def _check_output(folder: Path) -> None:
    """Refuses a folder of another command, and one whose files this one would replace."""
    check_output_folder(folder, _SCORES)
    if not (folder / f"{_SCORES}.json").exists():
        for name in _WRITTEN:
            if (folder / name).exists():
                raise BundleError(f"{folder / name} is of something else; choose another --output_dir")


def _scores(observed: Observations, encoded: Encoded, gate: Gate | None, verdicts: list[Verdict]) -> dict[str, Any]:
    """Collects by instance what is not in arrays, and the verdicts as `mnif encode --gate` has them."""
    instances: dict[str, dict[str, Any]] = {
        name: {"residual": float(whole), "cell_residuals": [float(each) for each in cells]}
        for name, whole, cells in zip(observed.ids, encoded.residual, encoded.cell_residuals)
    }
    if gate is None:
        return {"instances": instances}
    for name, verdict in zip(observed.ids, verdicts):
        instances[name].update(verdict._asdict())
    return {"false_alarm_rate": gate.rate, "counts": _counts(verdicts), "instances": instances}


def _write(folder: Path, bundle: Bundle, data: str, observed: Observations, encoded: Encoded) -> None:
    """Writes latents, coefficients and fields."""
    fingerprint = bundle.manifest["decoder_fingerprint"]
    write_latents(folder / _WRITTEN[0], encoded.latents, observed.ids, fingerprint, data)
    for name, array in zip(_WRITTEN[1:], (encoded.coefficients, encoded.fields)):
        content = io.BytesIO()
        np.save(content, array)
        write_atomically(folder / name, content.getvalue())
