"""A graph in each precision asked for: checked by ONNX's rules, run on its reference, measured against float64."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from export.graphs.cases import GraphCase, Reference
from export.graphs.precision import Precision, Storage, hidden_products, variant
from export.quality import peak_of, psnr
from export.reference_evaluator import evaluate
from mnif.errors import UserError

_WORST = 30.0  # dB; a graph in fewer bits that comes out below is of no use
_DEVICES_DIFFER = 3.0  # dB that another device may lose by the order in which it adds
_FINEST = 100.0  # dB; no backend is asked for more


@dataclass(frozen=True)
class Variant:
    """One file of a bundle.

    Attributes:
        name: the case's, with the precision behind it unless that is fp32.
        case: the graph in float32.
        precision: of this variant.
        storage: of its large matrices.
        model: the graph.
        half: names of the nodes that multiply in float16.
        psnr: dB against float64, in the graph's own precision; None without a reference.
        error: the largest absolute difference to float64; None without a reference.
        tolerance: {"max_abs", "psnr"} for every backend; None without a reference.
    """

    name: str
    case: GraphCase
    precision: Precision
    storage: Storage
    model: onnx.ModelProto
    half: list[str]
    psnr: float | None = None
    error: float | None = None
    tolerance: dict[str, float] | None = None


def variants(case: GraphCase, precisions: Sequence[Precision], storage: Storage | None = None) -> Iterator[Variant]:
    """One graph in several precisions, with its large matrices in ``storage``; None stores what is multiplied.

    With a reference, each is checked and measured. Without one (further baked graphs, which differ from the first in
    their numbers alone), only that the numbers are finite.

    Raises:
        UserError: a graph misses its tolerance, or holds what is not a number.
    """
    for precision in precisions:
        name = case.name if precision == "fp32" else f"{case.name}_{precision}"
        kept = storage or ("fp32" if precision == "fp32" else "fp16")
        model = variant(case.model, precision, kept)
        half = hidden_products(model) if precision == "mixed" else []
        if case.reference is None:
            _check_finite(name, model)
            yield Variant(name, case, precision, kept, model, half)
            continue
        onnx.checker.check_model(model, full_check=True)
        measured = _measured(name, model, case.reference, precision, kept)
        yield Variant(name, case, precision, kept, model, half, *measured)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A graph's outputs by ONNX Runtime on the CPU."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _measured(
    name: str, model: onnx.ModelProto, reference: Reference, precision: Precision, storage: Storage
) -> tuple[float, float, dict[str, float]]:
    """PSNR, largest difference, tolerance."""
    answers = (run if precision == "fp32" else evaluate)(model, reference.inputs)
    exact = reference.outputs
    error = max(float(np.abs(answers[output] - exact[output]).max()) for output in exact)
    quality = min(psnr(answers[output], exact[output]) for output in exact)
    if precision == storage == "fp32":
        if not error <= reference.tolerance:  # NaN is refused too
            raise UserError(
                f"{name}: ONNX Runtime differs from PyTorch in float64 by {error:.1e}, more than "
                f"{reference.tolerance:.0e}; nothing was written; this is a fault of mnif, please report it"
            )
        peak = max(peak_of(values) for values in exact.values())
        least = min(20 * np.log10(peak / reference.tolerance), _FINEST)
        return quality, error, {"max_abs": reference.tolerance, "psnr": float(least)}
    if not quality >= _WORST:
        raise UserError(
            f"{name}: {quality:.1f} dB against float64, less than {_WORST:.0f}; nothing was written; export without "
            "mixed precision and with sampler storage fp32"
        )
    least = min(quality - _DEVICES_DIFFER, _FINEST)
    return quality, error, {"max_abs": 4 * error + reference.tolerance, "psnr": least}


def _check_finite(name: str, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise UserError(f"{name}: weights that are no finite numbers; nothing was written")
