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
        found.append(residuals_in_patches(observation.values, predictions, patches))
    return torch.cat(found).cpu().double().numpy()


def residuals_in_patches(values: Tensor, predictions: Tensor, patches: Sequence[int]) -> Tensor:
    """Computes the mean squared error of each patch, [B, P], of predictions of values [B, (views,) pixels…, C]."""
    return _mean_in_patches((predictions - values).square().mean(dim=-1), patches)


def _mean_in_patches(squares: Tensor, patches: Sequence[int]) -> Tensor:
    """Means over the patches of the last axes, and over the axes before them, but for the first: [B, P]."""
    for axis, count in enumerate(patches, start=squares.ndim - len(patches)):
        pixels = squares.shape[axis]
        owner = torch.arange(pixels, device=squares.device) * count // pixels
        shares = F.one_hot(owner, count).to(squares)
        squares = torch.movedim(torch.movedim(squares, axis, -1) @ (shares / shares.sum(dim=0)), -1, axis)
    squares = squares.flatten(1, -len(patches) - 1).mean(dim=1) if squares.ndim > len(patches) + 1 else squares
    return squares.flatten(1)
