"""`verify`: runs every graph in every backend that is here, and says how close it comes to the exact answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .backends import BACKENDS, BackendMissing, load_graph
from .bundle import BundleError, BundleFolder, entry, import_backend
from .cli import Parser, run_command
from .cuda import CudaError
from .files import check_output, write_json
from .plans import PlanRefused


def peak_of(exact: np.ndarray) -> float:
    """Tells the peak of a PSNR: 2, the width of [-1, 1], or twice the largest magnitude where that is above 1."""
    return 2 * max(1.0, float(np.abs(exact).max()))


def psnr(values: np.ndarray, exact: np.ndarray) -> float:
    """Computes the peak signal-to-noise ratio in dB, 206 at most for a peak of 2."""
    error = float(np.mean((values.astype(np.float64) - exact) ** 2))
    return float(10 * np.log10(peak_of(exact) ** 2 / max(error, 1e-20)))


REFERENCE_EVALUATOR = "onnx-reference"

_PEAK = 2.0  # values lie in [-1, 1]


class Check(NamedTuple):
    """What one graph answers in one backend, beside its limits.

    Attributes:
        graph, backend, precision: which.
        max_abs: largest difference to the reference over all outputs.
        psnr: dB, the lowest of all outputs.
        limit_abs, limit_psnr: what the manifest allows.
    """

    graph: str
    backend: str
    precision: str
    max_abs: float
    psnr: float
    limit_abs: float
    limit_psnr: float

    @property
    def passed(self) -> bool:
        """Whether both limits hold; numbers that are none do not."""
        return self.max_abs <= self.limit_abs and self.psnr >= self.limit_psnr

    @property
    def excess(self) -> float:
        """How far beyond the limits it is, 1 on the limit; for finding the worst."""
        if math.isnan(self.max_abs):
            return math.inf
        return max(self.max_abs / self.limit_abs, 10 ** ((self.limit_psnr - self.psnr) / 20))


def make_parser() -> Parser:
    """Makes the command's flags."""
    parser = Parser("verify", "Run every graph in every backend that is here, against the float64 reference.")
    parser.add_bundle()
    parser.add_argument(
        "--backends",
        nargs="+",
        choices=(*BACKENDS, REFERENCE_EVALUATOR),
        metavar="NAME",
        help=f"of {', '.join(BACKENDS)}, {REFERENCE_EVALUATOR} (default: all that are here)",
    )
    parser.add_argument("--graphs", nargs="+", metavar="NAME", help="check only these (default: all)")
    parser.add_argument("--output", type=Path, help="write the table as JSON here")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns 0, 1 if a graph is outside its tolerance, 2 after one line about what is wrong."""
    return run_command(make_parser(), arguments, _verify)


def _verify(options: Any) -> int:
    check_output(options.output)
    folder = BundleFolder(options.bundle)
    graphs = entry(folder.manifest, "graphs", kind=dict)
    names = [name for name in options.graphs or sorted(graphs) if folder.graph(name)["reference"] is not None]
    if not names:
        raise BundleError(f"{folder.path}: none of these graphs has a reference")
    reference = folder.reference()
    checks: list[Check] = []
    for backend in options.backends or (*BACKENDS, REFERENCE_EVALUATOR):
        try:
            found = [check_graph(folder, reference, name, backend) for name in names]
        except (BackendMissing, CudaError, PlanRefused) as reason:
            if options.backends:
                raise
            print(f"{backend}: left out, {reason}")
            continue
        checks += found
        for check in found:
            print(_line(check))
    if not checks:
        raise BundleError("nothing here can run a graph; install onnxruntime")
    if options.output is not None:
        write_json(options.output, [{**check._asdict(), "passed": check.passed} for check in checks])
    worst = max(checks, key=lambda check: check.excess)
    failed = sum(not check.passed for check in checks)
    skipped = len(options.graphs or graphs) - len(names)
    print(
        f"{len(checks) - failed} of {len(checks)} checks passed, {skipped} graphs have no reference of their own; "
        f"worst: {worst.graph} in {worst.backend}, {_metrics(worst)}"
    )
    return 1 if failed else 0


def check_graph(folder: BundleFolder, reference: dict[str, np.ndarray], name: str, backend: str) -> Check:
    """Runs one graph on its reference input.

    Args:
        folder: the bundle.
        reference: its reference.npz.
        name: of the graph.
        backend: one of :data:`export.device.backends.BACKENDS`, or ``"onnx-reference"``.

    Raises:
        BackendMissing: the backend is not here.
        BundleError: the graph or its reference is unusable.
    """
    graph = folder.graph(name)
    arrays = [
        {each["name"]: _array(reference, graph["reference"], each["name"]) for each in graph[side]}
        for side in ("inputs", "outputs")
    ]
    if backend == REFERENCE_EVALUATOR:
        answers = _evaluated(folder.onnx(name), arrays[0])
    else:
        answers = load_graph(folder, name, backend)(arrays[0])
    differences = [answer.astype(np.float64) - exact for answer, exact in zip(answers, arrays[1].values())]
    limits = entry(graph, "tolerance", kind=dict)
    return Check(
        graph=name,
        backend=backend,
        precision=graph["precision"],
        max_abs=max(float(np.abs(each).max()) for each in differences),
        psnr=min(psnr(answer, exact) for answer, exact in zip(answers, arrays[1].values())),
        limit_abs=float(limits["max_abs"]),
        limit_psnr=float(limits["psnr"]),
    )


def _evaluated(model: bytes, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    onnx = import_backend("onnx")
    import_backend("onnx.reference")
    from .reference_evaluator import evaluate

    return list(evaluate(onnx.load_from_string(model), inputs).values())


def _array(reference: dict[str, np.ndarray], prefix: str, name: str) -> np.ndarray:
    if f"{prefix}.{name}" not in reference:
        raise BundleError(f"reference.npz has no {prefix}.{name}; export the bundle again")
    return reference[f"{prefix}.{name}"]


def _line(check: Check) -> str:
    return f"{'ok  ' if check.passed else 'FAIL'} {check.graph:24} {check.backend:15} {_metrics(check)}"


def _metrics(check: Check) -> str:
    return (
        f"max abs {check.max_abs:.1e} (at most {check.limit_abs:.1e}), "
        f"PSNR {check.psnr:.1f} dB (at least {check.limit_psnr:.1f})"
    )
