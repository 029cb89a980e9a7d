"""How bases that go by place begin: as one set for all places, each of its bases learned from every cell."""

from collections.abc import Callable

from torch import Tensor

from mnif.models.mnif_model import MNIFModel

TIED = 0.4
"""Share of the training after which every region goes on with its own."""


def tie_sets(decoder: MNIFModel, share: Callable[[], float]) -> None:
    """Gives bases at the same place of their sets one gradient, the mean of theirs, in the first :data:`TIED`.

    They start equal, so they stay equal until then. Gradients are told as they are made, before processes or batches
    are summed up, which are sums themselves.

    Args:
        decoder: nothing is done unless its coefficients are sparse by place.
        share: of the training that is done.
    """
    if not decoder.is_sparse_by_place:
        return
    for bases in decoder.bases:
        bases.register_hook(lambda gradient: _mean_over_sets(gradient, decoder) if share() < TIED else gradient)


def _mean_over_sets(gradient: Tensor, decoder: MNIFModel) -> Tensor:
    sets = gradient.unflatten(0, (-1, decoder.mapped_bases[0]))
    return sets.mean(dim=0).repeat(len(sets), 1)
