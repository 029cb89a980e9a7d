"""Two graphs with which a page draws samples at any resolution (`mnif export --browser`, examples/browser).

- *prior*: noise → coefficients, :func:`export.graphs.sampler_graph` without its end.
- *field*: coefficients and coordinates → values; which points to ask for, and how cells blend, is left to the caller.

The first runs once for a sample, the second for every picture of it.
"""

import onnx

from export.graphs import cells_of, coefficient_shape, evaluated, mixed_layers
from export.nodes import Nodes
from mnif.modeling import MNIFModel


def field_graph(decoder: MNIFModel) -> onnx.ModelProto:
    """``coefficients``, ``coordinates`` → ``values``, batch and points dynamic.

    They are [batch, cells, layers, bases], [cells, points, dimensions] in each cell's own [-1, 1], and
    [batch, cells, points, channels].
    """
    nodes = Nodes()
    layers = mixed_layers(nodes, decoder, "coefficients")
    for index, (shape, row) in enumerate(zip(decoder.shapes, decoder.shared, strict=False)):
        weight, bias = shape.split(row.detach())
        layers[index] = nodes.constant(f"layer_{index}.weight", weight), nodes.constant(f"layer_{index}.bias", bias)
    points = nodes.unsqueeze("coordinates", [0], "coordinates_of_all")
    values = evaluated(nodes, points, layers, decoder.config.output_sine)
    cells, config = cells_of(decoder), decoder.config
    return nodes.model(
        "field",
        {"coefficients": coefficient_shape(decoder), "coordinates": [cells, "points", config.dimensions]},
        {"values": (values, ["batch", cells, "points", config.channels])},
    )
