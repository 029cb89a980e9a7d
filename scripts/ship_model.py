"""Puts a finished run into the package as a trained model: `python scripts/ship_model.py RUN NAME`.

Weights are rounded to half precision. It prints the hash that ``mnif/utils/model_folders.py`` must hold for the name.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch

from latent_prior.pipeline import MNIFPipeline
from latent_prior.pipeline_folder import REMOTE_MODULE
from mnif.latents.inference import load_latent_init
from mnif.signals.registry import signal_of_model
from mnif.utils.errors import UserError
from mnif.utils.model_folders import model_folder_in, sha256_of_model

FOLDER = Path(__file__).parents[1] / "mnif/models/files"
VARIANT = "fp16"

_ROUNDED = "Weights were rounded to half precision afterwards; the figures are of the model in float32."


def ship(run: Path, folder: Path) -> str:
    """Writes the model of a run, its encoder and its card to ``folder``, with weights in half precision.

    Returns:
        The SHA-256 of what was written (:func:`mnif.utils.model_folders.sha256_of_model`).

    Raises:
        UserError: the run has no finished prior, or the folder is there already.
    """
    if folder.exists():
        raise UserError(f"{folder} is there already; remove it first")
    diffusers.utils.logging.set_verbosity_error()  # it warns of parts to keep in float32, of which there are none
    model = model_folder_in(run)
    pipeline = MNIFPipeline.from_pretrained(model, torch_dtype=torch.float16)
    pipeline.save_pretrained(folder, variant=VARIANT)
    (folder / f"{REMOTE_MODULE}.py").unlink()  # is for those who load it without this package
    finder = load_latent_init(model, pipeline.decoder, signal_of_model(pipeline.decoder))
    if finder is not None:
        part = "encoder" if (model / "encoder").is_dir() else "inner_loop"
        shutil.rmtree(folder / part)
        kind: Any = type(finder)
        half = kind.from_pretrained(model / part, torch_dtype=torch.float16)
        half.save_pretrained(folder / part, variant=VARIANT)
    for config in folder.glob("*/config.json"):
        settings = json.loads(config.read_text())
        settings.pop("_name_or_path", None)  # where this machine had it
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    card = folder / "README.md"
    card.write_text(card.read_text().replace("## Figures\n", f"{_ROUNDED}\n\n## Figures\n", 1))
    return sha256_of_model(folder)


def main() -> int:
    """Reads the arguments, and says what went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="a run folder of `mnif prior`")
    parser.add_argument("name", help="of the trained model")
    arguments = parser.parse_args()
    try:
        print(f'"{arguments.name}": "{ship(arguments.run, FOLDER / arguments.name)}"')
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
