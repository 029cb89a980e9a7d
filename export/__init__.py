"""From the model folder to an edge device: ONNX graphs, the bundle that holds them, and a runtime without torch.

Bundles hold a copy of this file beside ``device/``, the one part of the package a board has: there ``load_bundle`` is
all it gives.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.commands.export import export_bundle
    from export.device.runtime import load_bundle

__all__ = ["export_bundle", "load_bundle"]

_HOMES = {
    "export_bundle": "export.commands.export",
    "load_bundle": "export.device.runtime",
}


def __getattr__(name: str) -> Any:
    """Imports the public names on first use, so that a board needs ``device/`` alone."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'export' has no attribute '{name}'")
