"""The shapes to build engines for: every shape from ``minimum`` to ``maximum`` runs, ``optimum`` fastest."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from export.graphs.model import Resolution
from mnif.cells import axis_cells
from mnif.modeling import MNIFModel

Profile = Mapping[str, Mapping[str, Sequence[int]]]  # input → {"minimum", "optimum", "maximum"} shapes

_SIZES = ("minimum", "optimum", "maximum")
_BATCHES = (1, 8, 64)
_MOST_VALUES = 1 << 22  # of one batch; large grids come in smaller batches


def batch_profile(model: onnx.ModelProto) -> Profile:
    """Of a graph with one input and one output, whose first axis is the batch."""
    most = _MOST_VALUES // int(np.prod([axis.dim_value for axis in _axes(model.graph.output[0])[1:]]))
    return profile_of(
        model, **{size: {"batch": min(n, max(most, 1))} for size, n in zip(_SIZES, _BATCHES, strict=True)}
    )


def baked_profile(decoder: MNIFModel, resolution: Resolution) -> Profile:
    """From one point to several times the resolution: four times in pictures, twice in volumes."""
    config, enlargement = decoder.config, 4 if decoder.config.dimensions < 3 else 2
    sizes = [resolution] * config.dimensions if isinstance(resolution, int) else resolution

    def points(scale: int) -> int:
        axes = [axis_cells(scale * size, config.cells, config.overlap).coordinates.shape[1] for size in sizes]
        return int(np.prod(axes))

    cells = config.cells**config.dimensions
    counts = zip(_SIZES, (1, points(1), points(enlargement)), strict=True)
    return {"coordinates": {size: (cells, count, config.dimensions) for size, count in counts}}


def profile_of(model: onnx.ModelProto, **sizes: Mapping[str, int]) -> Profile:
    """The profile of a graph whose dynamic axes have, at each size, the lengths given by their names."""
    return {
        source.name: {
            size: tuple(lengths[axis.dim_param] if axis.dim_param else axis.dim_value for axis in _axes(source))
            for size, lengths in sizes.items()
        }
        for source in model.graph.input
    }


def _axes(tensor: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    return list(tensor.type.tensor_type.shape.dim)
