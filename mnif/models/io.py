"""Components on disk: the model folder, and weights that lie in memory of their own once they are read.

A model folder has one sub-folder per component, as diffusers lays out a pipeline; every stage adds its own.
"""

from pathlib import Path
from typing import Any, TypeVar

from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from mnif.utils.errors import UserError
from mnif.utils.files import folder_written_atomically, written_atomically


class OwnMemory(ModelMixin):
    """A component whose weights are copied when they are loaded; named ahead of ``ModelMixin`` among the bases.

    diffusers leaves weights in the memory-mapped file, where their addresses depend on the length of its header.
    Products with one row, as of a time embedding, round differently at an address that is no multiple of 16 bytes
    (2e-7 in a sample). PyTorch's own memory begins at multiples of 64.
    """

    @classmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Loads a component as ``ModelMixin`` does, and copies its weights."""
        loaded = super().from_pretrained(*arguments, **options)
        component = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        for tensor in (*component.parameters(), *component.buffers()):
            tensor.data = tensor.data.clone()
        return loaded


Component = TypeVar("Component", bound=ModelMixin)

_MADE_BY = {
    "decoder": "mnif fit",
    "encoder": "mnif fit --method encoder",
    "inner_loop": "mnif fit --method meta",
    "denoiser": "mnif prior",
    "student": "mnif distill",
}


def save_component(folder: Path, name: str, component: ModelMixin) -> None:
    """Writes a component's weights (safetensors) and configuration to ``folder/name``, atomically."""
    with folder_written_atomically(folder / name) as temporary:
        component.save_pretrained(temporary)


def save_index(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Writes ``model_index.json``, which says what the folder is made of, atomically."""
    with written_atomically(folder / pipeline.config_name) as temporary:
        pipeline.to_json_file(temporary)


def load_component(kind: type[Component], folder: Path, name: str) -> Component:
    """Reads ``folder/name`` in evaluation mode.

    Raises:
        UserError: the folder or the component is missing or damaged.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; `mnif fit` writes one at RUN/model")
    if not (folder / name / "config.json").is_file():
        raise UserError(f"{folder} has no {name}; `{_MADE_BY[name]}` makes it")
    try:
        return kind.from_pretrained(folder / name, use_safetensors=True, low_cpu_mem_usage=False).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder / name}: damaged component ({str(error).splitlines()[0]})") from None
