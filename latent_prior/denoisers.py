"""The kinds of denoiser, and reading the one in a model folder, of whatever kind."""

from pathlib import Path

from latent_prior.denoiser import Denoiser, LatentDenoiser
from latent_prior.paper_denoiser import PaperDenoiser
from mnif.errors import UserError
from mnif.files import read_json
from mnif.model_folder import load_component

KINDS: tuple[type[Denoiser], ...] = (LatentDenoiser, PaperDenoiser)


def load_denoiser(folder: Path, name: str = "denoiser") -> Denoiser:
    """Reads the denoiser ``folder/name`` of whatever kind, in evaluation mode.

    Args:
        folder: the model folder.
        name: ``"denoiser"``, or ``"student"`` for the one that `mnif distill` makes.

    Raises:
        UserError: the folder or the component is missing or damaged, or of a kind that is not known here.
    """
    config = folder / name / "config.json"
    named = read_json(config).get("_class_name") if config.is_file() else LatentDenoiser.__name__
    kinds = {kind.__name__: kind for kind in KINDS}
    if named not in kinds:
        raise UserError(f"{config}: a {named} is no denoiser; {' or '.join(kinds)} is needed")
    return load_component(kinds[named], folder, name)
