"""`mnif bench`, on a device `python3 device/bench.py`: times a bundle's graphs in every backend.

Beside the times stands what they were measured on: device, JetPack, power mode, processor, versions, memory. Where the
machine tells what it takes, so does the energy of each instance.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .backends import BACKENDS, BackendMissing, load_graph
from .bundle import BundleError, BundleFolder, entry, import_backend
from .cli import MOST_THREADS, Parser, columns, number, run_command
from .cuda import Cuda, CudaError, find_gpu
from .files import check_output, write_json
from .plans import PlanRefused
from .power import NotMeasured, find_meter


def describe_machine() -> dict[str, Any]:
    """Collects the facts that belong beside every measured number; what cannot be found out is None."""
    try:
        _, gpu = find_gpu()
        graphics, no_gpu = gpu._asdict(), None
    except CudaError as error:
        graphics, no_gpu = None, str(error)
    return {
        "device": _text(Path("/proc/device-tree/model")) or platform.node(),
        "gpu": graphics,
        "no_gpu": no_gpu,
        "jetson_linux": _text(Path("/etc/nv_tegra_release")),
        "jetpack": _output(["dpkg-query", "--showformat=${Version}", "--show", "nvidia-jetpack"]),
        "power_mode": _output(["nvpmodel", "-q"]),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: package_version(name) for name in ("numpy", "onnxruntime", "openvino", "tensorrt")},
    }


def package_version(name: str) -> str | None:
    """Asks a module for its version, importing it; None where it cannot be had."""
    try:
        return str(import_backend(name).__version__)
    except (BackendMissing, AttributeError):
        return None


def peak_memory_megabytes() -> float:
    """Tells the most memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _processor() -> str:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace").strip("\0\n ") or None
    except OSError:
        return None


def _output(command: list[str]) -> str | None:
    """Runs a command of the system and returns what it prints, on one line; None where it fails."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return " ".join(done.stdout.decode(errors="replace").split()) or None


_WARM_UP = 3


class Subject(NamedTuple):
    """What is timed: one graph, one backend, one size of its dynamic axis."""

    graph: str
    backend: str
    cuda_graph: bool
    size: int
    run: Any
    arrays: dict[str, np.ndarray]


def make_parser() -> Parser:
    """Makes the command's flags."""
    parser = Parser("bench", "Time graphs in every backend that is here; prints a table, --output writes JSON.")
    parser.add_bundle()
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, metavar="NAME", help=f"of {', '.join(BACKENDS)}")
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help="default: the first of each kind and precision")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=number(1), default=[1, 8, 32], metavar="N", help="default: 1 8 32"
    )
    parser.add_argument("--rounds", type=number(1), default=100, help="calls of each that are timed (default: 100)")
    parser.add_argument(
        "--threads", type=number(0, MOST_THREADS), default=0, help="of a backend on the CPU; 0 lets it choose"
    )
    parser.add_argument(
        "--energy_seconds",
        type=number(0, 600),
        default=2,
        metavar="N",
        help="seconds that each is repeated to measure its energy; 0 leaves it out (default: 2)",
    )
    parser.add_argument("--output", type=Path, help="write machine and table as JSON here")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, or 2 after one line about what is wrong."""
    return run_command(make_parser(), arguments, _bench)


def _bench(options: Any) -> int:
    check_output(options.output)
    folder = BundleFolder(options.bundle)
    machine = describe_machine()
    print(_headline(machine))
    subjects: list[Subject] = []
    for name in options.graphs or _typical(folder):
        for backend in options.backends or BACKENDS:
            try:
                subjects += _subjects(folder, name, backend, options.batch_sizes, options.threads)
            except (BackendMissing, CudaError, PlanRefused) as reason:
                if options.backends:
                    raise
                print(f"{name} in {backend}: left out, {reason}")
    if not subjects:
        raise BundleError("nothing here can run a graph; install onnxruntime")
    host, device = _times(subjects, options.rounds)
    rows = [_row(subject, *times) for subject, *times in zip(subjects, host, device)]
    energy = _measure_energy(subjects, rows, options.energy_seconds)
    print(_table(rows))
    print(f"energy: {energy}")
    memory = {"process_peak_megabytes": peak_memory_megabytes(), "gpu_used_megabytes": _gpu_megabytes()}
    print(f"memory: {memory['process_peak_megabytes']:.0f} MB at most in this process, all backends together")
    if options.output is not None:
        write_json(options.output, {"machine": machine, "memory": memory, "energy": energy, "rows": rows})
    return 0


def _typical(folder: BundleFolder) -> list[str]:
    """Names the first graph of each kind, precision and number of steps."""
    first: dict[tuple, str] = {}
    for name, graph in sorted(entry(folder.manifest, "graphs", kind=dict).items()):
        key = (graph["kind"], graph["precision"], graph["storage"], graph["steps"], graph["instance"] is None)
        first.setdefault(key, name)
    return sorted(first.values())


def _subjects(folder: BundleFolder, name: str, backend: str, batch_sizes: list[int], threads: int) -> list[Subject]:
    """Loads a graph for each batch size (without a batch, its best shape); TensorRT with and without a CUDA graph."""
    graph = folder.graph(name)
    batched = any("batch" in each["shape"] for each in graph["inputs"])
    best = next(iter(graph["profile"].values()))["optimum"]
    found = []
    for cuda_graph in (True, False) if backend == "tensorrt" else (False,):
        if backend == "tensorrt":
            from .tensorrt_graph import load_tensorrt_graph

            run: Any = load_tensorrt_graph(folder, name, cuda_graph)
        else:
            run = load_graph(folder, name, backend, threads)
        for size in batch_sizes if batched else [int(best[0])]:
            arrays = _inputs(graph, size)
            found.append(Subject(name, backend, cuda_graph, size if batched else 1, run, arrays))
    return found


def _inputs(graph: dict[str, Any], size: int) -> dict[str, np.ndarray]:
    """Draws uniform numbers in [-1, 1], in masks ones, of the best shapes, ``size`` along the batch."""
    random = np.random.default_rng(0)
    arrays = {}
    for tensor in graph["inputs"]:
        best = graph["profile"][tensor["name"]]["optimum"]
        shape = [size if axis == "batch" else best[place] for place, axis in enumerate(tensor["shape"])]
        drawn = np.ones(shape) if tensor["name"] == "mask" else random.uniform(-1, 1, shape)
        arrays[tensor["name"]] = drawn.astype(np.float32)
    return arrays


def _times(subjects: list[Subject], rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """Measures host and device milliseconds, [subjects, rounds]; the device's are NaN on a CPU."""
    host, device = np.empty((2, len(subjects), rounds))
    for round_number in range(-_WARM_UP, rounds):
        for index, subject in enumerate(subjects):
            started = time.perf_counter()
            subject.run(subject.arrays)
            if round_number >= 0:
                host[index, round_number] = (time.perf_counter() - started) * 1e3
                device[index, round_number] = getattr(subject.run, "device_milliseconds", np.nan)
    return host, device


def _row(subject: Subject, host: np.ndarray, device: np.ndarray) -> dict[str, Any]:
    p50, p95, p99 = (float(each) for each in np.percentile(host, (50, 95, 99)))
    on_gpu = subject.backend == "tensorrt"
    return {
        "graph": subject.graph,
        "backend": subject.backend,
        "version": subject.run.version,
        "cuda_graph": subject.cuda_graph if on_gpu else None,
        "batch": subject.size,
        "host_ms_p50": p50,
        "host_ms_p95": p95,
        "host_ms_p99": p99,
        "device_ms_p50": float(np.median(device)) if on_gpu else None,
        "per_second": subject.size / p50 * 1e3,
        "millijoules": None,
    }


def _measure_energy(subjects: list[Subject], rows: list[dict[str, Any]], seconds: int) -> str:
    """Adds to each row the millijoules of one instance, those of an idle machine included; tells by what they are."""
    if seconds == 0:
        return "not measured, --energy_seconds 0"
    try:
        meter = find_meter()
        told = [(each, row) for each, row in zip(subjects, rows) if meter.whole_board or each.backend == "tensorrt"]
        if not told:
            raise NotMeasured(f"{meter.name} tells the GPU's alone, and nothing ran there")
        idle = meter.joules_of(lambda: time.sleep(0.05), 1.0)
        for subject, row in told:
            taken = meter.joules_of(partial(subject.run, subject.arrays), seconds)
            row["millijoules"] = taken.joules / taken.calls / subject.size * 1e3
    except NotMeasured as reason:
        return f"not measured, {reason}"
    what = "the whole module" if meter.whole_board else "the GPU alone"
    return f"of {what}, by {meter.name}; {idle.joules / idle.seconds:.1f} W of it when idle"


def _table(rows: list[dict[str, Any]]) -> str:
    head = (
        "graph",
        "backend",
        "CUDA graph",
        "batch",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "device ms",
        "per second",
        "mJ each",
    )
    lines = [head]
    for row in rows:
        times = [f"{row[key]:.3f}" for key in ("host_ms_p50", "host_ms_p95", "host_ms_p99")]
        device = "–" if row["device_ms_p50"] is None else f"{row['device_ms_p50']:.3f}"
        graph = {None: "–", True: "on", False: "off"}[row["cuda_graph"]]
        rate = f"{row['per_second']:.0f}"
        energy = "–" if row["millijoules"] is None else f"{row['millijoules']:.2f}"
        lines.append((row["graph"], row["backend"], graph, str(row["batch"]), *times, device, rate, energy))
    return "\n".join(columns(lines))


def _headline(machine: dict[str, Any]) -> str:
    facts = [machine["device"], f"{machine['processor']}, {machine['cores']} cores"]
    if machine["gpu"] is None:
        facts.append(f"no GPU was there, CPU backends alone are timed ({machine['no_gpu']})")
    else:
        facts.append("{name}, compute capability {compute_capability}, CUDA {driver}".format(**machine["gpu"]))
    for key in ("jetpack", "power_mode"):
        if machine[key]:
            facts.append(f"{key.replace('_', ' ')} {machine[key]}")
    return "; ".join(facts)


def _gpu_megabytes() -> float | None:
    try:
        return Cuda().memory_used_bytes() / 1e6
    except CudaError:
        return None
