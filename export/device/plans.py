"""Plans on disk: ``engines/NAME.plan``, beside it ``NAME.plan.json`` (what it was built from) and ``NAME.plan.log``.

Handing a plan to TensorRT is running code, so a plan is read only if its sidecar bears this user's own seal (an HMAC
under a key that never leaves the machine), the plan is byte for byte the one that was sealed, and everything it was
built from is as it is here and now: TensorRT, GPU, driver, graph. Whatever fails is refused before TensorRT sees it.

A plan under ``engines/`` is a plain TensorRT plan: metadata in front of it would lock out trtexec and DeepStream.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from .bundle import BundleError
from .cuda import Gpu
from .files import write_atomically, write_json
from .json_files import check_form, read_json

_KEY_BYTES = 32

_SIDECAR = {"facts": dict, "report": dict, "plan": {"sha256": str, "bytes": range(1 << 40)}}


class PlanRefused(BundleError):  # noqa: N818
    """A plan that is missing, foreign, stale or changed.

    Attributes:
        reason: why, without the file's name and without what to do.
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}; build it again: mnif build, on a device python3 device/build.py")
        self.reason = reason


def environment(module: Any, gpu: Gpu | None) -> dict[str, Any]:
    """Names what a plan depends on beside its graph and flags."""
    return {
        "builder": module.__name__,
        "builder_version": module.__version__,
        "gpu": None if gpu is None else gpu.name,
        "driver": None if gpu is None else gpu.driver,
    }


def plan_key(facts: dict[str, Any]) -> str:
    """Hashes everything a plan is built from; plans of one key are interchangeable."""
    return hashlib.sha256(_canonical(facts)).hexdigest()


def write_plan(path: Path, plan: bytes, facts: dict[str, Any], report: dict[str, Any], log: list[str]) -> None:
    """Writes a plan, its log and its sealed sidecar, each whole or not at all, the sidecar last.

    Args:
        path: ``engines/NAME.plan``.
        plan: the plan.
        facts: what it was built from; the same must hold where it is read.
        report: what the build found, such as its seconds.
        log: the builder's lines.
    """
    sidecar = {
        "facts": facts,
        "key": plan_key(facts),
        "report": report,
        "plan": {"sha256": hashlib.sha256(plan).hexdigest(), "bytes": len(plan)},
    }
    sidecar["seal"] = _seal(sidecar)
    for left in path.parent.glob(".*.tmp"):  # by a build that was killed
        if re.fullmatch(re.escape(f".{path.name}") + r"(\.json|\.log)?\.\d+\.tmp", left.name):
            left.unlink()
    write_atomically(path, plan)
    write_atomically(log_path(path), "".join(line + "\n" for line in log).encode())
    write_json(sidecar_path(path), sidecar)


def read_plan(path: Path, facts: dict[str, Any]) -> bytes:
    """Reads a plan that may be handed to TensorRT.

    Args:
        path: ``engines/NAME.plan``.
        facts: what it must have been built from.

    Raises:
        PlanRefused: with the first thing that is wrong.
    """
    sidecar = read_sidecar(path)
    for name, wanted in facts.items():
        found = sidecar["facts"].get(name)
        if found != wanted:
            words = name.replace("_", " ")
            raise PlanRefused(path, f"it was built with {words} {found}, here it is {wanted}")
    try:
        plan = path.read_bytes()
    except OSError as error:
        raise PlanRefused(path, f"it cannot be read ({error.strerror})") from None
    if hashlib.sha256(plan).hexdigest() != sidecar["plan"]["sha256"]:
        raise PlanRefused(path, "it differs from what was built (SHA-256)")
    return plan


def read_sidecar(path: Path) -> dict[str, Any]:
    """Reads what a plan was built from, if the seal is this user's.

    Raises:
        PlanRefused: the sidecar is missing, no JSON, or not sealed here.
    """
    file = sidecar_path(path)
    try:
        sidecar = read_json(file)
    except OSError as error:
        raise PlanRefused(path, f"its sidecar {file.name} cannot be read ({error.strerror})") from None
    except ValueError:
        raise PlanRefused(path, f"its sidecar {file.name} is not JSON") from None
    seal = sidecar.pop("seal", None) if isinstance(sidecar, dict) else None
    if not isinstance(seal, str) or not hmac.compare_digest(seal, _seal(sidecar)):
        reason = f"its sidecar {file.name} was not written by this user on this machine, or was edited"
        raise PlanRefused(path, reason)
    try:
        check_form(sidecar, _SIDECAR, "it")
    except ValueError as error:
        raise PlanRefused(path, f"its sidecar {file.name} is of another version ({error})") from None
    return sidecar


def sidecar_path(path: Path) -> Path:
    """Names the file that says what a plan was built from."""
    return path.with_name(path.name + ".json")


def log_path(path: Path) -> Path:
    """Names the file with what the builder printed."""
    return path.with_name(path.name + ".log")


def state_folder() -> Path:
    """Finds where this user's key and timing caches lie: ``MNIF_STATE``, or ``mnif`` in the user's state folder."""
    own = os.environ.get("MNIF_STATE")
    return Path(own) if own else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "mnif"


def _seal(sidecar: dict[str, Any]) -> str:
    return hmac.new(_own_key(), _canonical(sidecar), hashlib.sha256).hexdigest()


def _own_key() -> bytes:
    """Reads this user's key, made at first use and readable by nobody else."""
    path = state_folder() / "plan.key"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent)  # readable by this user alone
            with os.fdopen(handle, "wb") as file:
                file.write(os.urandom(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was faster: its key is the key
                os.link(name, path)
            os.unlink(name)
        key = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}; plans are sealed with this key, MNIF_STATE moves it") from None
    if len(key) != _KEY_BYTES:
        raise BundleError(f"{path}: not a key; remove it and build the plans again")
    return key


def _canonical(content: dict[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True).encode()
