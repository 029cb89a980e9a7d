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

import tyro

RUNS = 5


@dataclass
class Arguments:
    """Measure the bundle of a model folder."""

    model: Path
    """The model folder, with a prior."""
    num_baked: int = 1000
    """Of the large bundle."""


def main(arguments: Arguments) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        small, large = Path(temporary) / "small", Path(temporary) / "large"
        export = [sys.executable, "-m", "mnif", "export", "--model", str(arguments.model), "--compile_rtx", "off"]
        small_seconds, _ = measured([*export, "--output_dir", str(small), "--num_inference_steps", "1"])
        many = ["--num_baked", str(arguments.num_baked)]
        large_seconds, large_megabytes = measured([*export, "--output_dir", str(large), *many])
        sample = [sys.executable, str(small / "device/sample.py"), "--num", "1", "--backend", "onnxruntime"]
        firsts = [measured([*sample, "--output_dir", f"{temporary}/pictures"]) for _ in range(RUNS)]
        size = sum(path.stat().st_size for path in small.rglob("*") if path.is_file()) / 1e6
    first_seconds, first_megabytes = (statistics.median(column) for column in zip(*firsts, strict=True))
    print("| | seconds | peak memory, MB | on disk, MB |\n|---|---|---|---|")
    print(f"| `mnif export`, one-step sampler, 4 baked samples | {small_seconds:.1f} | – | {size:.1f} |")
    print(f"| `mnif export`, {arguments.num_baked} baked samples | {large_seconds:.1f} | {large_megabytes:.0f} | – |")
    print(f"| `device/sample.py --num 1`, ONNX Runtime | {first_seconds:.2f} | {first_megabytes:.0f} | – |")


def measured(command: list[str]) -> tuple[float, float]:
    """Seconds and peak memory in MB of a command."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
