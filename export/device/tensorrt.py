"""ONNX → plan with TensorRT 8.5 to 11 or TensorRT-RTX: one path that follows each version's rules.

Precision belongs to the graph: its Cast nodes say what is float16. TensorRT 10 is told to take types as they are
(STRONGLY_TYPED), 11 and RTX know nothing else. TensorRT 8 picks types by speed unless it is held: there the layers
that multiply in float16 are named one by one, every other arithmetic layer is held to float32, and the constraints
are to be obeyed. TF32 is off everywhere.
"""

from __future__ import annotations

import re
import time
from functools import lru_cache
from types import ModuleType
from typing import Any, Mapping, NamedTuple, Sequence

from .bundle import BackendMissing, BundleError, import_backend

Profile = Mapping[str, Mapping[str, Sequence[int]]]  # input → {"minimum", "optimum", "maximum"} shapes

MODULES = ("tensorrt", "tensorrt_rtx")

_OLDEST = (8, 5)


# What a type may be set for; shapes, casts, constants and indices keep their own.
_ARITHMETIC = ("MATRIX_MULTIPLY", "FULLY_CONNECTED", "ELEMENTWISE", "UNARY", "ACTIVATION", "REDUCE")


class Plan(NamedTuple):
    """A built engine.

    Attributes:
        content: the plan, bytes to be written as they are.
        log: what the builder said, line by line.
        seconds: from parsing to plan.
        settings: what it was built with, for the sidecar.
        timing_cache: to be kept for the next build on this device; None where none was used.
    """

    content: bytes
    log: list[str]
    seconds: float
    settings: dict[str, Any]
    timing_cache: bytes | None


def find_builder(wanted: str = "auto") -> ModuleType:
    """Imports TensorRT's module.

    Args:
        wanted: ``"tensorrt"``, ``"tensorrt_rtx"``, or ``"auto"`` for the first of them that is installed.

    Raises:
        BackendMissing: it is not installed, cannot be imported, or is older than 8.5.
    """
    reasons = []
    for name in MODULES if wanted == "auto" else (wanted,):
        try:
            return _usable(import_backend(name))
        except BackendMissing as reason:
            reasons.append(str(reason))
    raise BackendMissing(
        f"{'; '.join(reasons)}; JetPack brings tensorrt (python3-libnvinfer), on a desktop pip install tensorrt-rtx"
    )


def _usable(module: ModuleType) -> ModuleType:
    """Gives the module back if it can build plans; raises BackendMissing if it cannot."""
    if not hasattr(module, "Builder"):  # the package index has empty shells of plain TensorRT
        raise BackendMissing(f"{module.__name__} is an empty shell without TensorRT's libraries")
    if not is_rtx(module) and version_of(module) < _OLDEST:
        raise BackendMissing(f"TensorRT {module.__version__}: 8.5 or newer is needed (JetPack 5.1)")
    return module


def is_rtx(module: Any) -> bool:
    """Whether a module is TensorRT-RTX, which builds without a GPU and not for a Jetson."""
    return str(module.__name__).startswith("tensorrt_rtx")


def version_of(module: Any) -> tuple[int, int]:
    """Reads a module's major and minor version."""
    found = re.match(r"(\d+)\.(\d+)", str(module.__version__))
    if found is None:
        raise BundleError(f"{module.__name__} has a version that cannot be read: {module.__version__}")
    return int(found.group(1)), int(found.group(2))


def build_plan(
    module: Any,
    model: bytes,
    profiles: Sequence[Profile],
    half: Sequence[str] = (),
    optimization_level: int | None = None,
    timing_cache: bytes | None = None,
    compute_capabilities: Sequence[str] = (),
) -> Plan:
    """Builds one graph.

    Args:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        model: the graph's file.
        profiles: the optimisation profiles.
        half: names of the nodes that multiply in float16; only TensorRT 8 has to be told.
        optimization_level: of the builder; None leaves it to TensorRT.
        timing_cache: of an earlier build on this device, empty for a new one; None for none at all. A timing cache
            makes the builder look for a GPU, and TensorRT-RTX keeps none: there it must be None.
        compute_capabilities: of the GPUs to build for, such as ``"8.6"``; TensorRT-RTX alone takes them.

    Raises:
        BundleError: TensorRT refuses; the line has its first complaint.
    """
    logger = builder_logger(module)
    logger.lines.clear()
    logger.complaints.clear()
    started = time.perf_counter()
    builder = _builder(module, logger)
    strong = is_rtx(module) or version_of(module)[0] >= 10
    network = builder.create_network(_network_flags(module))
    parser = module.OnnxParser(network, logger)
    if not parser.parse(model):
        raise BundleError(f"{_name(module)} cannot read the graph: {_complaint(parser, logger)}")
    config = builder.create_builder_config()
    flags = _set_precision(module, network, config, half, strong)
    _set_effort(module, config, optimization_level)
    if compute_capabilities:
        _set_targets(module, config, compute_capabilities)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, sizes in profile.items():
            shapes.set_shape(name, *[tuple(sizes[key]) for key in ("minimum", "optimum", "maximum")])
        config.add_optimization_profile(shapes)
    if timing_cache is not None:
        config.set_timing_cache(config.create_timing_cache(timing_cache), False)
    content = builder.build_serialized_network(network, config)
    if content is None:
        raise BundleError(f"{_name(module)} cannot build the graph: {_complaint(parser, logger)}")
    kept = bytes(config.get_timing_cache().serialize()) if timing_cache is not None else None
    settings = {
        "typing": "strong" if strong else "constraints",
        "flags": flags,
        "tf32": False,
        "optimization_level": optimization_level,
    }
    return Plan(bytes(content), list(logger.lines), time.perf_counter() - started, settings, kept)


def _network_flags(module: Any) -> int:
    """TensorRT 8 knows batches as an axis only when told so; 10 takes types as they are only when told so."""
    flags = module.NetworkDefinitionCreationFlag
    if is_rtx(module) or version_of(module)[0] >= 11:
        return 0
    return 1 << int(flags.STRONGLY_TYPED if version_of(module)[0] >= 10 else flags.EXPLICIT_BATCH)


def _set_precision(module: Any, network: Any, config: Any, half: Sequence[str], strong: bool) -> list[str]:
    """Holds types to the graph's; returns the builder flags that were set."""
    config.clear_flag(module.BuilderFlag.TF32)
    if strong:
        return []
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    # Matrices stored in int8 are widened by the graph; TensorRT 8 takes such a graph only with the flag.
    flags = ["INT8"] if any(layer.type == module.LayerType.DEQUANTIZE for layer in layers) else []
    flags += ["FP16", "OBEY_PRECISION_CONSTRAINTS"] if half else []
    for name in flags:
        config.set_flag(getattr(module.BuilderFlag, name))
    arithmetic = [getattr(module.LayerType, name) for name in _ARITHMETIC]
    for layer in layers if half else []:
        if layer.type not in arithmetic or layer.get_output(0).dtype not in (module.float32, module.float16):
            continue
        kind = module.float16 if layer.name in half else module.float32
        layer.precision = kind
        for output in range(layer.num_outputs):
            layer.set_output_type(output, kind)
    return flags


def _set_effort(module: Any, config: Any, level: int | None) -> None:
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if level is None:
        return
    if not is_rtx(module) and version_of(module) < (8, 6):
        raise BundleError(f"TensorRT {module.__version__} has no optimisation levels (8.6 and newer do)")
    config.builder_optimization_level = level


def _set_targets(module: Any, config: Any, wanted: Sequence[str]) -> None:
    """Builds for GPUs by their compute capabilities, such as "8.6"."""
    if not is_rtx(module):
        raise BundleError("TensorRT builds for the GPU of this machine; only TensorRT-RTX takes compute capabilities")
    known = compute_capabilities(module)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise BundleError(
            f"TensorRT-RTX {module.__version__} does not build for {', '.join(unknown)}; it knows {', '.join(known)}"
        )
    config.num_compute_capabilities = len(wanted)
    for index, name in enumerate(wanted):
        config.set_compute_capability(getattr(module.ComputeCapability, "SM" + name.replace(".", "")), index)


def compute_capabilities(module: Any) -> list[str]:
    """Lists the GPUs TensorRT-RTX builds for, such as ``"8.6"``, but Turing's 7.5: no float32 product there."""
    numbers = sorted(int(name[2:]) for name in module.ComputeCapability.__members__ if name.startswith("SM"))
    return [f"{number // 10}.{number % 10}" for number in numbers if number != 75]


def _builder(module: Any, logger: Any) -> Any:
    """Makes a builder; without a GPU some versions raise and others give None."""
    reason = "it gives no reason"
    try:
        builder = module.Builder(logger)
    except (RuntimeError, TypeError) as error:
        builder, reason = None, " ".join(str(error).split())
    if builder is None:
        raise BundleError(f"TensorRT finds no GPU it can build for: {(logger.complaints or [reason])[0]}")
    return builder


def _name(module: Any) -> str:
    return f"{'TensorRT-RTX' if is_rtx(module) else 'TensorRT'} {module.__version__}"


def _complaint(parser: Any, logger: Any) -> str:
    if logger.complaints:
        return str(logger.complaints[0])
    return " ".join(str(parser.get_error(0).desc()).split()) if parser.num_errors else "it gives no reason"


@lru_cache(maxsize=None)
def builder_logger(module: Any) -> Any:
    """Makes the one logger of a module: TensorRT keeps the first one of a process for good."""

    class Logger(module.ILogger):
        """Keeps what is said, errors apart for the one line a user is shown."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.lines: list[str] = []
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.complaints.append(" ".join(message.split()))

    return Logger()


_KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?Metadata: (?P<nodes>.*)"
)

_PROFILE = re.compile(r"_myl(\d+)_\d+$")

_TYPE = re.compile(r"Datatype: (\w+)")

_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")

_NO_WORK = "shape_call"  # works sizes out on the host


class Kernel(NamedTuple):
    """A kernel, which one launch runs.

    Attributes:
        profile: number of the optimisation profile it belongs to; each has kernels of its own.
        name: the compiler's.
        kind: ``"gemm"``, ``"kgen"`` (generated, elementwise), ``"runtime_fusion"`` (a product with what follows), ...
        inputs: types of what it reads, constants last: ``"Float"``, ``"Half"``, ...
        outputs: types of what it writes.
        nodes: names of the graph's nodes it does.
    """

    profile: int
    name: str
    kind: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[str]


def kernels_of_log(lines: Sequence[str]) -> list[Kernel]:
    """Reads the kernels of an engine in the order of their launch; none if the builder did not print them."""
    kernels = []
    for line in "\n".join(lines).split("\n"):
        found = _KERNEL.match(line)
        if found is not None and found["kind"] != _NO_WORK:
            types = [_TYPE.findall(found[part]) for part in ("inputs", "constants", "outputs")]
            nodes = _NODE.findall(found["nodes"])
            profile = _PROFILE.search(found["name"])
            number = int(profile.group(1)) if profile else 0
            kernels.append(Kernel(number, found["name"], found["kind"], types[0] + types[1], types[2], nodes))
    return kernels
