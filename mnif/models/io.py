"""Components on disk: the model folder, and weights that lie in memory of their own once they are read.

A model folder has one sub-folder per component, as diffusers lays out a pipeline; every stage adds its own.
"""

from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open

from mnif.utils.errors import UserError
from mnif.utils.files import folder_written_atomically
from mnif.utils.json_files import arguments_schema, read_object
from mnif.utils.model_folders import COMES_ALONG, model_folder_in


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

_WEIGHTS = "diffusion_pytorch_model"
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


def load_component(kind: type[Component], folder: Path, name: str, variant: str | None = None) -> Component:
    """Reads ``folder/name`` in evaluation mode and float32.

    Args:
        kind: its class.
        folder: the model folder, or the run folder that it is in.
        name: of the component.
        variant: as of ``save_pretrained``, where the component has one (:func:`weights_file`).

    Raises:
        UserError: the folder or the component is missing or damaged.
    """
    folder = model_folder_in(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; `mnif fit` writes one at RUN/model, {COMES_ALONG}")
    if not (folder / name / "config.json").is_file():
        raise UserError(f"{folder} has no {name}; `{_MADE_BY[name]}` makes it")
    try:
        check_component(kind, folder / name, variant)
        component = kind.from_pretrained(
            folder / name,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            local_files_only=True,
            variant=_variant_of(weights_file(folder / name, variant)),
        ).eval()
    except (OSError, ValueError, RuntimeError, OverflowError, SafetensorError) as error:
        raise UserError(f"{folder / name}: damaged component ({str(error).splitlines()[0]})") from None
    for parameter, values in component.state_dict().items():
        if not values.isfinite().all():
            raise UserError(f"{folder / name}: {parameter} holds NaN or infinity; `{_MADE_BY[name]}` makes it anew")
    return component


def weights_file(folder: Path, variant: str | None = None) -> Path:
    """Finds the weights of a component, as diffusers names them: ``diffusion_pytorch_model[.VARIANT].safetensors``.

    Args:
        folder: the component's.
        variant: is preferred where there is one; where there are no others, weights of any one variant are taken.
    """
    plain, named = folder / f"{_WEIGHTS}.safetensors", folder / f"{_WEIGHTS}.{variant}.safetensors"
    if variant is not None and named.is_file():
        return named
    only = [] if plain.is_file() else list(folder.glob(f"{_WEIGHTS}.*.safetensors"))
    return only[0] if len(only) == 1 else plain


def _variant_of(weights: Path) -> str | None:
    return weights.name.removeprefix(_WEIGHTS).removesuffix(".safetensors").removeprefix(".") or None


def check_component(kind: Any, folder: Path, variant: str | None = None) -> None:
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
    path = weights_file(folder, variant)
    if not path.is_file():
        raise UserError(f"{folder}: has no {path.name}")
    if list(folder.glob(f"{_WEIGHTS}.safetensors.index*.json")):
        raise UserError(f"{folder}: weights in several files are not read; save them as one")
    with torch.device("meta"):
        expected = {name: list(values.shape) for name, values in kind.from_config(config).state_dict().items()}
    with safe_open(path, framework="pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        for name in sorted(expected.keys() | found.keys()):
            shape, wanted = found[name].get_shape() if name in found else None, expected.get(name)
            if shape != wanted:
                reason = f"{name} is {shape or 'missing'}, where config.json makes it {wanted}"
                raise UserError(f"{path}: {reason}; these are of another model or version of mnif (CHANGELOG.md)")
            if found[name].get_dtype() not in _REAL:
                raise UserError(f"{path}: {name} is {found[name].get_dtype()}; floating-point numbers are needed")
