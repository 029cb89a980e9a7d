"""Mixtures of neural implicit functions: bases, latents, and the fields they make (stage one)."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mnif.latents.table import LatentTable
    from mnif.models.encoders import PatchEncoder
    from mnif.models.mnif_model import MNIFModel
    from mnif.models.siren import BakedField

__all__ = ["BakedField", "LatentTable", "MNIFModel", "PatchEncoder"]

_HOMES = {
    "BakedField": "mnif.models.siren",
    "LatentTable": "mnif.latents.table",
    "MNIFModel": "mnif.models.mnif_model",
    "PatchEncoder": "mnif.models.encoders",
}


def __getattr__(name: str) -> Any:
    """Imports the public classes on first use, so that ``import mnif`` and ``mnif --help`` cost no torch import."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mnif' has no attribute '{name}'")
