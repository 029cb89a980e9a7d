"""What a graph's file says of itself, for whoever opens it in Netron or another viewer: words, facts, and shapes.

None of it is computed with. Nothing in it changes from export to export of one graph: plans are kept as long as their
graph's file is the same to the byte, so commands and what was measured stand in ``manifest.json`` alone.
"""

import json
from typing import Any

import onnx
from onnx import shape_inference

from export.graphs.specs import KINDS
from mnif.signals.registry import signal_class

_TENSORS = {
    "noise": "Standard normal noise [batch, latent_dim]; that of sample i of seed s is "
    "numpy.random.default_rng([s, i]).standard_normal(latent_dim, dtype='float32').",
    "coefficients": "Mixture coefficients [batch, cells, layers, bases]: how much of each basis network a cell takes.",
    "mask": "1 for what was seen and 0 for what was not, which is read as 0, the middle of the range.",
    "latents": "Latents [batch, latent_dim], each of mean 0 and variance 1.",
    "fields": "The cells' networks [batch, cells, parameters]: of each layer weights [in, out], then biases.",
    "cell_residuals": "Mean squared errors of decoded values over what was seen of each cell, 0 where nothing was.",
    "patch_residuals": "Mean squared errors of decoded values over each patch [batch, patches].",
    "residual": "The mean squared error over all that was seen.",
    "coordinates": "Points of each cell [cells, points, dimensions], in the cell's own [-1, 1].",
    "points": "Points in world coordinates.",
    "origins": "Where rays begin, in world coordinates.",
    "directions": "Where rays go, of length one.",
    "colours": "Colours in about [-1, 1].",
    "density": "Densities, per unit of length of the world.",
}


def write_notes(model: onnx.ModelProto, name: str, manifest: dict[str, Any]) -> None:
    """Writes descriptions, metadata, and the shapes of everything between inputs and outputs into a graph.

    Args:
        model: the graph; changed in place.
        name: of it in the manifest.
        manifest: of the bundle; the graph's own entry must be there.
    """
    entry = manifest["graphs"][name]
    model.doc_string = _description(entry, manifest)
    model.graph.name, model.graph.doc_string = name, model.doc_string
    for tensor in (*model.graph.input, *model.graph.output):
        of_signal = {"values": signal_class(manifest["signal"]).values_note}
        tensor.doc_string = (_TENSORS | of_signal)[tensor.name]
    del model.metadata_props[:]
    for key, value in _facts(entry, manifest).items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    for value in model.graph.value_info:
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param.startswith("unk__"):  # the inference's name for what only a run tells
                axis.Clear()


def _description(entry: dict[str, Any], manifest: dict[str, Any]) -> str:
    kind = KINDS[entry["kind"]].described(manifest, [entry])
    stored = "" if entry["storage"] == "fp32" else f", large matrices stored in {entry['storage']}"
    return f"{entry['kind']}: {kind} Computed in {entry['precision']}{stored}."


def _facts(entry: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """What tells one file from another: all that is known, without what is not."""
    facts = {
        "made_by": "{name} {version}".format(**manifest["package"]),
        "trained_on": manifest["trained_on"],
        "decoder_fingerprint": manifest["decoder_fingerprint"],
        "signal": manifest["signal"],
        "cells": manifest["grid"]["cells"],
        **{key: entry[key] for key in ("kind", "precision", "storage", "steps", "scheduler", "instance")},
    }
    return {key: value for key, value in facts.items() if value is not None}
