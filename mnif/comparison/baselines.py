"""What a model must beat: the mean training instance, and PCA with as many components as a latent has numbers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.signals.base import GridSignal, Signal, psnr


def baseline_metrics(
    signal: Signal, train: ArrayDataset, held_out: ArrayDataset, results: list[dict[str, Any]]
) -> dict[str, Any]:
    """Measures the controls; their figures are named as a model's.

    Args:
        signal: what the rows are; only grids have controls, since views of two objects need not be from one camera.
        train: the instances learned from.
        held_out: the others.
        results: of the runs, with the ``…_pca_…`` figures that `mnif fit` measured, if it did, and ``latent_dim``.

    Returns:
        ``pca``, a list with one object for each size of latent, and ``mean``, the mean training instance.
    """
    if not isinstance(signal, GridSignal):
        return {"pca": []}
    (first,) = train.subset(np.arange(1)).batches(1)
    most = min(len(train), signal.observe(first).values.numel())
    pca: dict[int, dict[str, Any]] = {}
    for result in results:
        metrics = {name.replace("_pca_", "_"): value for name, value in result.items() if "_pca_" in name}
        if metrics:
            components = min(result["latent_dim"], most)
            pca[components] = {"components": components, **metrics}
    return {"pca": [pca[components] for components in sorted(pca)], "mean": _mean_metrics(signal, train, held_out)}


def _mean_metrics(signal: GridSignal, train: ArrayDataset, held_out: ArrayDataset) -> dict[str, float]:
    """Mean PSNR in dB of the mean training instance, ``psnr_train`` and ``psnr_heldout``."""
    total: Tensor | None = None
    for batch in train.batches(256):
        values = signal.observe(batch).values.double().sum(dim=0)
        total = values if total is None else total + values
    assert total is not None
    mean = (total / len(train)).float()
    metrics = {}
    for name, rows in {"train": train, "heldout": held_out}.items():
        observed = (signal.observe(batch).values for batch in rows.batches(256))
        quality = torch.cat([psnr(mean.expand_as(values), values) for values in observed])
        metrics[f"psnr_{name}"] = quality.double().mean().item()
    return metrics
