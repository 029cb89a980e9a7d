"""How long a picture takes: the same work in PyTorch and in ONNX Runtime, side by side."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from export.runtime import Sampler, load_bundle
from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline

ROUNDS = 15


def measured_latencies(pipeline: MNIFPipeline, bundle: Path | None, steps: int) -> list[dict[str, str | float]]:
    """Median milliseconds of drawing 1 and 32 pictures, from noise and from coefficients, per runtime.

    The runtimes take turns, round by round, so that a machine whose speed drifts drifts for all.

    Args:
        pipeline: on the CPU.
        bundle: the exported bundle of the same model, or None to leave ONNX Runtime out.
        steps: denoising steps; those of the bundle's sampler.

    Returns:
        Rows with ``work``, ``runtime``, ``batch``, ``milliseconds`` and ``images_per_second``.
    """
    pipeline.set_progress_bar_config(disable=True)
    decoder = pipeline.decoder
    exported = load_bundle(bundle) if bundle is not None else None
    rows: list[dict[str, str | float]] = []
    for batch in (1, 32):
        noise = initial_noise(0, range(batch), decoder.config.latent_dim)
        noise_tensor = torch.from_numpy(noise)
        with torch.no_grad():
            coefficients = decoder.coefficients(noise_tensor)
            grid = decoder.grid()
        draw = partial(pipeline, latents=noise_tensor, num_inference_steps=steps, output_type="np")
        work: dict[tuple[str, str], Callable[[], object]] = {
            ("noise to picture", "PyTorch"): draw,
            ("coefficients to picture", "PyTorch"): partial(decoder.decode_coefficients, coefficients, grid),
        }
        if exported is not None:
            work["noise to picture", "ONNX Runtime"] = partial(exported.run, Sampler(exported).name, noise)
            work["coefficients to picture", "ONNX Runtime"] = partial(exported.run, "decoder", coefficients.numpy())
        for (name, runtime), seconds in _medians(work).items():
            rows.append(
                {
                    "work": name,
                    "runtime": runtime,
                    "batch": batch,
                    "milliseconds": seconds * 1e3,
                    "images_per_second": batch / seconds,
                }
            )
    return rows


@torch.no_grad()
def _medians(work: dict[tuple[str, str], Callable[[], object]]) -> dict[tuple[str, str], float]:
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in work}
    for round_number in range(ROUNDS + 2):
        for name, function in work.items():
            started = time.perf_counter()
            function()
            if round_number >= 2:  # the first two warm caches up
                seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(times)) for name, times in seconds.items()}
