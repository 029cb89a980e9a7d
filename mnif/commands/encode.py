"""`mnif encode`: finds the latents of new data on frozen bases."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mnif.data.dataset import Dataset, Split
from mnif.utils.args import parse_arguments
from mnif.utils.devices import DeviceFlags, chosen_device
from mnif.utils.errors import UserError, check_at_least, printable
from mnif.utils.files import sha256_of_file, write_json
from mnif.utils.json_files import merge_json
from mnif.utils.output_folders import check_output_folder, output_folder_of
from mnif.utils.pixels import MAX_IMAGE_PIXELS, limit_image_pixels
from mnif.utils.process import command_line, peak_memory_megabytes, progress_bar
from mnif.utils.resumable import Chunks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mnif.data.batches import ArrayDataset
    from mnif.latents.masks import Observe
    from mnif.latents.profile import Profile
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.base import Signal

REFINEMENT_STEPS = {"fast": 0, "balanced": 60, "best": 300}


@dataclass(kw_only=True)
class SearchFlags:
    """How latents are found."""

    method: Literal["auto", "encoder", "meta", "auto-decoding"] = "auto"
    """Where the search starts: at the encoder's answer, at the inner loop's, or at zero; auto: what the model has."""
    preset: Literal["fast", "balanced", "best"] = "balanced"
    """0, 60 or 300 refinement steps."""
    refinement_steps: int | None = None
    """Adam steps on each latent, in place of the preset's; a search from zero takes five times as many."""
    refinement_learning_rate: float = 0.05
    """Of the first of these steps."""
    robust: bool = False
    """Refine by a loss that forgives rubbish, with latents kept likely by the model's profile (docs/monitoring.md)."""
    batch_size: int = 256
    """Instances at a time; changes speed and memory, not the result."""


@dataclass(kw_only=True)
class DataFlags:
    """Which instances."""

    split: Literal["all", "train", "held_out", "test"] = "all"
    """Which part of the data, cut as `mnif fit` does it."""
    held_out_fraction: float = 0.1
    """As in `mnif fit`."""
    test_fraction: float = 0.05
    """As in `mnif fit`."""
    mirror: bool = False
    """Take every instance mirrored, pictures left to right and shapes along x: more latents for `mnif prior`."""
    max_image_pixels: int = MAX_IMAGE_PIXELS
    """Pixels that a picture file may have."""


@dataclass(kw_only=True)
class ObservationFlags:
    """What was seen of them."""

    mask: Path | None = None
    """What was seen: a picture (white is seen), or an .npy or .npz with masks; the rest is filled in by the model."""
    views: list[int] | None = None
    """The views that were seen, by number (radiance)."""


@dataclass(kw_only=True)
class GateFlags:
    """Whether instances are of the kind that the model knows."""

    gate: bool = False
    """Judge every instance by the model's profile: in, doubtful or out, and why (docs/monitoring.md)."""
    false_alarm_rate: float | None = None
    """Share of instances like the held-out ones that may be called doubtful or out; default: the profile's."""


@dataclass(kw_only=True)
class EncodeArguments(SearchFlags, DataFlags, ObservationFlags, GateFlags, DeviceFlags):
    """Find the latents of new data on frozen bases; the same command again continues where it was stopped."""

    model: Path
    """The model folder, RUN/model, or avatars, which comes along."""
    data: str
    """A built-in set, a folder or a file of what the model was trained on."""
    output_dir: Path
    """Gets latents.safetensors and metrics.json."""


def main(arguments: list[str]) -> None:
    """Runs `mnif encode`."""
    encode(parse_arguments(EncodeArguments, arguments, "mnif encode"))


def encode(arguments: EncodeArguments) -> None:
    """Writes the latents of ``arguments.data`` to ``arguments.output_dir``.

    Raises:
        UserError: the model or the data cannot be read, a flag is out of range, or the folder is another command's.
    """
    import torch

    from mnif.data.batches import array_dataset
    from mnif.latents.inference import evaluate_latents, infer_latents, load_latent_init
    from mnif.latents.profile import load_profile
    from mnif.latents.robust import RobustLoss
    from mnif.latents.table import LatentTable
    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel
    from mnif.signals.registry import signal_of_model

    steps = arguments.refinement_steps
    steps = REFINEMENT_STEPS[arguments.preset] if steps is None else steps
    check_at_least(1, batch_size=arguments.batch_size, max_image_pixels=arguments.max_image_pixels)
    limit_image_pixels(arguments.max_image_pixels)
    check_at_least(0, refinement_steps=steps)
    if not 0 < arguments.refinement_learning_rate < math.inf:
        raise UserError(f"--refinement_learning_rate {arguments.refinement_learning_rate:g}: must be above 0")
    _check_gate(arguments, steps)
    check_output_folder(arguments.output_dir, "encode")
    device = chosen_device(arguments.device)
    decoder = load_component(MNIFModel, arguments.model, "decoder").to(device)
    signal = signal_of_model(decoder)
    latent_init = load_latent_init(arguments.model, decoder, signal, arguments.method)
    latent_init = None if latent_init is None else latent_init.to(device)
    profile = load_profile(arguments.model, decoder) if arguments.gate or arguments.robust else None
    if profile is not None and arguments.gate:
        profile.rate(arguments.false_alarm_rate)
    loss = RobustLoss.of(profile, device) if profile is not None and arguments.robust else None
    data = _selected_data(arguments, signal)
    rows = array_dataset(_arrays(arguments, signal, data))
    observe = _observation(arguments, signal, data, rows, device)

    def infer(batch: ArrayDataset) -> Tensor:
        rate = arguments.refinement_learning_rate
        found = infer_latents(decoder, signal, batch, latent_init, steps, rate, len(batch), observe, loss=loss)
        return torch.cat([*found])

    with output_folder_of(arguments.output_dir, "encode"):
        started = time.perf_counter()
        chunks = Chunks(arguments.output_dir / ".parts", "latents", _search(arguments, steps, data))
        latents = _infer_in_chunks(infer, rows, arguments.batch_size, chunks, signal.noun)
        seconds = time.perf_counter() - started
        metrics = evaluate_latents(decoder, signal, rows, latents)
        held_out = torch.zeros(len(latents), dtype=torch.bool)
        table = LatentTable.of(decoder, latents, data.ids, held_out, data.name)
        table.save(arguments.output_dir / "latents.safetensors")
        _report(arguments.output_dir, data.ids, metrics, seconds)
        if arguments.gate and profile is not None:
            _judge(arguments, profile, decoder, signal, rows, data.ids, latents, steps)
        chunks.remove()


def _check_gate(arguments: EncodeArguments, steps: int) -> None:
    """Refuses what the model's profile says nothing of."""
    if arguments.robust and not steps:
        raise UserError("--robust: refines latents; give --preset balanced or --refinement_steps")
    if arguments.false_alarm_rate is not None and not arguments.gate:
        raise UserError(f"--false_alarm_rate {arguments.false_alarm_rate:g}: needs --gate")
    for flag in ("mask", "views", "mirror"):
        if arguments.gate and getattr(arguments, flag) not in (None, False):
            raise UserError(f"--gate: the profile is of whole instances as the data have them; leave out --{flag}")


def _judge(
    arguments: EncodeArguments,
    profile: Profile,
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    ids: list[str],
    latents: Tensor,
    steps: int,
) -> None:
    """Adds verdicts on the instances to metrics.json, and prints how many are in, doubtful and out."""
    from mnif.latents.gate import add_gaps, judge, summary
    from mnif.latents.inference import load_latent_init
    from mnif.latents.profile import score_rows

    latent_init = load_latent_init(arguments.model, decoder, signal)
    latent_init = None if latent_init is None else latent_init.to(decoder.device)
    first, scored = score_rows(profile, decoder, signal, rows, latent_init)
    judged = judge(profile, scored, ids, profile.rate(arguments.false_alarm_rate))
    as_known = arguments.method == "auto" and not arguments.robust and steps == profile.record.gap_steps
    if as_known and steps and arguments.refinement_learning_rate == SearchFlags.refinement_learning_rate:
        add_gaps(judged, profile, first, latents)
    merge_json(arguments.output_dir / "metrics.json", {"gate": judged})
    print(summary(judged))


def _selected_data(arguments: EncodeArguments, signal: Signal) -> Dataset:
    """Loads the data, or the part of them that ``--split`` names."""
    data = signal.load_like(arguments.data)
    if arguments.split == "all":
        return data
    splits = data.split(arguments.held_out_fraction, arguments.test_fraction)
    data = data.rows(splits == Split[arguments.split.upper()])
    if not len(data):
        raise UserError(f"--split {arguments.split}: no {signal.noun} of {arguments.data} is in it")
    return data


def _arrays(arguments: EncodeArguments, signal: Signal, data: Dataset) -> dict[str, np.ndarray]:
    """Gives the arrays of the data, mirrored where ``--mirror`` says so."""
    if not arguments.mirror:
        return data.arrays()
    if signal.mirror_axis is None:
        raise UserError(f"--mirror: a {signal.noun} cannot be mirrored; leave it out")
    return {name: np.flip(array, signal.mirror_axis) for name, array in data.arrays().items()}


def _search(arguments: EncodeArguments, steps: int, data: Dataset) -> dict[str, Any]:
    """Names all that the latents depend on: those of another search are not taken up."""
    from mnif.utils.model_folders import sha256_of_model

    search = {"steps": steps, "model": sha256_of_model(arguments.model), "data": data.fingerprint()}
    given = asdict(arguments).items()
    search |= {name: str(value) for name, value in given if name not in ("output_dir", "device")}
    return search | ({"mask": sha256_of_file(arguments.mask)} if arguments.mask is not None else {})


def _infer_in_chunks(
    infer: Callable[[ArrayDataset], Tensor], rows: ArrayDataset, batch_size: int, chunks: Chunks, noun: str
) -> Tensor:
    """Infers the latents of all rows, [N, D], but for batches that ``chunks`` has from a stopped command."""
    import torch

    with progress_bar(total=len(rows), desc="finding latents", unit=noun) as bar:
        for begin in range(0, len(rows), batch_size):
            batch = rows.subset(np.arange(begin, min(begin + batch_size, len(rows))))
            if begin not in chunks:
                chunks.save(begin, infer(batch).cpu().numpy())
            bar.update(len(batch))
    return torch.from_numpy(chunks.all(range(0, len(rows), batch_size)))


def _report(output: Path, ids: list[str], metrics: dict[str, Tensor], seconds: float) -> None:
    """Writes metrics.json, prints means, and warns of instances that fit badly."""
    badly = _instances_that_fit_badly(metrics["psnr"], ids)
    write_json(
        output / "metrics.json",
        {name: values.double().mean().item() for name, values in metrics.items()}
        | {
            f"{name}_per_instance": dict(zip(ids, (round(v, 3) for v in values.tolist()), strict=True))
            for name, values in metrics.items()
        }
        | {
            "fitting_badly": badly,
            "images_per_second": len(ids) / seconds,
            "seconds": round(seconds, 2),
            "command": command_line(),
            "peak_rss_mb": peak_memory_megabytes(),
        },
    )
    means = ", ".join(f"{name} {values.double().mean():.3f}" for name, values in metrics.items())
    print(f"{output}: {len(ids)} latents, {means} on average")
    if badly:
        worst = ", ".join(f"{printable(id)} ({value:.1f} dB)" for id, value in list(badly.items())[:5])
        print(f"warning: {len(badly)} of them fit much worse than the rest: {worst}")


def _observation(
    arguments: EncodeArguments, signal: Signal, data: Dataset, rows: ArrayDataset, device: torch.device
) -> Observe | None:
    """Says how a batch is observed: whole (None), through masks, or in some views."""
    from mnif.latents.masks import masked, read_masks, some_views

    if arguments.mask is not None and arguments.views is not None:
        raise UserError("give either --mask or --views")
    (first,) = rows.subset(np.arange(1)).batches(1)
    if arguments.mask is not None:
        shape = signal.observe(first).values.shape[1:-1]
        return masked(signal, read_masks(arguments.mask, shape, data.ids), device)
    if arguments.views is not None:
        return some_views(signal, arguments.views, first)
    return None


def _instances_that_fit_badly(quality: Tensor, ids: list[str]) -> dict[str, float]:
    """Gives PSNR by id where it lies more than three robust standard deviations below the median, the worst first."""
    median = quality.median()
    spread = 1.4826 * (quality - median).abs().median()
    rows = [row for row in quality.argsort().tolist() if quality[row] < median - 3 * spread]
    return {ids[row]: round(quality[row].item(), 3) for row in rows}
