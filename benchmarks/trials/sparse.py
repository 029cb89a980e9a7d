"""Candidates of sparse coefficients: which of them stay, how they learn, and what does not count.

All take `--flags="--coefficient_sparsity K"`: K of M bases for a layer of a cell, on average where several share. They
stand beside the default there, which goes by place.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from mnif.models.mnif_model import MNIFModel
from mnif.models.sparse_coefficients import keep_largest


class HardThreshold(MNIFModel):
    """Sparse coefficients: the K largest as they are, with the gradient of those alone."""

    def coefficients(self, latents: Tensor) -> Tensor:
        return _largest(self, latents)[1]


class StraightThrough(MNIFModel):
    """Sparse coefficients: the K largest as they are, with a gradient as if all were kept."""

    def coefficients(self, latents: Tensor) -> Tensor:
        coefficients, kept, _ = _largest(self, latents)
        return coefficients + (kept - coefficients).detach()


class QuarticThreshold(MNIFModel):
    """Sparse coefficients: the K largest, α (1 - (t / α)⁴) with t the magnitude that comes next."""

    def coefficients(self, latents: Tensor) -> Tensor:
        coefficients, _, threshold = _largest(self, latents)
        share = (threshold / coefficients.abs().clamp(min=1e-12)).clamp(max=1)
        return coefficients * (1 - share.square().square())


class SoftThreshold(MNIFModel):
    """Sparse coefficients: the K largest, less the magnitude that comes next."""

    def coefficients(self, latents: Tensor) -> Tensor:
        coefficients, _, threshold = _largest(self, latents)
        return coefficients - coefficients.clamp(-threshold, threshold)


def _largest(decoder: MNIFModel, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients before they are made sparse, the K largest of them, and the magnitude that comes next."""
    coefficients, active = _dense(decoder, latents), decoder.config.coefficient_sparsity
    threshold = coefficients.abs().topk(active + 1, dim=-1).values[..., -1:]
    return coefficients, coefficients * (coefficients.abs() > threshold), threshold


def _dense(decoder: MNIFModel, latents: Tensor) -> Tensor:
    """Coefficients before they are made sparse."""
    active = decoder.config.coefficient_sparsity
    decoder.register_to_config(coefficient_sparsity=None)
    coefficients = MNIFModel.coefficients(decoder, latents)
    decoder.register_to_config(coefficient_sparsity=active)
    return coefficients


class Thinned(MNIFModel):
    """The largest as they are, with the gradient of those alone.

    Attributes:
        over: what shares a budget: each layer of each cell, all layers of a cell, a layer in all cells, or all of an
            instance.
        by_effect: |α| · ‖B‖ ranks them in place of |α|.
        around_mean: what a cell has of every basis whatever the latent is stays, and the rest is thinned; that is one
            more network for each cell.
        annealed: K falls from M on in the first half of training.
        progress: of the training, 0 to 1; the trial sets it.
    """

    over: ClassVar[Literal["row", "cell", "layer", "instance"]] = "row"
    by_effect: ClassVar[bool] = False
    around_mean: ClassVar[bool] = False
    annealed: ClassVar[bool] = False
    progress: float = 1.0

    def coefficients(self, latents: Tensor) -> Tensor:
        whole = _dense(self, latents)
        mean = _dense(self, torch.zeros_like(latents[:1])) if self.around_mean else torch.zeros_like(whole[:1])
        rest = whole - mean
        return mean + self._kept(rest, self._sizes(rest))

    def _sizes(self, coefficients: Tensor) -> Tensor:
        sizes = coefficients.detach().abs()
        return sizes * torch.stack([bases.detach().norm(dim=1) for bases in self.bases]) if self.by_effect else sizes

    def _kept(self, coefficients: Tensor, sizes: Tensor) -> Tensor:
        return coefficients * (sizes > self._threshold(sizes))

    def _threshold(self, sizes: Tensor) -> Tensor:
        """The largest size that goes, so that it can be compared with sizes [B, cells, layers, M]."""
        batch, cells, layers, bases = sizes.shape
        active = self.config.coefficient_sparsity
        if self.annealed:
            active += (bases - active) * max(1 - 2 * self.progress, 0)
        if self.over == "row":
            groups, shape = sizes, (batch, cells, layers, 1)
        elif self.over == "cell":
            groups, shape = sizes.flatten(2), (batch, cells, 1, 1)
        elif self.over == "layer":
            groups, shape = sizes.transpose(1, 2).flatten(2), (batch, 1, layers, 1)
        else:
            groups, shape = sizes.flatten(1), (batch, 1, 1, 1)
        count = round(active / bases * groups.shape[-1])
        if count == groups.shape[-1]:
            return sizes.new_full(shape, -1.0)
        return groups.kthvalue(groups.shape[-1] - count, dim=-1).values.view(shape)


def _thinned(**rule: object) -> type[MNIFModel]:
    """Makes the decoder of a rule, which names attributes of :class:`Thinned`."""
    return type("Thinned", (Thinned,), rule)


class SparsemaxGates(MNIFModel):
    """Coefficients have gates of their own, which a layer of a cell shares out by sparsemax; the K largest stay.

    Of M bases with equal gates each has K / M; what gets 1 / K or more of the gates counts in full or more.
    """

    def __init__(self, **settings):  # type: ignore[no-untyped-def]
        super().__init__(**settings)
        shape = self.coefficient_map.weight.shape
        self.coefficient_map.gates = torch.nn.Linear(shape[1], shape[0])

    def coefficients(self, latents: Tensor) -> Tensor:
        whole = _dense(self, latents)
        gates = sparsemax(self.coefficient_map.gates(latents).view_as(whole))
        active = self.config.coefficient_sparsity
        return keep_largest(whole * gates * active, active)


def sparsemax(numbers: Tensor) -> Tensor:
    """Projects rows [..., M] to shares that sum to 1, most of them 0 (Martins and Astudillo, 2016)."""
    falling = numbers.sort(dim=-1, descending=True).values
    excess = falling.cumsum(dim=-1) - 1
    counts = torch.arange(1, numbers.shape[-1] + 1)
    support = (falling * counts > excess).sum(dim=-1, keepdim=True)
    return (numbers - excess.gather(-1, support - 1) / support).clamp(min=0)


class FixedSet(Thinned):
    """A layer of a cell has the same K bases for all instances: those that it used most while K fell."""

    annealed, by_effect = True, True

    def __init__(self, **settings):  # type: ignore[no-untyped-def]
        super().__init__(**settings)
        self.register_buffer("usage", torch.zeros(1, self.num_cells, len(self.bases), self.config.num_bases))

    def _sizes(self, coefficients: Tensor) -> Tensor:
        if self.training and coefficients.requires_grad:
            latest = super()._sizes(coefficients).square().mean(dim=0, keepdim=True)
            self.usage.lerp_(latest, 0.05 if self.usage.any() else 1.0)
        return self.usage


class FixedAtRandom(Thinned):
    """A layer of a cell has the same K bases for all instances, drawn before training."""

    def __init__(self, **settings):  # type: ignore[no-untyped-def]
        super().__init__(**settings)
        shape = (1, self.num_cells, len(self.bases), self.config.num_bases)
        self.register_buffer("order", torch.rand(shape, generator=torch.Generator().manual_seed(0)))

    def _sizes(self, coefficients: Tensor) -> Tensor:
        return self.order


SPARSE_DECODERS = {
    "hard threshold": HardThreshold,
    "straight through": StraightThrough,
    "quartic threshold": QuarticThreshold,
    "soft threshold": SoftThreshold,
    "ranked by effect": _thinned(by_effect=True),
    "annealed": _thinned(annealed=True),
    "around the mean of a cell": _thinned(around_mean=True),
    "the largest of a cell": _thinned(over="cell", by_effect=True),
    "the largest of a layer": _thinned(over="layer", by_effect=True),
    "the largest of an instance": _thinned(over="instance", by_effect=True),
    "the largest of an instance, around means": _thinned(over="instance", by_effect=True, around_mean=True),
    "sparsemax gates": SparsemaxGates,
    "a fixed set for each cell": FixedSet,
    "a fixed set for each cell, at random": FixedAtRandom,
    "the largest": MNIFModel,
}
