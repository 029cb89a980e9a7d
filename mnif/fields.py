"""Coordinate networks without state: how their parameters start, and how a batch of them is evaluated.

A field is a SIREN (Sitzmann et al., 2020): sin(W x + b) after every layer but the last. The frequency w0 of
sin(w0 (W x + b)) is folded into W and b, so evaluation has one multiplication less per unit and exported graphs
hold plain matrix products and sines. The parameters of one layer are one row: the weight [in, out] flattened, then
the bias [out]; a set of networks is a matrix of such rows, which makes mixing them one matrix product.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """Fan-in and fan-out of one linear layer of a field."""

    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Numbers in one row of this layer's parameters."""
        return (self.inputs + 1) * self.outputs

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Splits rows [batch, parameters] into weights [batch, inputs, outputs] and biases [batch, 1, outputs]."""
        weights = rows[:, : self.inputs * self.outputs].view(-1, self.inputs, self.outputs)
        return weights, rows[:, None, self.inputs * self.outputs :]


def layer_shapes(inputs: int, outputs: int, width: int, depth: int) -> list[LayerShape]:
    """The ``depth + 2`` linear layers of a field: inputs → width, ``depth`` times width → width, width → outputs."""
    sizes = [inputs, *[width] * (depth + 1), outputs]
    return [LayerShape(a, b) for a, b in pairwise(sizes)]


def siren_rows(shape: LayerShape, count: int, omega: float, first: bool, sine: bool) -> Tensor:
    """``count`` independent initial parameter rows of one layer, with the frequency folded in.

    Args:
        shape: the layer.
        count: how many rows.
        omega: w0 of the sines.
        first: the layer reads coordinates: weights U(±1/in), else U(±sqrt(6/in)/w0) (SIREN, section 3.2).
        sine: a sine follows, so weight and bias are multiplied by w0.

    Returns:
        [count, parameters].
    """
    bound = 1 / shape.inputs if first else math.sqrt(6 / shape.inputs) / omega
    weights = torch.empty(count, shape.inputs * shape.outputs).uniform_(-bound, bound)
    biases = torch.empty(count, shape.outputs).uniform_(-1, 1) / math.sqrt(shape.inputs)
    return torch.cat([weights, biases], dim=1) * (omega if sine else 1.0)


@dataclass(frozen=True)
class BakedField:
    """Plain networks, one per instance and cell, that no longer know of bases.

    Attributes:
        weights: one tensor per layer, [fields, in, out]; the first layer may be shared, [1, in, out].
        biases: one tensor per layer, [fields, 1, out] or [1, 1, out].
        output_sine: a sine follows the last layer too (the paper's image and voxel fields).
    """

    weights: list[Tensor]
    biases: list[Tensor]
    output_sine: bool = False

    def __call__(self, coordinates: Tensor) -> Tensor:
        """The fields' values.

        Args:
            coordinates: [fields, points, d] or [1, points, d], the same points for all.

        Returns:
            [fields, points, channels], within about [-1, 1] for colours and occupancies.
        """
        hidden = coordinates
        last = len(self.weights) - 1
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            fields = max(len(hidden), len(weight))
            hidden = torch.baddbmm(
                bias.expand(fields, -1, -1), hidden.expand(fields, -1, -1), weight.expand(fields, -1, -1)
            )
            if index < last or self.output_sine:
                hidden = torch.sin(hidden)
        return hidden

    def parameters_per_field(self) -> int:
        """Numbers one field holds, a shared first layer included."""
        return sum(w[0].numel() + b[0].numel() for w, b in zip(self.weights, self.biases, strict=True))
