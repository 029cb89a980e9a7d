"""Mixtures of neural implicit functions: bases, latents, and the fields they make (stage one)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mnif.encoder import PatchEncoder
    from mnif.fields import BakedField
    from mnif.latents import LatentTable
    from mnif.modeling import MNIFModel

__all__ = ["BakedField", "LatentTable", "MNIFModel", "PatchEncoder"]

_HOMES = {
    "BakedField": "mnif.fields",
    "LatentTable": "mnif.latents",
    "MNIFModel": "mnif.modeling",
    "PatchEncoder": "mnif.encoder",
}


def __getattr__(name: str) -> Any:
    """Imports the public classes on first use, so that ``import mnif`` and ``mnif --help`` cost no torch import."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mnif' has no attribute '{name}'")
