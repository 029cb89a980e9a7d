"""What the kernels for GPUs take of a card that need not be there: registers, what they spill, and shared memory.

    python benchmarks/kernels.py --width 64 --precision tf32 --capability 90

Triton and ptxas compile them. A spill is what does not fit into the registers of a thread, bytes that are stored and
loaded again for every block of points.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import triton
import tyro
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass
class Arguments:
    """Compile the kernels for fields of one form."""

    width: int = 64
    """Of the hidden layers."""
    depth: int = 4
    """Hidden layers after the first."""
    capability: int = 90
    """Of the card: 80 for an A100, 90 for an H100."""
    precision: Literal["tf32", "tf32x3", "bf16", "ieee"] = "tf32"
    """Of products; tf32x3 is what stands for float32."""
    alone: bool = False
    """For one field at one point, numbers that Triton knows beforehand."""


def main(arguments: Arguments) -> None:
    print(f"{'kernel':16} {'registers':>9} {'spilled, bytes':>14} {'shared, bytes':>13} {'wgmma':>6}")
    for gradients, name in enumerate(("values", "first_order", "second_order")):
        made = compiled(arguments, name, gradients)
        wgmma = made.asm["ptx"].count("wgmma.mma_async")
        registers, spilled = resources(made.asm["ptx"], arguments.capability)
        print(f"{name:16} {registers:9} {spilled:14} {made.metadata.shared:13} {wgmma:6}", flush=True)


def compiled(arguments: Arguments, name: str, gradients: int) -> Any:
    """A kernel as :mod:`mnif.models.field_triton` asks for it."""
    from mnif.models import field_triton

    sizes = (2, *[arguments.width] * (arguments.depth + 1), 3)
    rows = torch.empty(1, sum((inputs + 1) * outputs for inputs, outputs in pairwise(sizes)))
    kernel = getattr(field_triton, f"_{name}_kernel")
    constants = field_triton._options(rows, sizes, False, gradients)
    constants |= {"ERRORS": True, "PRECISION": arguments.precision}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    numbers = ("sets", "fields", "points", "weight_sets", "chunk")
    constants |= dict.fromkeys(numbers[:-1], 1) if arguments.alone else {}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    kinds = {name: "i32" if name in numbers else "*fp32" for name in kernel.arg_names}
    # Tensors begin at multiples of 16 bytes, as PyTorch makes them.
    places = [(place,) for place, name in enumerate(kernel.arg_names) if {name: "*fp32"}.items() <= kinds.items()]
    aligned = {place: [["tt.divisibility", 16]] for place in places if kernel.arg_names[place[0]] not in constants}
    signature = kinds | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", arguments.capability, 32), options=options)


def resources(ptx: str, capability: int) -> tuple[int, int]:
    """The registers of a thread, and the bytes that it stores and loads because they are too few."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(assembler), "-v", f"--gpu-name=sm_{capability}{'a' * (capability >= 90)}", file.name]
        told = subprocess.run([*command, "-o", "/dev/null"], capture_output=True, text=True, check=True).stderr
    registers, *_ = re.findall(r"Used (\d+) registers", told)
    ((stored, loaded),) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", told)
    return int(registers), int(stored) + int(loaded)


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
