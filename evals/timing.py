"""How long an instance takes: the same work in PyTorch and in ONNX Runtime, side by side."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from export.device.runtime import Sampler, load_bundle
from latent_prior.pipeline import MNIFPipeline
from latent_prior.sampling import initial_noise
from mnif.signals.base import GridSignal
from mnif.signals.registry import signal_of_model

ROUNDS = 5

K = TypeVar("K")


def measured_latencies(pipeline: MNIFPipeline, bundle: Path | None, steps: int) -> list[dict[str, str | float]]:
    """Measures median milliseconds of drawing 1 and 32 instances, from noise and from coefficients, per runtime.

    The runtimes take turns, round by round, so that a machine whose speed drifts drifts for all. Objects that are seen
    in views are drawn one at a time only, as each takes seconds.

    Args:
        pipeline: on the CPU.
        bundle: the exported bundle of the same model, or None to leave ONNX Runtime out.
        steps: denoising steps; those of the bundle's sampler.

    Returns:
        Rows with ``work``, ``runtime``, ``batch``, ``milliseconds`` and ``per_second``.
    """
    pipeline.set_progress_bar_config(disable=True)
    decoder = pipeline.decoder
    signal = signal_of_model(decoder)
    noun = signal.noun
    exported = load_bundle(bundle) if bundle is not None else None
    rows: list[dict[str, str | float]] = []
    for batch in (1, 32) if isinstance(signal, GridSignal) else (1,):
        noise = initial_noise(0, range(batch), decoder.config.latent_dim)
        noise_tensor = torch.from_numpy(noise)
        with torch.no_grad():
            coefficients = decoder.coefficients(noise_tensor)
            grid = decoder.grid()
        draw = partial(pipeline, latents=noise_tensor, num_inference_steps=steps, output_type="np")
        work: dict[tuple[str, str], Callable[[], object]] = {
            (f"noise to {noun}", "PyTorch"): draw,
            (f"coefficients to {noun}", "PyTorch"): partial(decoder.decode_coefficients, coefficients, grid),
        }
        if exported is not None:
            work[f"noise to {noun}", "ONNX Runtime"] = partial(exported.run, Sampler(exported).name, noise)
            work[f"coefficients to {noun}", "ONNX Runtime"] = partial(exported.run, "decoder", coefficients.numpy())
        for (name, runtime), seconds in median_seconds(work).items():
            rows.append(
                {
                    "work": name,
                    "runtime": runtime,
                    "batch": batch,
                    "milliseconds": seconds * 1e3,
                    "per_second": batch / seconds,
                }
            )
    return rows


def settled_seconds(function: Callable[[], object], least: float = 0.05) -> float:
    """Seconds of a call in a stream of calls, as what is measured is used.

    The median of the second half of ``least`` seconds of calls, of two at least: the first ones find other caches, and
    the threads of another runtime that still wait for work.
    """
    seconds: list[float] = []
    begun = time.perf_counter()
    while len(seconds) < 2 or time.perf_counter() < begun + least:
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[len(seconds) // 2 :]))


@torch.no_grad()
def median_seconds(work: Mapping[K, Callable[[], object]]) -> dict[K, float]:
    """Seconds of each work's calls, which take turns: the median of its rounds."""
    seconds: dict[K, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, function in work.items():
            seconds[name].append(settled_seconds(function, 0.1))
    return {name: float(np.median(times)) for name, times in seconds.items()}
