"""Models on the Hugging Face hub: fetched as model folders, and pushed as such."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from latent_prior.settings import HubFlags
from mnif.utils.errors import UserError
from mnif.utils.model_folders import model_folder_in
from mnif.utils.process import is_main_process

_FILES = ["*.json", "*.safetensors", "*.md", "samples.png"]  # what is fetched: never pickles or code

_SECONDS = 10.0  # that the hub may take to answer

_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")

_TROUBLES = (HTTPError, OSError, ValueError)  # every error of huggingface-hub is one of these


def repository_for(arguments: HubFlags, model: Path) -> str | None:
    """Finds the repository to push to and makes it if it is missing, before any work is done.

    Args:
        arguments: the flags.
        model: the model folder, RUN/model.

    Returns:
        ``user/name``, or None if nothing is to be pushed, or not by this process.

    Raises:
        UserError: nobody is logged in, the name is none, or the hub cannot be reached or refuses.
    """
    if not (arguments.push_to_hub and is_main_process()):
        if not arguments.push_to_hub and arguments.hub_model_id is not None:
            raise UserError(f"--hub_model_id {arguments.hub_model_id}: say --push_to_hub too")
        return None
    name = arguments.hub_model_id or model.resolve().parent.name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {name}: {_first_line(error)}") from None
    api = HfApi()
    try:
        api.whoami()
        return str(api.create_repo(name, exist_ok=True).repo_id)
    except LocalTokenNotFoundError:
        raise UserError("--push_to_hub: nobody is logged in; run `hf auth login`, or set HF_TOKEN") from None
    except _TROUBLES as error:
        raise UserError(f"--push_to_hub: {name} cannot be written to ({_first_line(error)})") from None


def push(model: Path, repository: str | None) -> None:
    """Uploads a model folder at the end of a command, if :func:`repository_for` has found where to."""
    if repository is not None:
        print(f"{repository}: {model} uploaded, {upload(model, repository, commit_message='Upload of mnif')}")


def model_folder(name: str | Path) -> Path:
    """Finds the folder of a model named by a path, its own or its run's, or by ``user/name`` on the hub.

    The hub is asked if there is no such path.

    Raises:
        UserError: the hub cannot be reached, or has no such model.
    """
    folder = Path(name)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.is_dir()
    if not on_hub or folder.exists():
        return model_folder_in(folder)
    print(f"{name}: no such folder; asking the hub for a model of this name", flush=True)
    return downloaded(str(name))


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


def cached_folder(name: str) -> Path | None:
    """The folder that a pipeline came from, by its path or its name on the hub; None if it is not there any more."""
    if name and Path(name).is_dir():
        return Path(name)
    try:
        found = try_to_load_from_cache(name, "model_index.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def upload(folder: Path, repo_id: str, private: bool | None = None, token: str | None = None, **options: Any) -> str:
    """Uploads a model folder.

    Args:
        folder: the model folder; hidden files stay behind.
        repo_id: ``user/name``, made if it is missing.
        private: whether a new repository is.
        token: of the hub; default: that of `hf auth login` or ``HF_TOKEN``.
        options: ``commit_message``, ``create_pr``.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        sent = api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[".*", "**/.*"], **options)
        return str(sent.commit_url)
    except _TROUBLES as error:
        raise UserError(f"{repo_id}: not uploaded ({_first_line(error)}); is `hf auth login` done?") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
