"""Which instances a bundle holds: new samples of the prior, or rows of a latent table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latent_prior.noise import initial_noise
from latent_prior.pipeline import MNIFPipeline
from mnif.errors import UserError
from mnif.latents import LatentTable
from mnif.modeling import MNIFModel

_BATCH = 256


@dataclass(frozen=True)
class Instances:
    """Latents, and what the manifest says of each that is baked.

    Attributes:
        latents: [n or more, D]; those after the first n are for references alone.
        labels: n times {"seed", "sample"}, or {"id"}.
    """

    latents: Tensor
    labels: list[dict[str, Any]]


@torch.no_grad()
def sampled(pipeline: MNIFPipeline, count: int, num_inference_steps: int, seed: int, least: int) -> Instances:
    """Samples 0 to ``count`` - 1 of ``seed``, the same that `mnif sample` draws, and latents of ``least`` samples."""
    total = max(count, least)
    parts: list[Tensor] = []
    for begin in range(0, total, _BATCH):
        noise = initial_noise(seed, range(begin, min(begin + _BATCH, total)), pipeline.decoder.config.latent_dim)
        parts += pipeline(
            latents=torch.from_numpy(noise),
            num_inference_steps=num_inference_steps,
            output_type="latent",
            return_dict=False,
        )
    return Instances(torch.cat(parts), [{"seed": seed, "sample": index} for index in range(count)])


def of_table(decoder: MNIFModel, path: Path, count: int, ids: Sequence[str] | None, least: int) -> Instances:
    """Rows of a latent table: those of ``ids``, or the first ``count``; and latents of ``least`` rows if there are.

    Raises:
        UserError: no such table or id, or the table belongs to another decoder.
    """
    table = LatentTable.load(path, decoder.fingerprint())
    if ids is None:
        rows = list(range(min(count, len(table.ids))))
    else:
        place = {id: row for row, id in enumerate(table.ids)}
        for id in ids:
            if id not in place:
                raise UserError(f"--ids {id}: not in {path}, which begins with {', '.join(table.ids[:3])}")
        rows = [place[id] for id in ids]
    further = [row for row in range(len(table.ids)) if row not in set(rows)][: max(least - len(rows), 0)]
    return Instances(table.latents[rows + further], [{"id": table.ids[row]} for row in rows])


def noise_alone(decoder: MNIFModel, count: int, seed: int) -> Tensor:
    """Latents [count, D] for the reference of a decoder that comes with neither prior nor latent table."""
    return torch.from_numpy(initial_noise(seed, range(count), decoder.config.latent_dim))
