"""A baked field of the paper's small form at 64×64: CPU backends beside the matrix products alone, and an RTX build.

    python benchmarks/baked_field.py

Each work has its turn in every round, for one thread and for all cores. Prints what a call takes, the median of the
rounds' medians and that of the quietest round, since what others do to a shared machine comes and goes by the second.
*Products alone* are the hidden layers' products in torch: the peak a field's own products can reach here.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from evals.timing import settled_seconds
from export.device.backends import OnnxRuntimeGraph, OpenVinoGraph
from export.device.bundle import BundleError
from export.device.tensorrt import build_plan, compute_capabilities, find_builder, kernels_of_log
from export.graphs.fields import baked_graph
from mnif.models.mnif_model import MNIFModel

ROUNDS = 20
SIZE = 64


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    form: dict[str, Any] = {"num_bases": 8, "latent_dim": 8, "cells": 1, "mixing": "average", "output_sine": True}
    decoder = MNIFModel(resolution=SIZE, width=64, depth=4, **form)
    field = decoder.bake(decoder.coefficients(torch.randn(1, 8)))
    points = decoder.grid(SIZE).coordinates
    coordinates, model = {"coordinates": np.ascontiguousarray(points.numpy())}, baked_graph(field)
    hidden, weight = torch.randn(SIZE * SIZE, 64), torch.randn(64, 64)

    def products() -> None:
        for _ in range(4):
            torch.mm(hidden, weight)

    print(f"baked field of width 64, {len(field.shapes)} layers, {SIZE}×{SIZE} points, {os.cpu_count()} cores")
    print(f"  {'what':18} {'threads':>7} {'median, ms':>11} {'quietest round, ms':>19}")
    for threads in (1, os.cpu_count() or 1):
        torch.set_num_threads(threads)
        onnx_runtime = OnnxRuntimeGraph(model.SerializeToString(), threads)
        openvino = OpenVinoGraph(model.SerializeToString(), threads)
        work: dict[str, Callable[[], object]] = {
            "products alone": products,
            "mnif's operator": lambda: field(points),
            "ONNX Runtime": lambda graph=onnx_runtime: graph(coordinates),
            "OpenVINO": lambda graph=openvino: graph(coordinates),
        }
        medians: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(ROUNDS):
            for name, function in work.items():
                time.sleep(0.3)  # until the threads of the one before have stopped waiting for more work
                medians[name].append(settled_seconds(function))
        for name, values in medians.items():
            print(f"  {name:18} {threads:7d} {np.median(values) * 1e3:11.2f} {min(values) * 1e3:19.2f}")
    rtx(model.SerializeToString(), {"coordinates": dict.fromkeys(("minimum", "optimum", "maximum"), points.shape)})


def rtx(model: bytes, profile: dict[str, dict[str, torch.Size]]) -> None:
    """Builds the graph without a GPU, if TensorRT-RTX is installed."""
    try:
        module = find_builder("tensorrt_rtx")
    except BundleError as reason:
        print(f"TensorRT-RTX left out: {reason}")
        return
    for _ in range(2):  # the first build loads the library
        plan = build_plan(module, model, [profile], compute_capabilities=compute_capabilities(module))
    print(
        f"TensorRT-RTX {module.__version__}: {plan.seconds:.2f} s, plan {len(plan.content) / 1e6:.2f} MB, "
        f"{len(kernels_of_log(plan.log))} kernels; a compile gate, not a Jetson build"
    )


if __name__ == "__main__":
    main()
