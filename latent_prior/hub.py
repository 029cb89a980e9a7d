"""Models on the Hugging Face hub: fetched as model folders, and pushed as such with their model card."""

import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from latent_prior.model_card import model_card
from mnif.errors import UserError

if TYPE_CHECKING:
    from latent_prior.pipeline import MNIFPipeline

_FILES = ["*.json", "*.safetensors", "*.md"]  # never pickles or code
_SECONDS = 10.0  # that the hub may take to answer
_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")
_TROUBLES = (HTTPError, OSError, ValueError)  # every error of huggingface-hub is one of these


def model_folder(name: str | Path) -> Path:
    """The folder of a model named by a path, or by ``user/name`` on the hub if there is no such path.

    Raises:
        UserError: the hub cannot be reached, or has no such model.
    """
    folder = Path(name)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.is_dir()
    return downloaded(str(name)) if on_hub and not folder.exists() else folder


def downloaded(repo_id: str, **options: Any) -> Path:
    """Fetches a model from the hub, or takes it from the cache if the hub cannot be reached.

    Args:
        repo_id: ``user/name``.
        options: those of ``DiffusionPipeline.from_pretrained``; what is of no use here is passed over.

    Raises:
        UserError: the model is neither there nor in the cache; after ten seconds at most if nobody answers.
    """
    wanted = {key: options[key] for key in _OPTIONS if options.get(key) is not None}
    offline = wanted.pop("local_files_only", False) or constants.HF_HUB_OFFLINE
    trouble = "offline as HF_HUB_OFFLINE or local_files_only say"
    try:
        if not offline:
            try:  # asked first, for it is the only call that can be told how long to wait
                api = HfApi(token=wanted.get("token"))
                wanted["revision"] = api.repo_info(repo_id, revision=wanted.get("revision"), timeout=_SECONDS).sha
            except (RepositoryNotFoundError, RevisionNotFoundError):
                raise UserError(
                    f"{repo_id}: no such folder, and no such model on the hub; `hf auth login` gives access to "
                    "private ones"
                ) from None
            except _TROUBLES as error:
                offline, trouble = True, _first_line(error)
        return Path(snapshot_download(repo_id, allow_patterns=_FILES, local_files_only=offline, **wanted))
    except _TROUBLES as error:
        reason = trouble if offline else _first_line(error)
        raise UserError(
            f"{repo_id}: no such folder, and the hub cannot be reached ({reason}); "
            "give the path of a model folder, or try again online"
        ) from None


def upload(pipeline: "MNIFPipeline", repo_id: str, private: bool | None = None, **options: Any) -> str:
    """Uploads a pipeline, with a card of the run it was loaded from, or the card of the folder if there is no run.

    Args:
        pipeline: what is saved.
        repo_id: ``user/name``, made if it is missing.
        private: whether a new repository is.
        options: ``commit_message``, ``token``, ``create_pr``.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    api = HfApi(token=options.pop("token", None))
    source = Path(str(pipeline.config.get("_name_or_path", "")))
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_pretrained(folder)
        if (source.parent / "run.json").is_file():
            model_card(source.parent).save(Path(folder) / "README.md")
        elif (source / "README.md").is_file():
            shutil.copy(source / "README.md", folder)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)
        except _TROUBLES as error:
            raise UserError(f"{repo_id}: not uploaded ({_first_line(error)}); is `hf auth login` done?") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
