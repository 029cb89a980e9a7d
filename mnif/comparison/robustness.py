"""How well a model finds instances that are spoilt (pixels missing, noise, a shift), and how long finding takes."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.latents.inference import LatentInit, evaluate_latents, infer_latents
from mnif.latents.masks import Observe
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Observation, Signal, psnr

CONDITIONS = {  # what latents are found in
    "whole": "the whole instance",
    "missing": "a random half of its values",
    "noise": "the instance with Gaussian noise of standard deviation 0.2 on values in [-1, 1]",
    "shift": "the instance moved around its last axis by an eighth of it (and compared with the same)",
    "few": "a random sixteenth of its values (of views: one alone)",
}

FURTHER = ("few",)
"""Conditions beyond those that every comparison measures."""

_SEEN = {"missing": 1 / 2, "few": 1 / 16}  # share of the values

_NOISE = 0.2
_SHIFT = 8  # one eighth of the axis
_BATCH = 32  # instances at a time, and the larger of the two batch sizes that are timed
_TIMINGS = 3  # batches whose median counts
_PATIENCE = 10.0  # seconds after which no further batch is timed


def conditions_of(signal: Signal) -> list[str]:
    """The conditions of every comparison that make sense for a signal: only a grid can be shifted."""
    impossible = () if isinstance(signal, GridSignal) else ("shift",)
    return [name for name in CONDITIONS if name not in (*FURTHER, *impossible)]


def spoilt(signal: Signal, condition: str, seed: int) -> Observe:
    """Observes a batch under one of :data:`CONDITIONS`.

    What is drawn at random is a function of the seed and of an instance's number in ``batch["row"]`` alone, so every
    model meets the same masks and noise whatever the batch size. Values that are missing are 0 besides being masked.
    """

    def observe(batch: Mapping[str, Tensor]) -> Observation:
        if condition == "few" and signal.num_views(batch):
            return signal.observe_views(batch, [0])
        observation = signal.observe(batch)
        values = observation.values
        if condition == "shift":
            return replace(observation, values=values.roll(max(values.shape[-2] // _SHIFT, 1), dims=-2))
        draws = [np.random.default_rng([seed, row]) for row in batch["row"].tolist()]
        if condition in _SEEN:
            seen = np.stack([_part_of(values.shape[1:-1], _SEEN[condition], draw) for draw in draws])
            mask = torch.from_numpy(seen).to(values)
            return replace(observation, values=values * mask[..., None], mask=mask)
        if condition == "noise":
            noise = np.stack([draw.standard_normal(values.shape[1:], dtype=np.float32) for draw in draws])
            return replace(observation, values=values + _NOISE * torch.from_numpy(noise).to(values))
        return observation

    return observe


def robustness(
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    latent_init: LatentInit,
    steps: int,
    seed: int,
    conditions: Sequence[str] | None = None,
) -> dict[str, float]:
    """Mean PSNR in dB against the clean original, ``psnr_heldout_<condition>``, of latents found in spoilt instances.

    Args:
        decoder: the bases.
        signal: what the rows are.
        rows: held-out instances, numbered from 0.
        latent_init: of the run; None searches from zero.
        steps: refinement steps of the run.
        seed: of masks and noise.
        conditions: some of :data:`CONDITIONS`; default: those of every comparison.
    """
    metrics = {}
    for name in conditions_of(signal) if conditions is None else conditions:
        observe = spoilt(signal, name, seed)
        found = infer_latents(
            decoder, signal, rows, latent_init, steps, batch_size=_BATCH, observe=observe, progress=True
        )
        latents = torch.cat([*found])
        if name == "shift":
            quality = _quality_of_shifted(decoder, signal, rows, latents, observe)
        else:
            quality = evaluate_latents(decoder, signal, rows, latents)["psnr"]
        metrics[f"psnr_heldout_{name}"] = quality.double().mean().item()
    return metrics


def seconds_per_instance(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latent_init: LatentInit, steps: int
) -> dict[str, float]:
    """Wall seconds for each new instance, found one at a time and 32 at a time: the median of three batches.

    Returns:
        ``seconds_per_instance_<finder|refined>_batch_<1|32>``; without a finder there is no figure for it alone.
    """
    kinds = {"refined": steps} if latent_init is None else {"finder": 0, "refined": steps}
    return {
        f"seconds_per_instance_{kind}_batch_{size}": _median_seconds(
            decoder, signal, rows, latent_init, kind_steps, size
        )
        for kind, kind_steps in kinds.items()
        for size in (1, _BATCH)
    }


def _median_seconds(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latent_init: LatentInit, steps: int, batch_size: int
) -> float:
    """Wall seconds for each instance of batches of different ones; the rows start anew where they are too few."""

    def elapsed(turn: int, steps: int) -> float:
        batch = rows.subset((np.arange(batch_size) + turn * batch_size) % len(rows))
        started = time.perf_counter()
        (latents,) = infer_latents(decoder, signal, batch, latent_init, steps, batch_size=batch_size)
        latents.cpu()  # waits for an accelerator
        return time.perf_counter() - started

    elapsed(0, min(steps, 1))  # the warm-up
    seconds: list[float] = []
    while len(seconds) < _TIMINGS and sum(seconds) < _PATIENCE:
        seconds.append(elapsed(len(seconds), steps))
    return median(seconds) / batch_size


@torch.no_grad()
def _quality_of_shifted(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latents: Tensor, observe: Observe
) -> Tensor:
    """PSNR against what was observed, which is whole and without noise: [N]."""
    quality = []
    for batch, some in zip(rows.batches(_BATCH, decoder.device), latents.split(_BATCH), strict=True):
        shifted = observe(batch)
        found = signal.predict(decoder, decoder.coefficients(some), shifted)
        quality.append(psnr(found, shifted.values))
    return torch.cat(quality).cpu()


def _part_of(shape: torch.Size, share: float, draw: np.random.Generator) -> np.ndarray:
    """True for a share of the places (rounded up), anywhere."""
    count = shape.numel()
    return (draw.permutation(count) >= count - math.ceil(count * share)).reshape(tuple(shape))
