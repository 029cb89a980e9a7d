"""What is known of a graph beside its nodes: shapes, fixed inputs with the exact answer, what each precision costs.

Exact means: the same model with the same weights, evaluated by PyTorch in float64. What float32 costs PyTorch is
measured along with it, and the tolerance of a graph grows with that. An engine runs every shape from ``minimum`` to
``maximum``, ``optimum`` fastest.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from torch import Tensor

from export.device.reference_evaluator import evaluate
from export.device.verify import peak_of, psnr
from export.graphs import Precision, Storage
from export.graphs.precision import convert, hidden_products
from mnif.utils.errors import UserError

Profile = Mapping[str, Mapping[str, Sequence[int]]]  # input → {"minimum", "optimum", "maximum"} shapes

PROFILE_SIZES = ("minimum", "optimum", "maximum")


def profile_of(model: onnx.ModelProto, **sizes: Mapping[str, int]) -> Profile:
    """Gives the dynamic axes of a graph's inputs, at each size, the lengths that stand under their names."""
    return {
        source.name: {
            size: tuple(lengths[axis.dim_param] if axis.dim_param else axis.dim_value for axis in axes_of(source))
            for size, lengths in sizes.items()
        }
        for source in model.graph.input
    }


def axes_of(tensor: onnx.ValueInfoProto) -> Sequence[onnx.TensorShapeProto.Dimension]:
    """Lists the axes of a graph's input or output."""
    return list(tensor.type.tensor_type.shape.dim)


@dataclass(frozen=True)
class GraphKind:
    """What a bundle must know of a kind of graphs.

    Attributes:
        description: for the bundle's README, which fills in {end}, {steps}, {grid} and {cells}.
        precision: which flags choose it: ``"graph"`` (--precision), ``"encoder"`` (--precision and
            --encoder_storage), ``"sampler"`` (--sampler_precision and --sampler_storage), or ``"fp32"`` for what is
            float32 alone.
        served: it has a dynamic batch and becomes a model in Triton's repository.
    """

    description: str
    precision: Literal["graph", "encoder", "sampler", "fp32"] = "graph"
    served: bool = False

    def described(self, manifest: Mapping[str, Any], graphs: Iterable[Mapping[str, Any]]) -> str:
        """Fills in the description from a manifest, and from its entries of the graphs that it is about."""
        grid, steps = manifest["grid"], dict[str, list[str]]()
        for graph in graphs:
            if graph["steps"] is not None and str(graph["steps"]) not in steps.setdefault(graph["scheduler"], []):
                steps[graph["scheduler"]].append(str(graph["steps"]))
        return self.description.format(
            steps=", ".join(f"{' or '.join(counts)} steps of {scheduler}" for scheduler, counts in steps.items()),
            end="coefficients" if manifest["radiance"] else "values on the grid",
            grid=" × ".join(map(str, grid["resolution"])),
            cells=grid["cells"] ** grid["dimensions"],
        )


KINDS = {
    "sampler": GraphKind("standard normal noise to {end}, {steps} unrolled.", precision="sampler", served=True),
    "decoder": GraphKind("mixture coefficients to values on the grid, {grid} points.", served=True),
    "encoder": GraphKind(
        "an observation at the training resolution, and where it was seen, to its latent, its mixture coefficients, "
        "the fields baked of these, and the mean squared error of what they show: of each of {cells} cell(s), and of "
        "the whole.",
        precision="encoder",
        served=True,
    ),
    "rays": GraphKind(
        "origins and directions (of length one) to colours, in world coordinates, the volume rendering inside."
    ),
    "points": GraphKind("points of the world to colours and densities."),
    # A browser computes in float32.
    "prior": GraphKind(
        "standard normal noise to the coefficients that *field* takes, for the page in browser/.",
        precision="fp32",
    ),
    "field": GraphKind(
        "coefficients and coordinates (as *baked* has them) to every cell's values, likewise.", precision="fp32"
    ),
    "baked": GraphKind(
        "one instance as {cells} coordinate network(s), one per cell, at any resolution. Each cell is asked at "
        "its own coordinates, [-1, 1] across the cell; `device/` lays out the points and blends neighbouring cells."
    ),
}
"""Every kind of graphs, in the order of the README; the manifest and :mod:`export.device` know them by these names."""

REFERENCED_BAKED = 8  # baked graphs that have a reference; the others are the same graph with other numbers


@dataclass(frozen=True)
class Reference:
    """What a graph must answer.

    Attributes:
        prefix: of the arrays' names in reference.npz.
        inputs: for each input a value, float32.
        outputs: for each output the exact answer, float64.
        float32_error: the largest difference of PyTorch in float32 to it.
        limits: the least and the largest tolerance. The largest stays below half a step of an 8-bit pixel.
    """

    prefix: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    float32_error: float
    limits: tuple[float, float] = (1e-5, 2e-4)

    @property
    def tolerance(self) -> float:
        """The largest absolute difference allowed to a float32 graph: four times what float32 costs PyTorch here."""
        return float(np.clip(4 * self.float32_error, *self.limits))


@dataclass(frozen=True)
class GraphSpec:
    """One graph in float32 and what it must answer.

    Attributes:
        name: ``"decoder"``, ``"sampler_4"``, ``"baked_0000"``, ...
        kind: one of :data:`KINDS`.
        model: the graph.
        profile: the shapes to build an engine for.
        reference: what it must answer; None for baked graphs after the first few.
        steps: of a sampler.
        scheduler: of a sampler, the class of diffusers.
        instance: what is baked, as the manifest has it.
    """

    name: str
    kind: str
    model: onnx.ModelProto
    profile: Profile
    reference: Reference | None
    steps: int | None = None
    scheduler: str | None = None
    instance: dict[str, Any] | None = None


def reference_of(
    prefix: str,
    inputs: Mapping[str, np.ndarray],
    exact: Mapping[str, Tensor],
    single: Mapping[str, Tensor],
    limits: tuple[float, float] = (1e-5, 2e-4),
) -> Reference:
    """Makes a reference from PyTorch's answers in float64 and in float32.

    Raises:
        UserError: the two differ by more than any tolerance, or are no numbers.
    """
    error = max(float((exact[name] - single[name]).abs().max()) for name in exact)
    if not error <= limits[1]:  # NaN is refused too
        raise UserError(
            f"{prefix}: PyTorch in float32 differs from float64 by {error:.1e}, more than {limits[1]:.0e}; nothing "
            "was written; try another --seed or fewer --num_inference_steps, and check that training did not diverge"
        )
    outputs = {name: answer.numpy() for name, answer in exact.items()}
    return Reference(prefix, dict(inputs), outputs, error, limits)


_WORST = 30.0  # dB; a graph in fewer bits that comes out below is of no use

_DEVICES_DIFFER = 3.0  # dB that another device may lose by the order in which it adds

_FINEST = 100.0  # dB; no backend is asked for more


@dataclass(frozen=True)
class GraphVariant:
    """A graph as one file of a bundle has it.

    Attributes:
        name: the spec's, with the precision behind it unless that is fp32.
        spec: the graph in float32.
        precision: of this variant.
        storage: of its large matrices.
        model: the graph.
        half: names of the nodes that multiply in float16.
        psnr: dB against float64, in the graph's own precision; None without a reference.
        error: the largest absolute difference to float64; None without a reference.
        tolerance: {"max_abs", "psnr"} for every backend; None without a reference.
    """

    name: str
    spec: GraphSpec
    precision: Precision
    storage: Storage
    model: onnx.ModelProto
    half: list[str]
    psnr: float | None = None
    error: float | None = None
    tolerance: dict[str, float] | None = None


def make_variants(
    spec: GraphSpec, precisions: Sequence[Precision], storage: Storage | None = None
) -> Iterator[GraphVariant]:
    """Yields a graph in several precisions, with its large matrices in ``storage``; None stores what is multiplied.

    With a reference, each is checked and measured. Without one (further baked graphs, which differ from the first in
    their numbers alone), only that the numbers are finite.

    Raises:
        UserError: a graph misses its tolerance, or holds what is not a number.
    """
    for precision in precisions:
        name = spec.name if precision == "fp32" else f"{spec.name}_{precision}"
        kept = storage or ("fp32" if precision == "fp32" else "fp16")
        model = convert(spec.model, precision, kept)
        half = hidden_products(model) if precision == "mixed" else []
        if spec.reference is None:
            _check_finite(name, model)
            yield GraphVariant(name, spec, precision, kept, model, half)
            continue
        onnx.checker.check_model(model, full_check=True)
        measured = _measure(name, model, spec.reference, precision, kept)
        yield GraphVariant(name, spec, precision, kept, model, half, *measured)


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a graph in ONNX Runtime on the CPU and returns its outputs by name."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _measure(
    name: str, model: onnx.ModelProto, reference: Reference, precision: Precision, storage: Storage
) -> tuple[float, float, dict[str, float]]:
    """Measures a graph against its reference: PSNR in dB, the largest difference, and the tolerance."""
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
            "mixed precision and with --sampler_storage and --encoder_storage fp32"
        )
    least = min(quality - _DEVICES_DIFFER, _FINEST)
    return quality, error, {"max_abs": 4 * error + reference.tolerance, "psnr": least}


def _check_finite(name: str, model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if not np.isfinite(numpy_helper.to_array(tensor)).all():
            raise UserError(f"{name}: weights that are no finite numbers; nothing was written")
