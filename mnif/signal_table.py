"""The signals by name; a signal of one's own joins them with :func:`register_signal`."""

from importlib import import_module

from mnif.errors import UserError
from mnif.modeling import MNIFModel
from mnif.signals import Signal

_HOMES = {"image": "mnif.signals:Image", "voxels": "mnif.signals:Voxels", "radiance": "mnif.radiance:RadianceField"}
_REGISTERED: dict[str, type[Signal]] = {}


def register_signal(kind: type[Signal]) -> type[Signal]:
    """Makes a signal known by its ``name`` to every command of this process; usable as a class decorator."""
    _REGISTERED[kind.name] = kind
    return kind


def signal_class(name: str) -> type[Signal]:
    """The class of a signal.

    Raises:
        UserError: there is no such signal.
    """
    if name in _REGISTERED:
        return _REGISTERED[name]
    if name not in _HOMES:
        raise UserError(f"signal {name!r}: must be one of {', '.join(sorted({*_HOMES, *_REGISTERED}))}")
    module, _, kind = _HOMES[name].partition(":")
    return getattr(import_module(module), kind)


def signal_of_model(decoder: MNIFModel) -> Signal:
    """The signal a decoder was trained on, with its settings."""
    return signal_class(decoder.config.signal)(**decoder.config.signal_settings)
