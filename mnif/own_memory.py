"""Loaded weights in memory of their own, so that what is computed with them does not depend on the file."""

from typing import Any

from diffusers import ModelMixin


class OwnMemory(ModelMixin):
    """A component whose weights are copied when they are loaded; named ahead of ``ModelMixin`` among the bases.

    diffusers leaves weights in the memory-mapped file, where their addresses depend on the length of its header.
    Products with one row, as of a time embedding, round differently at an address that is no multiple of 16 bytes
    (2e-7 in a sample). PyTorch's own memory begins at multiples of 64.
    """

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """As of ``ModelMixin``."""
        loaded = super().from_pretrained(*arguments, **options)
        component = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for tensor in (*component.parameters(), *component.buffers()):
            tensor.data = tensor.data.clone()
        return loaded
