"""Which cells' fields answer at points that are on no grid, and how their answers blend."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routes:
    """Points sorted by the field they are put to; a point near a border is put to several.

    Attributes:
        coordinates: [B · cells**d, slots, d], each field's points in its own coordinates; unused slots are zero.
        slot: [n], index into the flattened (field, slot) of each of n questions.
        point: [n], index into the flattened (B, points) of the point a question is about.
        weight: [n], its share; the shares of one point sum to 1.
        shape: (B, points).
    """

    coordinates: Tensor
    slot: Tensor
    point: Tensor
    weight: Tensor
    shape: tuple[int, int]

    def gather(self, values: Tensor) -> Tensor:
        """The fields' values [B · cells**d, slots, channels] → the points' values [B, points, channels]."""
        answers = values.flatten(0, 1).index_select(0, self.slot) * self.weight[:, None]
        gathered = answers.new_zeros(self.shape[0] * self.shape[1], answers.shape[1])
        return gathered.index_add(0, self.point, answers).view(*self.shape, -1)


@torch.no_grad()
def route_points(coordinates: Tensor, cells: int, overlap: float) -> Routes:
    """Finds the cells of points, by the same partition of unity as :func:`mnif.cells.axis_cells`.

    Args:
        coordinates: [B, points, d] in [-1, 1]; points outside belong to the nearest cell, without a limit.
        cells: cells per axis.
        overlap: how far a cell's field reaches over its borders, as a fraction of its width, 0 to 0.5.
    """
    batch, points, dimensions = coordinates.shape
    position = (coordinates + 1) * (cells / 2)
    inside = position.floor().clamp(0, cells - 1)
    border = position.round()
    distance = position - border
    blended = (border >= 1) & (border < cells) & (distance.abs() < overlap)
    ramp = (distance / max(2 * overlap, 1e-12) + 0.5).clamp(0, 1)
    share = torch.where(blended, ramp, 0.0)
    left, right = torch.where(blended, border - 1, inside), torch.where(blended, border, inside)

    instance = torch.arange(batch, device=coordinates.device)[:, None].expand(batch, points)
    fields, weights, questions, locals_ = [], [], [], []
    for corner in range(2**dimensions):
        side = [corner >> axis & 1 for axis in range(dimensions)]
        cell = torch.stack([(right if s else left)[..., axis] for axis, s in enumerate(side)], dim=-1)
        weight = torch.stack([(share if s else 1 - share)[..., axis] for axis, s in enumerate(side)]).prod(dim=0)
        number = instance
        for axis in range(dimensions):
            number = number * cells + cell[..., axis].long()
        asked = weight.flatten().nonzero()[:, 0]
        questions.append(asked)
        fields.append(number.flatten()[asked])
        weights.append(weight.flatten()[asked])
        locals_.append(((position - cell) * 2 - 1).view(-1, dimensions)[asked])
    field = torch.cat(fields)
    order = field.argsort(stable=True)
    field = field[order]
    counts = field.bincount(minlength=batch * cells**dimensions)
    slots = max(int(counts.max()), 1)
    first = counts.cumsum(0) - counts
    slot = field * slots + torch.arange(len(field), device=field.device) - first[field]
    padded = coordinates.new_zeros(len(counts) * slots, dimensions)
    padded[slot] = torch.cat(locals_)[order]
    return Routes(
        coordinates=padded.view(len(counts), slots, dimensions),
        slot=slot,
        point=torch.cat(questions)[order],
        weight=torch.cat(weights)[order],
        shape=(batch, points),
    )
