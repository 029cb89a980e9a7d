"""Candidates of sparse coefficients: which of them stay, how they learn, and what does not count.

All take `--flags="--coefficient_sparsity K"`: K of M bases for a layer of a cell, on average where several share.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mnif.models.mnif_model import MNIFModel


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
        over: what shares a budget: each layer of each cell, a layer in all cells, or all of an instance.
        by_effect: |α| · ‖B‖ ranks them in place of |α|.
        around_mean: what a cell has of every basis whatever the latent is stays, and the rest is thinned; that is one
            more network for each cell.
        annealed: K falls from M on in the first half of training.
        progress: of the training, 0 to 1; the trial sets it.
    """

    over: ClassVar[Literal["row", "layer", "instance"]] = "row"
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


class Gated(Thinned):
    """A second map scores the bases; the K with the highest scores stay, times tanh of their lead over the next."""

    def __init__(self, **settings):  # type: ignore[no-untyped-def]
        super().__init__(**settings)
        inputs, outputs = self.coefficient_map.in_features, self.coefficient_map.out_features
        self.scores = nn.Linear(inputs, outputs)
        nn.init.normal_(self.scores.weight, std=1 / inputs**0.5)
        nn.init.zeros_(self.scores.bias)

    def coefficients(self, latents: Tensor) -> Tensor:
        whole = _dense(self, latents)
        scores = self.scores(latents).view(whole.shape)
        return whole * (scores - self._threshold(scores)).clamp(min=0).tanh()


class Sparsemax(Thinned):
    """α p / max(p) with p = sparsemax(|α| / s), a learned s for every layer of every cell; at most the K largest."""

    def __init__(self, **settings):  # type: ignore[no-untyped-def]
        super().__init__(**settings)
        self.log_scale = nn.Parameter(torch.full((self.num_cells, len(self.bases), 1), -3.0))

    def coefficients(self, latents: Tensor) -> Tensor:
        whole = _dense(self, latents)
        share = _sparsemax(whole.abs() * (-self.log_scale).exp())
        share = share / share.amax(dim=-1, keepdim=True).clamp(min=1e-12)
        return self._kept(whole * share, whole.detach().abs())


def _sparsemax(scores: Tensor) -> Tensor:
    """The point of the simplex that is nearest to ``scores`` (Martins and Astudillo, 2016)."""
    ordered = scores.sort(dim=-1, descending=True).values
    count = torch.arange(1, scores.shape[-1] + 1, device=scores.device)
    above = ordered.cumsum(dim=-1) - 1
    support = (ordered * count > above).sum(dim=-1, keepdim=True)
    return (scores - above.gather(-1, support - 1) / support).clamp(min=0)


SPARSE_DECODERS = {
    "hard threshold": HardThreshold,
    "straight through": StraightThrough,
    "quartic threshold": QuarticThreshold,
    "soft threshold": SoftThreshold,
    "ranked by effect": _thinned(by_effect=True),
    "annealed": _thinned(annealed=True),
    "around the mean of a cell": _thinned(around_mean=True),
    "the largest of a layer": _thinned(over="layer", by_effect=True),
    "the largest of an instance": _thinned(over="instance", by_effect=True),
    "the largest of an instance, around means": _thinned(over="instance", by_effect=True, around_mean=True),
    "the largest of an instance, around means, annealed": _thinned(
        over="instance", by_effect=True, around_mean=True, annealed=True
    ),
    "the largest of an instance, annealed": _thinned(over="instance", by_effect=True, annealed=True),
    "a fixed set for each cell": FixedSet,
    "gates of their own": Gated,
    "sparsemax": Sparsemax,
}
