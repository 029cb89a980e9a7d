"""Where a page's figures come from: the machine, the versions, the commit, and the commands."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import torch

from mnif.training.run_record import read_run_record
from mnif.utils import __version__
from mnif.utils.json_files import read_json
from mnif.utils.process import command_line

_PACKAGES = ("torch", "diffusers", "accelerate", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")


def provenance() -> dict[str, str]:
    """Lists machine, mnif with its commit if it is a checkout, Python and the packages that figures depend on."""
    found = {"machine": _machine(), "mnif": __version__, "Python": platform.python_version()}
    if commit := _commit():
        found["mnif"] += f", commit {commit}"
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [_processor(), f"{os.cpu_count()} cores", f"{memory:.0f} GiB", f"{platform.system()} {platform.machine()}"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def _processor() -> str:
    """Reads the processor's name where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or "unknown processor"


def _commit() -> str:
    """Names the commit of the checkout that this file lies in, with "+" if it was changed; "" if it is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit.stdout.strip() + ("+" if changed else "")


class _Commanded(msgspec.Struct):
    """A file that says by which command it was made."""

    command: str = ""


def commands_of(run: Path, *files: Path) -> list[str]:
    """Lists the commands that made a run and other files that say so, in order, and the one that runs now."""
    record = read_run_record(run)
    commands = [record[stage].command for stage in ("fit", "grow", "prior", "distill") if stage in record]
    commands += [read_json(path, _Commanded).command for path in files if path.exists()]
    return [*filter(None, commands), command_line()]
