"""The compile gate: TensorRT-RTX compiles a graph on a machine without a GPU.

It shows that NVIDIA's parser and kernel generator take a graph whole, with its dynamic axis and with TF32 off. It is
**not a Jetson build**: TensorRT-RTX makes code for desktop GPUs (compute capability 8.0 and up, neither Orin's 8.7
nor Thor's 11.0). The plan is measured and thrown away; engines for a device are built on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.device.bundle import BundleError
from export.device.tensorrt import build_plan, compute_capabilities, find_builder
from mnif.utils.errors import UserError


@dataclass(frozen=True)
class CompileReport:
    """What the gate found.

    Attributes:
        version: of TensorRT-RTX.
        compute_capabilities: the GPUs compiled for, all in one plan, such as ``"8.6"``.
        seconds: from parsing to plan.
        plan_bytes: size of the plan.
    """

    version: str
    compute_capabilities: list[str]
    seconds: float
    plan_bytes: int


def rtx_is_installed() -> bool:
    """Whether the package ``tensorrt_rtx`` can be imported here."""
    try:
        find_builder("tensorrt_rtx")
    except BundleError:
        return False
    return True


def compile_with_rtx(onnx_path: Path, profile: Mapping[str, Mapping[str, Sequence[int]]]) -> CompileReport:
    """Compiles one graph for all GPUs that TensorRT-RTX knows and that multiply matrices in float32.

    Args:
        onnx_path: the graph.
        profile: input → {"minimum", "optimum", "maximum"} shapes.

    Raises:
        UserError: tensorrt_rtx is not installed, or it refuses the graph; the message has its first complaint.
    """
    try:
        module = find_builder("tensorrt_rtx")
    except BundleError:
        raise UserError(
            "the compile gate needs TensorRT-RTX; pip install 'mnif-diffusion[rtx]' or --compile_rtx off"
        ) from None
    targets = compute_capabilities(module)
    try:
        plan = build_plan(module, onnx_path.read_bytes(), [profile], compute_capabilities=targets)
    except BundleError as error:
        raise UserError(f"{onnx_path.name}: {error}") from None
    return CompileReport(module.__version__, targets, plan.seconds, len(plan.content))
