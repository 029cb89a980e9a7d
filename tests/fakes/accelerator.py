"""An accelerator of host memory: to PyTorch a device like any other, that notes what crosses its border.

Its tensors hold one on the CPU, which does the work. As on a real one, tensors of different devices do not go
together, and the host is kept waiting by whoever reads values back, copies without ``non_blocking``, or asks for
shapes that depend on values. Once it is plugged in, a process has it to its end: it is for processes of their own.
"""

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate.state import PartialState
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretended"
_PACKAGES = ("mnif", "latent_prior", "evals", "export")
_aten = torch.ops.aten
# Operators whose results the host must see before it can go on: values, or shapes that depend on them.
_READ = {
    _aten._local_scalar_dense,
    _aten.item,
    _aten.is_nonzero,
    _aten.equal,
    _aten.nonzero,
    _aten.masked_select,
    _aten._unique2,
    _aten.unique_dim,
    _aten.unique_consecutive,
    _aten.bincount,
}
# What PyTorch makes by having an empty tensor grow, which ours do not.
_GROWN = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "linspace", "randperm", "randperm.generator")
_INDEXED = {_aten.index, _aten.index_put_, _aten.index_put, _aten._index_put_impl_}

_libraries: list[torch.library.Library] = []  # what they register goes when they do

crossings: Counter[str] = Counter()
"""How often what has crossed: "upload" or "wait", and the place in our code that made it."""


class Pretended(torch.Tensor):
    """A tensor of the accelerator; ``held`` is what it holds, on the CPU."""

    held: torch.Tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Pretended":
        options: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        options |= {"dtype": held.dtype, "device": torch.device(NAME, 0)}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **options)  # type: ignore[attr-defined]

    def __init__(self, held: torch.Tensor):
        self.held = held

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def storage(self) -> Any:
        return self.held.storage()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return _run(operator, *arguments, **(options or {}))


def plug_in() -> None:
    """Gives this process the accelerator, for PyTorch and for Accelerate."""
    _setup_privateuseone_for_python_backend(NAME)
    everything, made = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    _libraries.extend((everything, made))
    everything.fallback(_run, "PrivateUse1")
    for name in _GROWN:
        packet, _, overload = name.partition(".")
        made.impl(name, partial(_run, getattr(getattr(_aten, packet), overload or "default")), "PrivateUse1")
    PartialState.default_device = property(lambda self: torch.device(NAME, 0))
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _made_on_the_cpu(getattr(torch, name)))
    torch.Tensor.new_tensor = lambda self, data, **given: torch.tensor(
        data, **{"dtype": self.dtype, "device": self.device} | given
    )


def _made_on_the_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes a tensor of numbers where they are, and copies it, as PyTorch does for other devices."""

    def made(data: Any, *arguments: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if isinstance(data, Pretended):
            return data.to(device or data.device, **{"dtype": options.get("dtype")})
        found = make(data, *arguments, **options)
        return found if device is None else found.to(device)

    return made


def _run(operator: Any, *arguments: Any, **options: Any) -> Any:
    """Does an operator's work on the CPU."""
    leaves = [leaf for leaf in tree_flatten((arguments, options))[0] if isinstance(leaf, torch.Tensor)]
    ours = [leaf for leaf in leaves if isinstance(leaf, Pretended)]
    wanted, packet = options.get("device"), operator.overloadpacket
    if wanted is not None:
        options["device"] = torch.device("cpu")
        options.pop("pin_memory", None)
    there = torch.device(wanted).type == NAME if wanted is not None else bool(ours)
    _note(packet, arguments, options, leaves, ours, there)
    held, held_options = tree_map_only(Pretended, lambda tensor: tensor.held, (arguments, options))
    found = operator(*held, **held_options)
    if not there:
        return found
    known = {id(tensor.held): tensor for tensor in ours}  # what works in place gives back what it was given

    def given(tensor: torch.Tensor) -> torch.Tensor:
        return known[id(tensor)] if id(tensor) in known else Pretended(tensor)

    return tree_map_only(torch.Tensor, given, found)


def _note(packet: Any, arguments: Any, options: Any, leaves: list, ours: list, there: bool) -> None:
    """Notes what an operator has the host wait for, or refuses it as a device would."""
    hosts = [leaf for leaf in leaves if not isinstance(leaf, Pretended)]
    if packet in (_aten._to_copy, _aten.to, _aten.copy_):
        to_device = isinstance(arguments[0], Pretended) if packet is _aten.copy_ else there
        if to_device and hosts:
            goes_on = options.get("non_blocking") or (packet is _aten.copy_ and arguments[2:] == (True,))
            _count("upload" if goes_on else "wait", "copy to the device")
        elif ours and not to_device:
            _count("wait", "copy to the host")
        return
    if packet in _INDEXED:
        indices = [index for index in arguments[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            _count("wait", "index by a mask")
        elif any(not isinstance(index, Pretended) for index in indices):
            _count("wait", "index from the host")
        hosts = [leaf for leaf in hosts if not any(leaf is index for index in indices)]
    elif ours and (packet in _READ or (packet is _aten.repeat_interleave and "output_size" not in options)):
        _count("wait", str(packet).removeprefix("aten."))
    if ours and any(leaf.ndim for leaf in hosts):
        raise RuntimeError(f"{packet}: expected all tensors to be on the same device, {NAME} and cpu were found")


def _count(kind: str, what: str) -> None:
    crossings[f"{kind}: {what}, {_place()}"] += 1


def _place() -> str:
    """The innermost line of ours that is being run, with that of a library that it has called."""
    frame, inner = sys._getframe(1), ""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in _PACKAGES:
            return f"{module}.{frame.f_code.co_qualname}:{frame.f_lineno}{inner}"
        if not inner and module.partition(".")[0] in ("diffusers", "accelerate"):
            inner = f" in {module}.{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return "nowhere of ours"
