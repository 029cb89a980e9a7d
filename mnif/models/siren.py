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
from jaxtyping import Float
from torch import Tensor

from mnif.models.field_op import can_evaluate, field_errors, field_values
from mnif.models.field_torch import can_compile, compiled_values, split_layers, values


@dataclass(frozen=True)
class LayerShape:
    """Fan-in and fan-out of one linear layer of a field."""

    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Numbers in one row of this layer's parameters."""
        return (self.inputs + 1) * self.outputs

    def split(
        self, params: Float[Tensor, "batch parameters"]
    ) -> tuple[Float[Tensor, "batch inputs outputs"], Float[Tensor, "batch 1 outputs"]]:
        """Splits rows of parameters into weights and biases."""
        ((weights, biases),) = split_layers(params, (self.inputs, self.outputs))
        return weights, biases


def layer_shapes(inputs: int, outputs: int, width: int, depth: int) -> list[LayerShape]:
    """Lists the ``depth + 2`` layers of a field: inputs → width, ``depth`` times width → width, width → outputs."""
    sizes = [inputs, *[width] * (depth + 1), outputs]
    return [LayerShape(a, b) for a, b in pairwise(sizes)]


def siren_params(
    shape: LayerShape, count: int, omega: float, first: bool, sine: bool
) -> Float[Tensor, "{count} {shape.parameters}"]:
    """Draws ``count`` independent initial parameter rows of one layer, with the frequency folded in.

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
        shapes: the linear layers.
        params: [fields, parameters], a field's layers one after the other, each weight [in, out] then bias [out].
        output_sine: a sine follows the last layer too (the paper's image and voxel fields).
    """

    shapes: list[LayerShape]
    params: Float[Tensor, "fields parameters"]
    output_sine: bool = False

    def __call__(self, coordinates: Float[Tensor, "sets points d"]) -> Float[Tensor, "fields points channels"]:
        """Evaluates the fields.

        Args:
            coordinates: [sets, points, d]; field i is asked at set i modulo ``sets``, so one set serves all fields
                and one set per cell serves all instances.

        Returns:
            [fields, points, channels], within about [-1, 1] for colours and occupancies.
        """
        if can_evaluate(self._sizes(), coordinates, self.params):
            return field_values(coordinates, self.params, self._sizes(), self.output_sine)
        if can_compile(coordinates, self.params):
            return compiled_values(coordinates, self.params, self._sizes(), self.output_sine)
        return self.evaluate_layers(coordinates)

    def evaluate_layers(self, coordinates: Float[Tensor, "sets points d"]) -> Float[Tensor, "fields points channels"]:
        """Evaluates the fields by PyTorch's own operators, on any device, in any precision, in any mode of autograd.

        Args:
            coordinates: as for a call.
        """
        return values(coordinates, self.params, self._sizes(), self.output_sine)

    def errors(
        self,
        coordinates: Float[Tensor, "sets points d"],
        targets: Float[Tensor, "fields points channels"],
        weights: Float[Tensor, "weight_sets points"],
    ) -> Float[Tensor, " fields"]:
        """Computes the weighted squared error of every field, [fields]; faster than from its values.

        Args:
            coordinates: as for a call.
            targets: [fields, points, channels].
            weights: [sets, points], by which a point's squared error, a mean over the channels, is multiplied; again
                set i modulo ``sets``.
        """
        if can_evaluate(self._sizes(), coordinates, self.params, targets, weights):
            return field_errors(coordinates, self.params, targets, weights, self._sizes(), self.output_sine)
        squares = (self(coordinates) - targets).square().mean(dim=2)
        return (squares.view(-1, *weights.shape) * weights).sum(dim=2).flatten()

    def _sizes(self) -> list[int]:
        return [self.shapes[0].inputs, *(shape.outputs for shape in self.shapes)]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Splits ``params`` into every layer's weights [fields, in, out] and biases [fields, 1, out]."""
        return split_layers(self.params, self._sizes())

    def parameters_per_field(self) -> int:
        """Counts the numbers one field holds."""
        return self.params.shape[1]

    def multiply_adds_per_point(self) -> int:
        """Counts multiplications (each with an addition) that one value of one field costs, without sines."""
        return sum(shape.inputs * shape.outputs for shape in self.shapes)
