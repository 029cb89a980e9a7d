"""`mnif build`, on a device `python3 device/build.py`: a plan for every graph of a bundle.

With TensorRT, plans are built for the GPU at hand. Without a GPU, TensorRT-RTX still compiles every graph for desktop
GPUs: a compile gate, not a Jetson build. A plan that is already there and was built from the same things is kept.
"""

from __future__ import annotations

import argparse
import re
import time
from typing import Any

from .bundle import ENGINES, BundleError, BundleFolder, entry
from .cli import Parser, number, run_command
from .cuda import CudaError, Gpu, find_gpu
from .files import check_writable, write_atomically
from .plans import PlanRefused, environment, plan_key, read_plan, state_folder, write_plan
from .tensorrt import MODULES, build_plan, compute_capabilities, find_builder, is_rtx, kernels_of_log


def make_parser() -> Parser:
    """Makes the command's flags."""
    parser = Parser("build", "Build a plan for every graph of a bundle; what is up to date is kept.")
    parser.add_bundle()
    parser.add_argument("--builder", choices=("auto", *MODULES), default="auto", help="what makes the plans")
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help="build only these (default: all)")
    parser.add_argument(
        "--batch_sizes",
        nargs="*",
        type=number(1),
        metavar="N",
        help="batch sizes with a profile of their own, beside the one for all (default: 1, without a GPU none)",
    )
    parser.add_argument("--optimization_level", type=number(0, 5), metavar="0-5", help="how hard to search")
    parser.add_argument(
        "--compute_capabilities",
        nargs="+",
        type=_compute_capability,
        default=[],
        metavar="8.6",
        help="GPUs to build for with TensorRT-RTX (default: this one, or without a GPU all)",
    )
    parser.add_argument("--force", action="store_true", help="build even what is up to date")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    return run_command(make_parser(), arguments, _build)


def _compute_capability(text: str) -> str:
    if re.fullmatch(r"\d{1,2}\.\d", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r}: two numbers with a point are needed, such as 8.6")
    return text


def _build(options: Any) -> int:
    folder = BundleFolder(options.bundle)
    check_writable(folder.path / ENGINES)
    module = find_builder(options.builder)
    try:
        gpu: Gpu | None = find_gpu()[1]
    except CudaError as error:
        gpu = None
        if not is_rtx(module):
            raise BundleError(f"{error}; TensorRT builds on the device alone, TensorRT-RTX anywhere") from None
        print(f"{error}: TensorRT-RTX compiles for desktop GPUs; a compile gate, not a Jetson build")
    names = options.graphs or sorted(entry(folder.manifest, "graphs", kind=dict))
    built = 0
    for name in names:
        built += _build_one(folder, name, module, gpu, options)
    print(f"{folder.path / ENGINES}: {built} built, {len(names) - built} up to date")
    return 0


def _build_one(folder: BundleFolder, name: str, module: Any, gpu: Gpu | None, options: Any) -> bool:
    graph = folder.graph(name)
    path = folder.path / ENGINES / f"{name}.plan"
    alone = options.batch_sizes if options.batch_sizes is not None else [1] if gpu is not None else []
    profiles = graph_profiles(graph, alone)
    targets = list(options.compute_capabilities)
    if is_rtx(module) and not targets:
        targets = compute_capabilities(module) if gpu is None else [gpu.compute_capability]
    facts = {
        **environment(module, gpu),
        "onnx_sha256": folder.onnx_sha256(name),
        "compute_capabilities": targets if is_rtx(module) else [gpu.compute_capability] if gpu is not None else [],
        "profiles": profiles,
        "half": entry(graph, "half", kind=list),
        "optimization_level": options.optimization_level,
    }
    if not options.force:
        try:
            read_plan(path, facts)
            print(f"{name}: up to date")
            return False
        except PlanRefused as reason:
            if path.exists():
                print(f"{name}: building again, because {reason.reason}")
    cache = None if is_rtx(module) else state_folder() / f"timing-{plan_key(environment(module, gpu))[:16]}.cache"
    plan = build_plan(
        module,
        folder.onnx(name),
        profiles,
        facts["half"],
        options.optimization_level,
        None if cache is None else cache.read_bytes() if cache.exists() else b"",
        targets,
    )
    if cache is not None and plan.timing_cache is not None:
        write_atomically(cache, plan.timing_cache)
    kernels = [kernel._asdict() for kernel in kernels_of_log(plan.log)]
    report = {**plan.settings, "seconds": plan.seconds, "built_at": _now(), "kernels": kernels}
    write_plan(path, plan.content, facts, report, plan.log)
    gate = "" if gpu is not None else ", a compile gate and not a Jetson build"
    print(
        f"{name}: {facts['builder']} {facts['builder_version']}, {plan.seconds:.2f} s, "
        f"plan {len(plan.content) / 1e6:.1f} MB{gate}"
    )
    return True


def graph_profiles(graph: dict[str, Any], batch_sizes: list[int]) -> list[dict[str, Any]]:
    """Lists a profile for each batch size (without a batch, one for the best shape), then the manifest's.

    A profile with one shape lets TensorRT fit its kernels to it, and the runtime keep one CUDA graph for it.
    """
    general = entry(graph, "profile", kind=dict)
    batched = {item["name"] for item in entry(graph, "inputs", kind=list) if item["shape"][0] == "batch"}
    profiles = []
    for size in batch_sizes if batched else batch_sizes[:1]:
        shapes = {}
        for name, profile in general.items():
            shape = [size, *profile["optimum"][1:]] if name in batched else list(profile["optimum"])
            shapes[name] = {"minimum": shape, "optimum": shape, "maximum": shape}
        profiles.append(shapes)
    return [*profiles, general]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
