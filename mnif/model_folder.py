"""The model folder: one sub-folder per component, as diffusers lays out a pipeline; every stage adds its own."""

from pathlib import Path
from typing import TypeVar

from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from mnif.errors import UserError
from mnif.files import folder_written_atomically, written_atomically
from mnif.inner_loop import InnerLoop
from mnif.refinement import Finder
from mnif.signals import Signal

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


def load_finder(folder: Path, signal: Signal, method: str = "auto") -> Finder:
    """What finds the latents of new data: the folder's encoder or inner loop, or None for a search from zero.

    Args:
        folder: the model folder.
        signal: the model's.
        method: "encoder", "meta" or "auto-decoding" (None); "auto" takes what there is.

    Raises:
        UserError: the folder lacks what was asked for.
    """
    name = {"encoder": "encoder", "meta": "inner_loop", "auto-decoding": None}.get(method, "auto")
    if name == "auto":
        name = next((name for name in ("encoder", "inner_loop") if (folder / name).is_dir()), None)
    if name is None:
        return None
    kind = InnerLoop if name == "inner_loop" else signal.encoder_class
    return load_component(kind, folder, name)
