"""What any learned latent must beat: principal components, the best linear code of its size, and the mean instance."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from mnif.data.batches import ArrayDataset
from mnif.signals.base import GridSignal, Signal, psnr
from mnif.utils.errors import UserError

_LARGEST = 1 << 28  # numbers of a training set; beyond, the control is left out


@dataclass(frozen=True, eq=False)
class PCA:
    """Principal components of a data set.

    Attributes:
        mean: [D] float32, D numbers to an instance.
        components: [K, D] float32, orthonormal rows, the widest first.
    """

    mean: np.ndarray
    components: np.ndarray

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Rebuilds instances [N, ...] from their K coefficients, float32 in the shape they came in, not clipped."""
        rows = images.reshape(len(images), -1).astype(np.float32) - self.mean
        return (rows @ self.components.T @ self.components + self.mean).reshape(images.shape)


def fit_pca(train: np.ndarray, components: int) -> PCA:
    """Finds the first principal components of ``train`` [N, ...].

    An eigendecomposition in float32 of the smaller of the D×D scatter and N×N Gram matrices, for the leading
    eigenvectors alone: a few seconds for 3,561 pictures of 32×32×3 and 128 components.

    Args:
        train: [N, ...] numbers.
        components: how many, from 1 to the smaller of N and D.

    Raises:
        UserError: more components than N or D allow, or fewer than 1.
    """
    rows = train.reshape(len(train), -1).astype(np.float32)
    size = min(rows.shape)
    if not 1 <= components <= size:
        raise UserError(
            f"PCA: {components} components of {rows.shape[0]}×{rows.shape[1]} numbers; 1 to {size} is possible"
        )
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    rows -= mean
    narrow = rows.shape[1] <= rows.shape[0]
    matrix = rows.T @ rows if narrow else rows @ rows.T
    vectors = scipy.linalg.eigh(matrix, subset_by_index=[size - components, size - 1], overwrite_a=True)[1][:, ::-1]
    if not narrow:
        vectors = np.linalg.qr(rows.T @ vectors)[0]  # the rows' span; orthonormal even where the rank runs out
    return PCA(mean, np.ascontiguousarray(vectors.T))


def pca_warnings(components: int, instances: int) -> list[str]:
    """Says so in a line where PCA has a component for every instance it was fitted to, and so draws each exactly.

    The mean takes one dimension, so n instances span n - 1.
    """
    if components < instances - 1:
        return []
    return [
        f"PCA with {components} components holds all of the {instances} training instances: its figures on them mean "
        "nothing"
    ]


def pca_metrics(signal: Signal, train: ArrayDataset, held_out: ArrayDataset, components: int) -> dict[str, float]:
    """Measures both splits as drawn from as many principal components as a latent has numbers.

    Returns:
        Means over instances of what the signal compares by, as ``psnr_pca_train`` in dB and, of voxels,
        ``iou_pca_heldout``; nothing if the training set is too large for it or too small, or instances are no grids.
    """
    if not isinstance(signal, GridSignal):
        return {}
    (first,) = train.subset(np.arange(1)).batches(1)
    numbers = signal.observe(first).values.numel()
    components = min(components, len(train), numbers)
    if numbers * len(train) > _LARGEST or len(train) < 2:
        return {}
    splits = {"train": train} | ({"heldout": held_out} if len(held_out) else {})
    values = {name: _values(signal, rows) for name, rows in splits.items()}
    pca = fit_pca(values["train"].numpy(), components)
    metrics = {}
    for name, targets in values.items():
        reconstructed = torch.from_numpy(pca.reconstruct(targets.numpy()))
        for metric, per_instance in signal.compare(reconstructed, targets).items():
            metrics[f"{metric}_pca_{name}"] = per_instance.mean().item()
    return metrics


def _values(signal: GridSignal, rows: ArrayDataset) -> torch.Tensor:
    return torch.cat([signal.observe(batch).values for batch in rows.batches(256)])


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
