"""All that is measured for an atlas of a model: usage, what instances and samples would miss, whether that is true."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from evals.atlas.mixture import Mixture, Subject, coefficient_batches, coefficients_of
from evals.atlas.removal import RemovalTest, error_rises, removal_test
from evals.atlas.usage import Usage, average_coefficients, measured_usage
from mnif.data.batches import array_dataset, evenly_spaced
from mnif.data.dataset import Dataset
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Signal
from mnif.utils.errors import UserError
from mnif.utils.process import progress_bar

Baseline = Literal["average", "zero"]
"""What a basis that is taken away leaves: the coefficient of the average instance, or none."""
BASELINES = get_args(Baseline)

USED_BY = 2048
"""Instances, at most, over which usage is measured."""

_CURVE = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)  # shares of all coefficients that are taken away


@dataclass(frozen=True)
class Atlas:
    """What was measured. A basis's number counts the M of the first layer, then those of the next.

    Attributes:
        mixture: the model.
        latents: [N, D], of the instances over which usage was measured.
        ids: theirs.
        usage: by them.
        subjects: instances that are explained, then samples.
        rises: of the squared error for each subject, [cells, layers, M].
        importance: [layers · M], each basis's share of all that the explained instances lose: of the rises in cells
            that would fit worse without it.
        of_parts: the test of the strongest coefficients, each of one basis in one cell.
        of_bases: the test of the strongest bases, in all cells.
        named: how many coefficients an instance's explanation names: 1 %, but 8 at least.
        named_bases: how many bases: 5 %.
    """

    mixture: Mixture
    latents: Tensor
    ids: list[str]
    usage: Usage
    subjects: list[Subject]
    rises: list[Tensor]
    importance: Tensor
    of_parts: RemovalTest
    of_bases: RemovalTest
    named: int
    named_bases: int

    @property
    def order(self) -> list[int]:
        """The bases from the most important one on."""
        return self.importance.argsort(descending=True, stable=True).tolist()


def measured_atlas(
    decoder: MNIFModel,
    signal: Signal,
    table: LatentTable,
    data: Dataset,
    samples: Tensor,
    num_instances: int,
    baseline: Baseline = "average",
) -> Atlas:
    """Measures a model's bases.

    Args:
        decoder: the model.
        signal: the model's.
        table: latents of the decoder.
        data: the data set they are of, or one that has some of their instances.
        samples: latents [n, D] of samples that are explained too.
        num_instances: of the table that are explained: held-out ones, if there are any, evenly spaced.
        baseline: what a basis that is taken away leaves.

    Raises:
        UserError: no instance of the table is in ``data``.
    """
    chosen = torch.from_numpy(evenly_spaced(len(table.ids), USED_BY))
    latents = table.latents[chosen].to(decoder.device)
    average = average_coefficients(coefficient_batches(decoder, latents))
    mixture = Mixture(decoder, signal, average if baseline == "average" else torch.zeros_like(average))
    usage = measured_usage(decoder, coefficient_batches(decoder, latents), mixture.baseline)
    instances = _instances(mixture, table, data, num_instances)
    subjects = [*instances, *_samples(mixture, samples, instances[0])]
    bar = progress_bar(subjects, desc="taking bases away", unit=signal.noun)
    rises = [error_rises(mixture, subject) for subject in bar]
    explained = rises[: len(instances)]
    lost = torch.stack([rise.clamp_min(0).sum(dim=0).flatten() for rise in explained]).mean(dim=0)
    parts = int(mixture.held.sum())
    named, named_bases = min(max(round(0.01 * parts), 8), parts // 2), max(round(0.05 * len(lost)), 1)
    counts = sorted({named, *(max(round(share * parts), 1) for share in _CURVE)})
    return Atlas(
        mixture=mixture,
        latents=latents,
        ids=[table.ids[row] for row in chosen.tolist()],
        usage=usage,
        subjects=subjects,
        rises=rises,
        importance=lost / lost.sum().clamp_min(1e-12),
        of_parts=removal_test(mixture, instances, explained, counts),
        of_bases=removal_test(mixture, instances, [rise.sum(dim=0) for rise in explained], [named_bases]),
        named=named,
        named_bases=named_bases,
    )


def _instances(mixture: Mixture, table: LatentTable, data: Dataset, count: int) -> list[Subject]:
    """Chooses the instances that are explained."""
    place = {id: row for row, id in enumerate(data.ids)}
    known = np.array([row for row, id in enumerate(table.ids) if id in place], dtype=int)
    if not len(known):
        raise UserError(
            f"{data.name}: none of the table's instances is there, such as {table.ids[0]}; give their data"
        )
    held_out = known[table.held_out.numpy()[known]]
    known = held_out if len(held_out) else known
    rows = array_dataset(data.arrays())
    device = mixture.decoder.device
    return [
        Subject(table.ids[row], coefficients_of(mixture.decoder, table.latents[row : row + 1].to(device))[0], batch)
        for row in known[evenly_spaced(len(known), count)].tolist()
        for batch in ({name: part.to(device) for name, part in rows.__getitems__([place[table.ids[row]]]).items()},)
    ]


def _samples(mixture: Mixture, latents: Tensor, seen_as: Subject) -> list[Subject]:
    """Makes subjects of samples [n, D], which are looked at where ``seen_as`` is."""
    return [
        Subject(f"sample {number}", coefficients_of(mixture.decoder, latent[None])[0], seen_as.row, is_sample=True)
        for number, latent in enumerate(latents)
    ]


def basis_names(decoder: MNIFModel) -> tuple[list[str], list[str]]:
    """Names the bases as the page does, by layer of the field from 1 on and number from 0 on, and their layers."""
    bases = range(decoder.config.num_bases)
    if decoder.config.coefficient_form == "shared":
        return [str(basis) for basis in bases], ["all layers"] * len(bases)
    layers = [layer + 1 for layer in decoder.mixed_layers]
    return (
        [f"{layer}·{basis}" for layer in layers for basis in bases],
        [f"layer {layer}" for layer in layers for _ in bases],
    )
