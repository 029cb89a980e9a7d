"""The compile gate: TensorRT-RTX compiles a graph on a machine without a GPU.

It shows that NVIDIA's parser and kernel generator take a graph whole, with its dynamic axis and with TF32 off. It is
**not a Jetson build**: TensorRT-RTX makes code for desktop GPUs (compute capability 8.0 and up, neither Orin's 8.7
nor Thor's 11.0). The plan is measured and thrown away; engines for a device are built on the device.
"""

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from mnif.errors import UserError


@dataclass(frozen=True)
class Profile:
    """The shapes an engine is built for: every shape from ``minimum`` to ``maximum`` runs, ``optimum`` fastest.

    Attributes:
        input: name of the graph's input.
        minimum, optimum, maximum: shapes that differ in the dynamic axis alone.
    """

    input: str
    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]


@dataclass(frozen=True)
class CompileReport:
    """What the gate found.

    Attributes:
        version: of TensorRT-RTX.
        compute_capabilities: the GPUs compiled for, all in one plan, such as ``"SM86"``.
        seconds: from parsing to plan.
        plan_bytes: size of the plan.
    """

    version: str
    compute_capabilities: list[str]
    seconds: float
    plan_bytes: int


def rtx_is_installed() -> bool:
    """Whether the package ``tensorrt_rtx`` can be imported here."""
    return _tensorrt_rtx() is not None


def compile_with_rtx(onnx_path: Path, profile: Profile) -> CompileReport:
    """Compiles one graph for all GPUs that TensorRT-RTX knows and that multiply matrices in float32.

    Args:
        onnx_path: the graph.
        profile: the shapes of its input.

    Raises:
        UserError: tensorrt_rtx is not installed, or it refuses the graph; the message has its first complaint.
    """
    rtx = _tensorrt_rtx()
    if rtx is None:
        raise UserError("the compile gate needs TensorRT-RTX; pip install 'mnif-diffusion[rtx]' or --compile_rtx off")
    logger = _logger()
    logger.complaints.clear()
    started = time.perf_counter()
    builder = rtx.Builder(logger)
    network = builder.create_network(0)
    parser = rtx.OnnxParser(network, logger)
    plan = None
    if parser.parse(onnx_path.read_bytes()):
        # A timing cache would ask for a GPU, so none is attached.
        config = builder.create_builder_config()
        config.clear_flag(rtx.BuilderFlag.TF32)
        capabilities = _capabilities(rtx)
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(rtx.ComputeCapability, name), index)
        shapes = builder.create_optimization_profile()
        shapes.set_shape(profile.input, profile.minimum, profile.optimum, profile.maximum)
        config.add_optimization_profile(shapes)
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = logger.complaints[0] if logger.complaints else "it gives no reason"
        raise UserError(f"{onnx_path.name}: TensorRT-RTX {rtx.__version__} refuses the graph: {reason}")
    return CompileReport(rtx.__version__, capabilities, time.perf_counter() - started, plan.nbytes)


def _tensorrt_rtx() -> ModuleType | None:
    try:
        import tensorrt_rtx
    except ImportError:
        return None
    return tensorrt_rtx


def _capabilities(rtx: ModuleType) -> list[str]:
    """All but Turing (SM75), which has no float32 matrix product there."""
    names = [name for name in rtx.ComputeCapability.__members__ if name.startswith("SM") and name != "SM75"]
    return sorted(names, key=lambda name: int(name[2:]))


@lru_cache(maxsize=1)
def _logger() -> Any:
    """TensorRT-RTX keeps the first logger of a process for good, so there is one for all builds."""
    rtx: Any = _tensorrt_rtx()

    class Logger(rtx.ILogger):
        """Keeps errors for the one line a user is shown."""

        def __init__(self) -> None:
            rtx.ILogger.__init__(self)
            self.complaints: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (rtx.ILogger.ERROR, rtx.ILogger.INTERNAL_ERROR):
                self.complaints.append(" ".join(message.split()))

    return Logger()
