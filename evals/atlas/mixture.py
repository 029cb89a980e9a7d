"""A model by its coefficients: what it draws with some of them taken away, and how far that is from what was seen."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Observation, Signal

AT_ONCE = 16  # mixtures; bounds the memory of baking

_SHAPE = ("channels", "dimensions", "resolution", "num_bases", "width", "depth", "cells", "overlap", "omega")
_FORM = ("mixing", "output_sine", "signal", "signal_settings")


@dataclass(frozen=True, eq=False)
class Subject:
    """What is explained: an instance of the data, or a sample, which is compared with what all of its coefficients
    draw.

    Attributes:
        name: of the instance, its id.
        coefficients: [cells, layers, M] (:meth:`Mixture.coefficients`).
        row: the instance as a batch of one (:meth:`mnif.data.dataset.Dataset.arrays`); of a sample any instance's,
            which says where it is looked at.
        is_sample: whether there is nothing to compare with but itself.
    """

    name: str
    coefficients: Tensor
    row: Mapping[str, Tensor]
    is_sample: bool = False


class Mixture:
    """A decoder whose coefficients are set by hand.

    A basis here is what has a coefficient of its own: one of the M of one layer or, where the layers of a cell share
    their coefficients, one of the M in all layers at once. Coefficients are [cells, layers, M], with one layer then.
    To take a basis away is to give it the coefficient of ``baseline``.

    Args:
        decoder: the model.
        signal: the model's.
        baseline: [cells, layers, M]: zeros, or the average over a data set. In the delta form a field is the mean
            weights and a weighted sum of bases, so what the average instance has of a basis might as well stand in the
            mean weights: with the average, nothing depends on how training shared it between the two.
    """

    def __init__(self, decoder: MNIFModel, signal: Signal, baseline: Tensor) -> None:
        self.decoder, self.signal, self.baseline = decoder, signal, baseline
        self._last: tuple[tuple[Subject, int, int], Observation] | None = None

    @cached_property
    def held(self) -> Bool[Tensor, "cells layers bases"]:
        """Marks the coefficients that a latent sets: of a model that is sparse by place, of a cell's own bases."""
        held = torch.ones_like(self.baseline, dtype=torch.bool)
        if self.decoder.is_sparse_by_place:
            taken = self.decoder.taken[:, None].expand(-1, held.shape[1], -1)
            held = torch.zeros_like(held).scatter(2, taken, held)
        return held

    @cached_property
    def by_coefficients(self) -> MNIFModel:
        """The dense model that draws the same from coefficients in the place of latents (:meth:`as_latents`)."""
        config = {name: self.decoder.config[name] for name in (*_SHAPE, *_FORM)}
        direct = MNIFModel(**config, coefficient_form="direct", latent_dim=None)
        direct.shared, direct.means = self.decoder.shared, self.decoder.means
        direct.bases = nn.ParameterList(bases.detach() for bases in self.decoder.all_bases())
        return direct.to(self.decoder.device)

    def as_latents(self, coefficients: Float[Tensor, "batch cells layers bases"]) -> Tensor:
        """Gives the latents [B, cells · mixed layers · M] by which :attr:`by_coefficients` has these coefficients."""
        latents = self.of_all_layers(coefficients).flatten(1) * self.decoder.config.num_bases**0.5
        return latents - 1 if self.decoder.config.mixing == "average" else latents

    def of_all_layers(self, coefficients: Tensor) -> Tensor:
        """Repeats coefficients [B, cells, 1, M] that the layers share for each of them; others stay as they are."""
        return coefficients.expand(-1, -1, len(self.decoder.bases), -1)

    def observed(self, subject: Subject, copies: int, look: int) -> Observation:
        """Observes some copies of a subject.

        Args:
            subject: the subject.
            copies: how many, all alike.
            look: seeds what part is looked at, as a step of learning would (:meth:`Signal.subsample`).
        """
        if self._last is None or self._last[0] != (subject, copies, look):
            self._last = ((subject, copies, look), self._observe(subject, copies, look))
        return self._last[1]

    @torch.no_grad()
    def _observe(self, subject: Subject, copies: int, look: int) -> Observation:
        rows = {name: array.expand(copies, *array.shape[1:]) for name, array in subject.row.items()}
        seen = self.signal.subsample(self.signal.observe(rows), torch.Generator().manual_seed(look))
        if not subject.is_sample:
            return seen
        itself = self.of_all_layers(subject.coefficients[None]).expand(copies, -1, -1, -1)
        return replace(seen, values=self.signal.predict(self.by_coefficients, itself, seen))

    @torch.no_grad()
    def errors(
        self, subject: Subject, coefficients: Float[Tensor, "mixtures cells layers bases"], look: int = 0
    ) -> Float[Tensor, " mixtures"]:
        """Computes the mean squared error of a subject drawn by other coefficients than its own, one for each set."""
        parts = []
        for some in coefficients.split(AT_ONCE):
            seen = self.observed(subject, len(some), look)
            parts.append(seen.errors(self.signal.predict(self.by_coefficients, self.of_all_layers(some), seen)))
        return torch.cat(parts)

    @torch.no_grad()
    def errors_of_cells(
        self, subject: Subject, coefficients: Float[Tensor, "mixtures cells layers bases"], look: int = 0
    ) -> Float[Tensor, "mixtures cells"]:
        """Computes the same by cell, where the signal is one whose cells answer for themselves, or there is one."""
        if not isinstance(self.signal, GridSignal):
            return self.errors(subject, coefficients, look)[:, None]
        parts = []
        for some in coefficients.split(AT_ONCE):
            seen = self.observed(subject, len(some), look)
            parts.append(self.signal.errors_of_cells(self.by_coefficients, self.of_all_layers(some), seen))
        return torch.cat(parts)

    def without(self, coefficients: Tensor, chosen: Tensor) -> Tensor:
        """Takes away the bases that are ``chosen``, a mask that is broadcast to the coefficients [..., C, L, M]."""
        return torch.where(chosen, self.baseline, coefficients)


def coefficients_of(decoder: MNIFModel, latents: Tensor) -> Float[Tensor, "batch cells layers bases"]:
    """Maps latents [B, D] to the coefficients that a :class:`Mixture` has: each that there is once."""
    coefficients = decoder.coefficients(latents).detach()
    return coefficients[:, :, :1] if decoder.config.coefficient_form == "shared" else coefficients


def coefficient_batches(decoder: MNIFModel, latents: Tensor, at_once: int = 256) -> Iterator[Tensor]:
    """Yields the coefficients of many latents, some at a time: those of all need not fit in memory."""
    with torch.no_grad():
        yield from (coefficients_of(decoder, some) for some in latents.split(at_once))
