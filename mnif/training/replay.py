"""Replay: what a decoder knew before is learned again beside new data, so that bases that move forget little.

The old latents are known and the old decoder draws what they stand for, so no old data are needed. What is compared
are the fields themselves, at random points of every cell, alike for pictures, shapes and radiance fields.
"""

from copy import deepcopy

import torch
from torch import Tensor, nn

from mnif.data.batches import InstanceGenerator
from mnif.models.lineage import widened
from mnif.models.mnif_model import MNIFModel
from mnif.training.methods import LearningMethod

_POINTS = 64  # of each cell, in a step


class Replay(nn.Module):
    """A way of learning, and beside it the old fields of old latents, as many in a step as there are new instances.

    Args:
        method: learns the new data; its decoder was grown from ``before``.
        before: the decoder as it was; it does not move.
        latents: old ones, [N, D of ``before``].
        weight: of the old fields' squared error in the loss; 0 lets them be forgotten.
        earlier_rate: multiplies the learning rates of all that is not new.
    """

    latents: Tensor

    def __init__(self, method: LearningMethod, before: MNIFModel, latents: Tensor, weight: float, earlier_rate: float):
        super().__init__()
        self.method, self.weight, self.earlier_rate = method, weight, earlier_rate
        self.register_buffer("latents", latents, persistent=False)
        # Kept out of the checkpoints, which hold what learns.
        self.before = [deepcopy(before).requires_grad_(False).to(latents.device)]

    def forward(self, row: Tensor, key: Tensor, **batch: Tensor) -> Tensor:
        """The loss of a batch of new instances, and ``weight`` times that of old latents drawn by their keys."""
        loss = self.method(row=row, key=key, **batch)
        return loss + self.weight * self.forgotten(key) if self.weight else loss

    def forgotten(self, key: Tensor) -> Tensor:
        """The mean squared error of the fields of old latents, one for each of the keys [B]."""
        (before,), decoder = self.before, self.method.decoder
        drawn = (InstanceGenerator(~key).uniform() * len(self.latents)).long()
        latents = self.latents[drawn.to(self.latents.device)]
        places = torch.rand(1, _POINTS, decoder.config.dimensions, device=latents.device) * 2 - 1
        old = before.bake(before.coefficients(latents))(places)
        new = decoder.bake(decoder.coefficients(widened(decoder, latents)))(places)
        return (new - old).square().mean()
