"""The patches that an instance is cut into to see where it is unusual, and the numbers that each is known by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Signal
from mnif.utils.devices import sent
from mnif.utils.errors import UserError

_MOST_PATCHES = 64
_LEAST_PIXELS = 4  # along an axis of a patch
_BATCH = 64


def patches_of(grid: Sequence[int]) -> list[int]:
    """How many patches an instance is cut into along each axis: at most 64 in all, of 4 pixels at least."""
    most = int(_MOST_PATCHES ** (1 / len(grid)) + 1e-9)
    return [max(1, min(most, pixels // _LEAST_PIXELS)) for pixels in grid]


def observed_grid(signal: Signal, rows: ArrayDataset) -> list[int]:
    """The pixels along each axis of what is observed of an instance: of its grid, or of one view.

    Raises:
        UserError: it is observed in some other way.
    """
    (first,) = rows.subset(np.arange(1)).batches(1)
    shape = list(signal.observe(first).values.shape[1:-1])
    if isinstance(signal, GridSignal):
        return shape
    if signal.num_views(first):
        return shape[1:]
    raise UserError(f"a {signal.noun} is seen neither on a grid nor in views: there is no profile of such")


def observed_values(signal: Signal, rows: ArrayDataset) -> Iterator[np.ndarray]:
    """Yields what is observed of rows, some at a time, [B, (views,) pixels…, C]."""
    for batch in rows.batches(_BATCH):
        yield signal.observe(batch).values.numpy()


@torch.no_grad()
def patch_residuals(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latents: Tensor, patches: Sequence[int]
) -> np.ndarray:
    """Measures how much latents [N, D] miss of each patch of N rows: mean squares, [N, P] float64, also over views."""
    found: list[Tensor] = []
    for batch, some in zip(rows.batches(_BATCH, decoder.device), latents.split(_BATCH), strict=True):
        observation = signal.observe(batch)
        predictions = signal.predict(decoder, decoder.coefficients(sent(some, decoder.device)), observation)
        found.append(statistics_of(observation.values, predictions, patches)["residual"])
    return torch.cat(found).cpu().double().numpy()


def statistics_of(values: Tensor, predictions: Tensor, patches: Sequence[int]) -> dict[str, Tensor]:
    """Computes the statistics of each patch, [B, P], of values and predictions [B, (views,) pixels…, C]."""
    residual = predictions - values
    axes = range(values.ndim - 1 - len(patches), values.ndim - 1)
    squares = {
        "residual": residual.square(),
        "residual_curvature": _second_differences(residual, axes).square(),
        "slope": torch.stack([_first_differences(values, axis).square() for axis in axes]).sum(dim=0),
        "curvature": _second_differences(values, axes).square(),
    }
    return {name: _mean_in_patches(square.mean(dim=-1), patches) for name, square in squares.items()}


def _first_differences(values: Tensor, axis: int) -> Tensor:
    """Differences of each pixel and the next along an axis, 0 at its end."""
    last = values.narrow(axis, values.shape[axis] - 1, 1)
    return values.diff(dim=axis, append=last)


def _second_differences(values: Tensor, axes: Sequence[int]) -> Tensor:
    """Sums second differences over axes; beyond its ends an axis goes on as its last pixel."""
    total = torch.zeros_like(values)
    for axis in axes:
        first, last = values.narrow(axis, 0, 1), values.narrow(axis, values.shape[axis] - 1, 1)
        total += torch.cat([first, values, last], dim=axis).diff(n=2, dim=axis)
    return total


def _mean_in_patches(squares: Tensor, patches: Sequence[int]) -> Tensor:
    """Means over the patches of the last axes, and over the axes before them, but for the first: [B, P]."""
    for axis, count in enumerate(patches, start=squares.ndim - len(patches)):
        pixels = squares.shape[axis]
        owner = torch.arange(pixels, device=squares.device) * count // pixels
        shares = F.one_hot(owner, count).to(squares)
        squares = torch.movedim(torch.movedim(squares, axis, -1) @ (shares / shares.sum(dim=0)), -1, axis)
    squares = squares.flatten(1, -len(patches) - 1).mean(dim=1) if squares.ndim > len(patches) + 1 else squares
    return squares.flatten(1)
