"""Mixtures of neural implicit functions: bases, latents, and the fields they make (stage one)."""

from typing import TYPE_CHECKING, Any

from mnif.utils import __version__

if TYPE_CHECKING:
    from pathlib import Path

    from mnif.latents.table import LatentTable
    from mnif.models.mnif_model import MNIFModel
    from mnif.models.siren import BakedField
    from mnif.signals.base import Signal
    from mnif.signals.registry import register_signal

__all__ = [
    "BakedField",
    "LatentTable",
    "MNIFModel",
    "Signal",
    "__version__",
    "load_model",
    "register_signal",
]

_HOMES = {
    "BakedField": "mnif.models.siren",
    "LatentTable": "mnif.latents.table",
    "MNIFModel": "mnif.models.mnif_model",
    "Signal": "mnif.signals.base",
    "register_signal": "mnif.signals.registry",
}


def load_model(folder: "str | Path") -> "MNIFModel":
    """Loads the decoder of a model folder, RUN/model or RUN, in evaluation mode.

    Raises:
        UserError: the folder or its decoder is missing or damaged.
    """
    from pathlib import Path

    from mnif.models.io import load_component
    from mnif.models.mnif_model import MNIFModel

    return load_component(MNIFModel, Path(folder), "decoder")


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that ``import mnif`` and ``mnif --help`` cost no torch import."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mnif' has no attribute '{name}'")
