"""Which side of the split an instance of the reference is on, as the model that is measured knew it."""

import numpy as np

from mnif.data import Instances, Split
from mnif.latents import LatentTable


def is_of(table: LatentTable, reference: Instances) -> bool:
    """Whether the table's instances are the reference's, in order, some perhaps kept out of it for a test."""
    known = set(table.ids)
    return table.ids == [id for id in reference.ids if id in known]


def sides_of(table: LatentTable, reference: Instances) -> np.ndarray:
    """Sides [N] of :class:`mnif.data.Split` as `mnif fit` cut them; it never looked at what is not in its table."""
    sides = np.full(len(reference), Split.TEST, dtype=np.int8)
    known = set(table.ids)
    sides[[id in known for id in reference.ids]] = np.where(table.held_out.numpy(), Split.HELD_OUT, Split.TRAIN)
    return sides
