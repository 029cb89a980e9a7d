"""The page of `mnif monitor`: the most surprising instances, drawn beside what the model makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.report.embedded import lossless_uri
from mnif.data.batches import ArrayDataset
from mnif.latents.profile import Profile, Scored
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Signal

_WORST = 12  # instances
_ENLARGED = 128  # pixels at least of a picture
_MARK = np.array([213, 0, 80], np.uint8)  # of a patch's border


@torch.no_grad()
def worst_instances(
    profile: Profile,
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    latents: Tensor,
    scored: Scored,
    ids: Sequence[str],
    judged: dict[str, Any],
) -> list[dict[str, Any]]:
    """Draws the most surprising instances, the worst first, their worst patches marked where patches are of a picture.

    Args:
        profile: the model's.
        decoder: the model.
        signal: the model's.
        rows: N instances.
        latents: theirs, [N, D].
        scored: the instances beside the profile.
        ids: theirs.
        judged: what :func:`mnif.latents.gate.judge` says of them.

    Returns:
        For each ``id``, its verdict (``one``), ``original`` and ``drawn`` as data URIs, and ``marked``.
    """
    order = np.lexsort((-scored.surprises.max(axis=1), scored.p_values))[:_WORST]
    (batch,) = rows.subset(order).batches(len(order), decoder.device)
    chosen = latents[torch.from_numpy(order)].to(decoder.device)
    pictures = signal.original_images(batch), signal.reconstruction_images(decoder, chosen, batch)
    are_pictures = isinstance(signal, GridSignal) and len(profile.record.patches) == 2
    entries = []
    for row, original, drawn in zip(order.tolist(), *pictures, strict=True):
        one = judged["instances"][ids[row]]
        marks = one["patches"] if are_pictures else []
        shown = [_marked(picture, profile, marks) for picture in (original, drawn)]
        uris = dict(zip(("original", "drawn"), map(lossless_uri, shown), strict=True))
        entries.append({"id": ids[row], "one": one, "marked": bool(marks), **uris})
    return entries


def _marked(picture: np.ndarray, profile: Profile, patches: Sequence[Sequence[int]]) -> np.ndarray:
    """Enlarges a picture [H, W, 3] by a whole number, and draws a border around some of its patches."""
    scale = math.ceil(_ENLARGED / max(picture.shape[:2]))
    large = picture.repeat(scale, axis=0).repeat(scale, axis=1)
    for patch in patches:
        (top, bottom), (left, right) = (
            (-(-place * pixels // count) * scale, -(-(place + 1) * pixels // count) * scale)
            for place, pixels, count in zip(patch, profile.record.grid, profile.record.patches, strict=True)
        )
        large[top:bottom, left : left + 2] = large[top:bottom, right - 2 : right] = _MARK
        large[top : top + 2, left:right] = large[bottom - 2 : bottom, left:right] = _MARK
    return large
