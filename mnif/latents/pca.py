"""Principal components: the best linear code of its size, a control for any learned one."""

from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch

from mnif.data.batches import ArrayDataset
from mnif.signals.base import GridSignal
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


def pca_metrics(signal: GridSignal, train: ArrayDataset, held_out: ArrayDataset, components: int) -> dict[str, float]:
    """Measures both splits as drawn from as many principal components as a latent has numbers.

    Returns:
        Means over instances of what the signal compares by, as ``psnr_pca_train`` in dB and, of voxels,
        ``iou_pca_heldout``; nothing if the training set is too large for it or too small.
    """
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
