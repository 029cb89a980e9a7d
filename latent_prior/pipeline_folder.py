"""The folder of a saved pipeline: its index, its parts, and what lies beside them for those who load it elsewhere."""

import shutil
from pathlib import Path
from typing import Any, Literal

import msgspec
from diffusers import DiffusionPipeline

from latent_prior.denoisers import load_denoiser
from latent_prior.diffusion import OBJECTIVES, objective_of
from latent_prior.schedulers import load_scheduler
from mnif.models.io import load_component, weights_file
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically
from mnif.utils.json_files import read_json
from mnif.utils.model_folders import COMES_ALONG, PROFILE, model_folder_in

REMOTE_MODULE = "pipeline"
"""The file of a model folder, without ``.py``, that gives diffusers' own ``DiffusionPipeline`` the class."""

_REMOTE_CODE = '''"""Gives `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` the class of this model."""

from importlib import import_module

try:
    MNIFPipeline = import_module("latent_prior.pipeline").MNIFPipeline
except ImportError as error:
    raise ImportError(f"this model is one of mnif ({error}); run: pip install mnif-diffusion") from error
'''

PICTURE = "samples.png"

_BESIDE = ("encoder", "inner_loop", PROFILE, "README.md", PICTURE)  # no parts of the pipeline

_DenoiserClass = Literal["ResMLPDenoiser", "PaperDenoiser", "TransformerDenoiser"]
_DenoiserModule = Literal["latent_prior.denoisers"]
_AnyScheduler = tuple[Literal["diffusers"], str]


class PipelineIndex(msgspec.Struct, forbid_unknown_fields=True):
    """A ``model_index.json``: for each component its module and class, of ours and of diffusers' schedulers alone.

    No other module is ever imported for it, and no other component read.
    """

    class_name: Literal["MNIFPipeline"] | tuple[Literal["pipeline"], Literal["MNIFPipeline"]] = msgspec.field(
        name="_class_name"
    )
    decoder: tuple[Literal["mnif.models.mnif_model"], Literal["MNIFModel"]]
    denoiser: tuple[_DenoiserModule, _DenoiserClass]
    scheduler: _AnyScheduler
    student: tuple[_DenoiserModule | None, _DenoiserClass | None] = (None, None)
    student_scheduler: tuple[Literal["diffusers"] | None, str | None] = (None, None)
    diffusers_version: str | None = msgspec.field(default=None, name="_diffusers_version")
    name_or_path: str | None = msgspec.field(default=None, name="_name_or_path")


def read_components(folder: Path, variant: str | None = None, **given: Any) -> dict[str, Any]:
    """Reads the parts of a pipeline. Nothing but what the index names is read, and the network is never asked.

    Args:
        folder: the model folder.
        variant: of the weights, as of ``save_pretrained``; default: those without one, or of the only one there is.
        given: takes the place of those in the folder, by name.

    Raises:
        UserError: a stage is missing or damaged, or no weights are of the variant.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such model folder; `mnif prior` completes one at RUN/model, {COMES_ALONG}")
    if not (folder / "denoiser").exists():
        raise UserError(f"{folder} has no denoiser; `mnif prior` makes it")
    index = read_json(folder / "model_index.json", PipelineIndex)
    has_student = index.student[1] is not None and index.student_scheduler[1] is not None
    names = ("decoder", "denoiser", "scheduler", *(("student", "student_scheduler") if has_student else ()))
    if variant is not None and not any(f".{variant}." in weights_file(folder / name, variant).name for name in names):
        raise UserError(f"{folder}: no weights of the variant {variant} are there")
    components = {
        name: given[name] if name in given else _read_part(folder, name, getattr(index, name)[1], variant)
        for name in names
    }
    denoiser = components["denoiser"]
    if denoiser.config.prediction_type is None and "scheduler" in given:  # written before denoisers said so
        own = load_scheduler(folder / "scheduler")
        denoiser.register_to_config(prediction_type=OBJECTIVES[objective_of(own)].prediction_type)
    return given | components


def _read_part(folder: Path, name: str, class_name: str, variant: str | None) -> Any:
    """Reads one component, which must be of the class that the index names."""
    if name == "decoder":
        return load_component(MNIFModel, folder, name, variant)
    if name.endswith("scheduler"):
        part: Any = load_scheduler(folder / name, distilled=name.startswith("student"))
    else:
        part = load_denoiser(folder, name, variant)
    if type(part).__name__ != class_name:
        raise UserError(f"{folder / 'model_index.json'}: {name} is a {class_name}, its folder a {type(part).__name__}")
    return part


def save_index(folder: Path, pipeline: DiffusionPipeline) -> None:
    """Writes ``model_index.json``, which says what the folder is made of, after the code that it names."""
    write_remote_code(folder)
    with written_atomically(folder / pipeline.config_name) as temporary:
        pipeline.to_json_file(temporary)


def write_remote_code(folder: Path) -> None:
    """Writes ``pipeline.py``, by which diffusers finds the class of a pipeline that is not its own."""
    with written_atomically(folder / f"{REMOTE_MODULE}.py") as temporary:
        temporary.write_text(_REMOTE_CODE)


def copy_beside(source: Path, folder: Path) -> None:
    """Copies what a model folder holds beside the parts of its pipeline: encoder or inner loop, profile, card
    and picture."""
    source = model_folder_in(source)
    for name in _BESIDE:
        found = source / name
        if found.resolve() == (folder / name).resolve():
            continue
        if found.is_dir():
            shutil.copytree(found, folder / name, dirs_exist_ok=True)
        elif found.is_file():
            shutil.copyfile(found, folder / name)
