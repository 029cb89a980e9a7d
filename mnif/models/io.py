"""Components on disk: the model folder, and weights that lie in memory of their own once they are read.

A model folder has one sub-folder per component, as diffusers lays out a pipeline; every stage adds its own.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError, safe_open

from mnif.utils.errors import UserError
from mnif.utils.files import folder_written_atomically, written_atomically
from mnif.utils.json_files import arguments_schema, read_object


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

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_REAL = ("F16", "BF16", "F32", "F64")

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
        check_component(kind, folder / name)
        component = kind.from_pretrained(
            folder / name, use_safetensors=True, low_cpu_mem_usage=False, local_files_only=True
        ).eval()
    except (OSError, ValueError, RuntimeError, OverflowError, SafetensorError) as error:
        raise UserError(f"{folder / name}: damaged component ({str(error).splitlines()[0]})") from None
    for parameter, values in component.state_dict().items():
        if not values.isfinite().all():
            raise UserError(f"{folder / name}: {parameter} holds NaN or infinity; `{_MADE_BY[name]}` makes it anew")
    return component


def check_component(kind: Any, folder: Path) -> None:
    """Makes sure, before anything is allocated, that a component's weights are those that its configuration asks for.

    Nothing but ``config.json`` and the header of the one file of weights is read.

    Raises:
        UserError: the configuration has entries that the class does not take, of another type or out of range; or
            the weights have other names, shapes or types.
        SafetensorError: the file of weights is damaged.
        ValueError: the class refuses its configuration.
    """
    config = read_object(folder / "config.json", arguments_schema(kind))
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise UserError(f"{folder / 'config.json'}: a {config['_class_name']}; a {kind.__name__} is needed")
    path = folder / _WEIGHTS
    if not path.is_file():
        raise UserError(f"{folder}: has no {_WEIGHTS}")
    if (folder / f"{_WEIGHTS}.index.json").exists():
        raise UserError(f"{folder}: weights in several files are not read; save them as one")
    with torch.device("meta"):
        expected = {name: list(values.shape) for name, values in kind.from_config(config).state_dict().items()}
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name in sorted(expected.keys() | found.keys()):
            shape, wanted = found[name].get_shape() if name in found else None, expected.get(name)
            if shape != wanted:
                raise UserError(f"{path}: {name} is {shape or 'missing'}, where config.json makes it {wanted}")
            if found[name].get_dtype() not in _REAL:
                raise UserError(f"{path}: {name} is {found[name].get_dtype()}; floating-point numbers are needed")
