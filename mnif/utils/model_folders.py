"""Which folder a model's name or path stands for, and what its bytes are; without torch."""

import hashlib
from functools import cache
from pathlib import Path

from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_folder

TRAINED_MODELS = {"avatars": "17fd4e743c794c031aebf4a5d124a95cdea9fb78436a8f774b3d5733d2644190"}
"""The trained models that come with the package: name → :func:`sha256_of_model`."""

COMES_ALONG = f"and {', '.join(TRAINED_MODELS)} comes along"
"""What a message says of them where a model was not found."""

_FOLDER = Path(__file__).parents[1] / "models/files"


def model_folder_in(folder: Path) -> Path:
    """Finds a model folder: ``RUN/model`` of a run's folder, that of a name in :data:`TRAINED_MODELS`, or else itself.

    A folder of such a name goes before the trained model.

    Raises:
        UserError: this installation lacks the trained model, or it is not as it was published.
    """
    if str(folder) in TRAINED_MODELS and not folder.exists():
        return _trained_model(str(folder))
    inside = folder / "model"
    return inside if inside.is_dir() and not (folder / "decoder").is_dir() else folder


def is_trained_model(folder: Path) -> bool:
    """Whether a model folder came with the package, so that nothing may be written there."""
    return folder.parent == _FOLDER


PROFILE = "profile"
"""The folder, in a model folder, of how held-out instances score (:mod:`mnif.latents.profile`)."""


def sha256_of_model(folder: Path) -> str:
    """The SHA-256 of a model folder's components; index, card, picture and profile say nothing of results."""
    digest = hashlib.sha256()
    for part in sorted(folder.iterdir()):
        if part.is_dir() and part.name != PROFILE and not part.name.startswith("."):
            digest.update(f"{part.name} {sha256_of_folder(part)}\n".encode())
    return digest.hexdigest()


@cache
def _trained_model(name: str) -> Path:
    """Checked once in a process."""
    folder = _FOLDER / name
    if not folder.is_dir() or sha256_of_model(folder) != TRAINED_MODELS[name]:
        state = "damaged" if folder.is_dir() else "missing"
        raise UserError(f"the model {name} is {state} in this installation ({folder}); install mnif-diffusion again")
    return folder
