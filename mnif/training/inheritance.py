"""What a run has of the generations that its model was grown from: latents, encoders and priors, figures and commands.

The bases of earlier generations are a part of the model (:mod:`mnif.models.lineage`). What they had besides is kept in
``RUN/inherited``, in a folder for each by the beginning of its fingerprint, as it was in its own run.
"""

import shutil
from pathlib import Path

from mnif import __version__
from mnif.data.dataset import Dataset
from mnif.models.growth import Generation
from mnif.models.mnif_model import MNIFModel
from mnif.training.run_record import read_run_record, stage_one_of
from mnif.utils.files import folder_written_atomically
from mnif.utils.json_files import read_json
from mnif.utils.process import command_line, public_command, public_name

_FOLDER, TABLE = "inherited", "latents.safetensors"

_SHOWN = ("_heldout", "_train", "_of_old_fields")  # of the figures that a run has, those by these ends


def inherited_folder(run: Path, fingerprint: str) -> Path:
    """Where a run keeps what the generation of ``fingerprint`` had besides its bases; it may be missing."""
    return run / _FOLDER / fingerprint[:12]


def inherited_tables(run: Path) -> list[Path]:
    """Lists the latent tables of earlier generations that a run keeps."""
    return sorted((run / _FOLDER).glob(f"*/{TABLE}"))


def keep_inheritance(model: Path, run: Path, fingerprint: str) -> None:
    """Copies to a run what the model folder and the run of its parent have, and what that run has inherited itself.

    Args:
        model: the parent's, RUN/model.
        run: of the model that was grown from it.
        fingerprint: of the parent.
    """
    with folder_written_atomically(run / _FOLDER) as folder:
        if (model.parent / _FOLDER).is_dir():
            shutil.copytree(model.parent / _FOLDER, folder, dirs_exist_ok=True)
        own = folder / fingerprint[:12]
        shutil.copytree(model, own / "model", ignore=lambda _, names: {"decoder"} & {*names})
        for name in (TABLE, "metrics.json", "run.json"):
            if (model.parent / name).is_file():
                shutil.copyfile(model.parent / name, own / name)


def lineage_of_child(
    parent: MNIFModel, model: Path, data: Dataset, before: dict[str, float], frozen: bool
) -> list[Generation]:
    """Says what is known of all generations of a model that is being grown; its own fingerprint is not known yet.

    Args:
        parent: the model as it is.
        model: its folder, RUN/model.
        data: what is learned now.
        before: the parent's figures on these data.
        frozen: whether the parent's bases stand still.
    """
    *earlier, last = lineage_of(parent, model)
    name = public_name(data.name)
    figures = last["figures"] | ({name: before} if before else {})
    child: Generation = {
        "fingerprint": "",
        "data": name,
        "data_fingerprint": data.fingerprint(),
        "command": public_command(command_line()),
        "version": __version__,
        "frozen": frozen,
        "figures": {},
    }
    return [*earlier, {**last, "figures": figures}, child]


def lineage_of(decoder: MNIFModel, model: Path) -> list[Generation]:
    """Says what is known of all generations of a model, its own the last, also by the run that its folder is in."""
    *earlier, last = decoder.config.lineage or [_first_generation(model.parent)]
    figures = dict(last["figures"])
    if own := _figures_of(model.parent):
        figures[last["data"]] = own
    return [*earlier, {**last, "fingerprint": decoder.fingerprint(), "figures": figures}]


def _first_generation(run: Path) -> Generation:
    """What is known of a model that was not grown, from its run; empty texts where there is none."""
    found = stage_one_of(read_run_record(run)) if (run / "run.json").is_file() else None
    return {
        "fingerprint": "",
        "data": public_name(str(found[1].arguments.get("data", ""))) if found else "",
        "data_fingerprint": found[1].inputs.get("data_fingerprint", "") if found else "",
        "command": public_command(found[1].command) if found else "",
        "version": "",
        "frozen": True,
        "figures": {},
    }


def _figures_of(run: Path) -> dict[str, float]:
    metrics = read_json(run / "metrics.json") if (run / "metrics.json").is_file() else {}
    return {
        name: round(value, 3)
        for name, value in metrics.items()
        if isinstance(value, float) and name.endswith(_SHOWN) and "_pca_" not in name
    }
