"""What a bundle costs: seconds to export it, its size, and a device's way from start to first picture.

    python benchmarks/bundle.py --model runs/demo/model

Every figure is a process of its own. The first picture is `device/sample.py --num 1` in ONNX Runtime, from the start
of Python to its end; medians of five.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

RUNS = 5


@dataclass
class Arguments:
    """Measure the bundle of a model folder."""

    model: Path
    """The model folder, with a prior."""
    num_baked: int = 1000
    """Of the large bundle."""


class Costs(NamedTuple):
    """Of a process: seconds from start to end, seconds of processor (all cores), the most memory it held."""

    seconds: float
    processor_seconds: float
    megabytes: float


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        export = [sys.executable, "-m", "mnif", "export", "--model", str(arguments.model), "--compile_rtx", "off"]
        few = measured([*export, "--output_dir", str(small), "--num_inference_steps", "1"])
        many = measured([*export, "--output_dir", str(large), "--num_baked", str(arguments.num_baked)])
        sample = [sys.executable, str(small / "device/sample.py"), "--num", "1", "--backend", "onnxruntime"]
        firsts = [measured([*sample, "--output_dir", f"{temporary}/pictures"]) for _ in range(RUNS)]
        size = sum(path.stat().st_size for path in small.rglob("*") if path.is_file()) / 1e6
    first = Costs(*(statistics.median(column) for column in zip(*firsts, strict=True)))
    print(f"the first bundle takes {size:.1f} MB\n\n| | seconds | of processor | peak memory, MB |\n|---|---|---|---|")
    for name, costs in (
        ("`mnif export`, one-step sampler, 4 baked samples", few),
        (f"`mnif export`, {arguments.num_baked} baked samples", many),
        ("`device/sample.py --num 1`, ONNX Runtime", first),
    ):
        print(f"| {name} | {costs.seconds:.2f} | {costs.processor_seconds:.2f} | {costs.megabytes:.0f} |")


def measured(command: list[str]) -> Costs:
    """Runs a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    processor_seconds = usage.ru_utime + usage.ru_stime
    return Costs(time.perf_counter() - started, processor_seconds, usage.ru_maxrss * 1024 / 1e6)


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
