"""What a manifest says of a model and of its graphs, as :mod:`export.device.bundle` has it."""

import subprocess
from pathlib import Path
from typing import Any

import onnx
from onnx import helper

from export.bundle import Selection
from export.device.bundle import SCHEMA
from export.graphs.builder import IR_VERSION, OPSET
from export.graphs.fields import CHANNELS
from export.graphs.specs import GraphVariant
from latent_prior.model_card import public_name
from mnif import __version__
from mnif.models.lineage import fingerprints
from mnif.models.mnif_model import MNIFModel
from mnif.signals.radiance import RadianceField
from mnif.signals.registry import signal_of_model
from mnif.utils.pixels import as_axes
from mnif.utils.process import command_line


def manifest_of(selection: Selection, trained_on: str | None = None) -> dict[str, Any]:
    """Describes a model: all but the graphs, which are to be added, the inputs, the files and the digest.

    Args:
        selection: what is exported.
        trained_on: the data's name, where it is known.
    """
    decoder, config, pipeline = selection.decoder, selection.decoder.config, selection.pipeline
    return {
        "schema": SCHEMA,
        "package": {"name": "mnif-diffusion", "version": __version__},
        "source_revision": source_revision(),
        "command": command_line(),
        "decoder_fingerprint": decoder.fingerprint(),
        "trained_on": trained_on,
        "lineage": _lineage(selection.decoder),
        "signal": config.signal,
        "grid": {
            "dimensions": config.dimensions,
            "resolution": list(as_axes(selection.resolution, config.dimensions)),
            "cells": config.cells,
            "overlap": float(config.overlap),
            "pixel_centre": "(r + 1/2) / n",
            "axes": "coordinate k runs along axis k of the values",
        },
        "values": {
            "channels": config.channels,
            "padded_channels": max(CHANNELS, config.channels) if selection.pad_channels else config.channels,
            "range": [-1.0, 1.0],
            "pixel": "round(clip(value, -1, 1) * 127.5 + 127.5)",
        },
        "field": {
            "sizes": [decoder.shapes[0].inputs, *(shape.outputs for shape in decoder.shapes)],
            "last_layer": "sine" if config.output_sine else "linear",
        },
        "radiance": _radiance(selection),
        "sampling": None
        if pipeline is None
        else {
            "latent_dim": config.latent_dim,
            "num_inference_steps": list(selection.steps),
            "scheduler": type(pipeline.scheduler).__name__,
            "seed": selection.seed,
        },
        "profile": _profile(selection),
        "precision": {},
        "graphs": {},
        "measured": {},
    }


def graph_entry(variant: GraphVariant) -> dict[str, Any]:
    """Describes one graph."""
    spec = variant.spec
    return {
        "kind": spec.kind,
        "precision": variant.precision,
        "storage": variant.storage,
        "file": f"onnx/{variant.name}.onnx",
        "opset": OPSET,
        "ir_version": IR_VERSION,
        "inputs": [_tensor_entry(tensor) for tensor in variant.model.graph.input],
        "outputs": [_tensor_entry(tensor) for tensor in variant.model.graph.output],
        "profile": {
            source: {size: list(shape) for size, shape in shapes.items()} for source, shapes in spec.profile.items()
        },
        "steps": spec.steps,
        "scheduler": spec.scheduler,
        "instance": spec.instance,
        "half": variant.half,
        "has_int8": any(node.op_type == "DequantizeLinear" for node in variant.model.graph.node),
        "reference": None if spec.reference is None else spec.reference.prefix,
        "psnr": None if variant.psnr is None else round(variant.psnr, 2),
        "tolerance": variant.tolerance,
    }


def source_revision() -> str | None:
    """Finds the git commit of these sources, "-dirty" behind it if they were changed; None outside of git."""
    here = Path(__file__).resolve()
    try:
        # An installed copy may lie inside someone else's repository, which does not track this file.
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, check=True, capture_output=True
        )
        described = ["git", "describe", "--always", "--abbrev=40", "--match=", "--dirty"]
        return subprocess.run(described, cwd=here.parent, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _lineage(decoder: MNIFModel) -> list[dict[str, Any]]:
    """The generations of a model that was grown, each with what it added; none of one that was not."""
    sizes = [{}, *decoder.config.growths]
    known = zip(decoder.config.lineage, fingerprints(decoder), sizes, strict=False)
    return [{**generation, "fingerprint": own, "added": dict(size)} for generation, own, size in known]


def _radiance(selection: Selection) -> dict[str, Any] | None:
    signal = signal_of_model(selection.decoder)
    if not isinstance(signal, RadianceField):
        return None
    return {
        "bound": signal.bound,
        "near": signal.near,
        "far": signal.far,
        "background": 1.0 if signal.background == "white" else -1.0,
        "samples": signal.samples,
        "size": list(signal.size),
        "intrinsics": list(signal.intrinsics),
        "camera_distance": signal.camera_distance,
    }


def _profile(selection: Selection) -> dict[str, Any] | None:
    if selection.profile is None:
        return None
    record = selection.profile.record
    return {
        "data": public_name(record.data),
        "instances": record.instances,
        "false_alarm_rate": record.false_alarm_rate,
        "patches": record.patches,
    }


def _tensor_entry(tensor: onnx.ValueInfoProto) -> dict[str, Any]:
    shape = [axis.dim_param or axis.dim_value for axis in tensor.type.tensor_type.shape.dim]
    kind = helper.tensor_dtype_to_np_dtype(tensor.type.tensor_type.elem_type).name
    return {"name": tensor.name, "type": kind, "shape": shape}
