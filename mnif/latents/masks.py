"""Partial observations: what was seen of each instance, from mask files or a choice of views."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mnif.data.arrays import npy_array, npz_arrays
from mnif.signals.base import Observation, Signal
from mnif.utils.errors import UserError
from mnif.utils.pixels import open_image, to_mode

Observe = Callable[[Mapping[str, Tensor]], Observation]


def read_masks(path: Path, shape: Sequence[int], ids: Sequence[str]) -> np.ndarray:
    """Reads what was seen: [N, ...] or, if one mask serves all instances, [1, ...]; bool.

    Args:
        path: an image (white: seen), an ``.npy`` file, or an ``.npz`` file with ``masks`` and, if they are of single
            instances in another order, ``ids``.
        shape: of one instance's grid, without channels.
        ids: of the instances.

    Raises:
        UserError: the file is unreadable, of another shape, lacks an instance, or leaves one with nothing observed.
    """
    masks, masked_ids = _stored_masks(path)
    masks = masks[None] if masks.ndim == len(shape) else masks
    if masks.shape[1:] != tuple(shape):
        raise UserError(f"--mask {path}: masks are {list(masks.shape[1:])}; {list(shape)} is needed")
    if masked_ids is not None:
        if len(masked_ids) != len(masks):
            raise UserError(f"--mask {path}: {len(masks)} masks with {len(masked_ids)} ids")
        place = {id: row for row, id in enumerate(masked_ids)}
        missing = [id for id in ids if id not in place]
        if missing:
            raise UserError(f"--mask {path}: no mask for {missing[0]}")
        masks = masks[[place[id] for id in ids]]
    elif len(masks) not in (1, len(ids)):
        raise UserError(f"--mask {path}: {len(masks)} masks for {len(ids)} instances; give one, or as many, or ids")
    empty = np.flatnonzero(~masks.reshape(len(masks), -1).any(axis=1))
    if len(empty):
        whose = ids[empty[0]] if len(masks) == len(ids) else "any instance"
        raise UserError(f"--mask {path}: nothing is observed of {whose}")
    return masks


def masked(signal: Signal, masks: np.ndarray, device: torch.device | str = "cpu") -> Observe:
    """Observes the part of each row that its mask shows, on a device; ``batch["row"]`` are row numbers."""
    stored = torch.from_numpy(masks).to(device)

    def observe(batch: Mapping[str, Tensor]) -> Observation:
        observation = signal.observe(batch)
        index = batch["row"] if len(stored) > 1 else torch.zeros_like(batch["row"])
        return replace(observation, mask=stored[index].to(observation.values))

    return observe


def some_views(signal: Signal, views: Sequence[int], batch: Mapping[str, Tensor]) -> Observe:
    """Observes some views only.

    Args:
        signal: one that is observed in views.
        views: their numbers.
        batch: any rows of the data, to count the views that there are.

    Raises:
        UserError: the signal has no views, or not so many.
    """
    available = signal.num_views(batch)
    if not available:
        raise UserError(f"--views: a {signal.noun} has no views; use --mask")
    beyond = [view for view in views if not 0 <= view < available]
    if beyond:
        raise UserError(f"--views {beyond[0]}: each object has views 0 to {available - 1}")
    return lambda batch: signal.observe_views(batch, list(views))


def _stored_masks(path: Path) -> tuple[np.ndarray, list[str] | None]:
    """Reads the masks of a file, bool, and the ids that they are of, if it says so."""
    try:
        if path.suffix == ".npz":
            arrays = npz_arrays(path, "masks", ("masks", "ids"))
            return arrays["masks"].astype(bool), [str(id) for id in arrays["ids"]] if "ids" in arrays else None
        if path.suffix == ".npy":
            return npy_array(path).astype(bool), None
        with open_image(path) as image:
            return np.asarray(to_mode(image, 1)) > 127, None
    except (OSError, ValueError, KeyError, UserError) as error:
        raise UserError(f'--mask {path}: a picture, an .npy, or an .npz with "masks" is needed ({error})') from None
