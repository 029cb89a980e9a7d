"""The device that a command computes on, and how tensors come there without anybody waiting.

torch is imported where it is needed: the flags of a command are read without it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mnif.utils.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class DeviceFlags:
    """Where the command computes."""

    device: str | None = None
    """Such as cpu, cuda or cuda:1; default: the accelerator if there is one, unless `accelerate launch` says --cpu."""


def default_device() -> "torch.device":
    """Where this process computes unless it is told otherwise: the accelerator if there is one, else the CPU.

    It is the CPU too where `accelerate launch` was told so, by ``--cpu`` or `accelerate config`.
    """
    import torch
    from accelerate.utils import parse_flag_from_env

    there = None if parse_flag_from_env("ACCELERATE_USE_CPU") else _accelerator()
    return torch.device("cpu") if there is None else there


def chosen_device(name: str | None) -> "torch.device":
    """Finds the device that ``--device`` names, or the default one.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    if name is None:
        return default_device()
    there = _accelerator()
    count = 0 if there is None else torch.accelerator.device_count()
    here = ["cpu", *(f"{there}:{number}" for number in range(count))]
    refusal = f"--device {name}: there is no such device here; take {' or '.join(here)}, or leave it out"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(refusal) from None
    if device.type == "cpu" and not device.index:
        return torch.device("cpu")
    if there is None or device.type != there.type or (device.index or 0) >= count:
        raise UserError(refusal)
    return device


def _accelerator() -> "torch.device | None":
    import torch

    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def memory_of(device: "torch.device") -> int:
    """The bytes of memory that an NVIDIA GPU has; 0 of other devices, which do not tell, or have no own."""
    import torch

    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def sent(tensor: "torch.Tensor", device: "torch.device | str") -> "torch.Tensor":
    """Copies a tensor to a device, by way of pinned memory to an NVIDIA GPU, without waiting for the copy.

    A tensor that is there already is given back. The device does its work in order, so whatever is made of the copy
    comes after it.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "mps")  # which may read the source when it is gone
