"""Models on the Hugging Face hub: fetched as model folders, and pushed as such with their model card.

The card says what a model was learned from and how, what was measured, and under which licence.
"""

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, snapshot_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from mnif import __version__
from mnif.data.builtin import builtin_licence
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_class
from mnif.training.run_record import read_run_record
from mnif.utils.errors import UserError, markdown_code, printable
from mnif.utils.files import written_atomically
from mnif.utils.json_files import read_json, read_object

_FILES = ["*.json", "*.safetensors", "*.md"]  # what is fetched: never pickles or code

_SECONDS = 10.0  # that the hub may take to answer

_OPTIONS = ("revision", "cache_dir", "token", "force_download", "local_files_only")

_TROUBLES = (HTTPError, OSError, ValueError)  # every error of huggingface-hub is one of these

_STAGES = {"fit": "stage one", "prior": "stage two", "distill": "student"}

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A generative model of neural fields: {{ signal }} samples are small coordinate networks, mixed from shared basis
networks by a latent of {{ latent_dim }} numbers that a diffusion prior draws. Made with mnif {{ version }}, after You
et al., *Generative Neural Fields by Mixtures of Neural Implicit Functions* (NeurIPS 2023).

```python
from latent_prior.pipeline import MNIFPipeline

pipeline = MNIFPipeline.from_pretrained("path or user/name of this model")
image = pipeline(batch_size=4).images[0]
```

## Data

Of {{ data }}: {{ train }} instances to train, {{ held_out }} held out to choose weights by, the rest (if any) never
looked at. SHA-256 of the data as read: `{{ fingerprint }}`.

## How it was made

```sh
{{ commands }}
```

## Figures

{{ metrics }}

{{ evaluation }}

## Licence

{{ licence }}
"""


class Measured(msgspec.Struct):
    """What a card says of an evaluation's ``metrics.json`` beside its figures."""

    command: str
    protocol: dict[str, bool | int | float | str | None] = {}


def write_model_card(run: Path) -> None:
    """Writes ``run/model/README.md`` from what the run has recorded so far."""
    card = model_card(run)
    with written_atomically(run / "model" / "README.md") as temporary:
        temporary.write_text(str(card).rstrip() + "\n", errors="backslashreplace")


def model_card(run: Path) -> ModelCard:
    """Makes the card of the model in a run folder.

    Raises:
        UserError: the run folder lacks a finished stage one.
    """
    record, metrics = read_run_record(run), read_json(run / "metrics.json")
    decoder = load_component(MNIFModel, run / "model", "decoder")
    table = LatentTable.load(run / "latents.safetensors", decoder.fingerprint(), decoder.config.latent_dim)
    # Whoever learns from data of their own knows its licence, and this program does not.
    licence, words = builtin_licence(table.data) or (None, None)
    data, evaluated = markdown_code(public_name(table.data)), run / "eval" / "metrics.json"
    lines = [f"- {name}: {value}" for name, value in _metrics(metrics)]
    return ModelCard.from_template(
        ModelCardData(
            license=licence,
            library_name="diffusers",
            pipeline_tag=signal_class(decoder.config.signal).pipeline_tag,
            tags=["mnif", "neural-fields", "implicit-neural-representations", decoder.config.signal],
        ),
        template_str=_TEMPLATE,
        name=printable(run.resolve().name),
        signal=decoder.config.signal,
        latent_dim=decoder.config.latent_dim,
        version=__version__,
        data=data,
        train=len(table.train),
        held_out=int(table.held_out.sum()),
        fingerprint=record["fit"].inputs.get("data_fingerprint", "unknown") if "fit" in record else "unknown",
        commands="\n".join(public_command(record[stage].command) for stage in _STAGES if stage in record),
        metrics="\n".join(lines),
        evaluation=_evaluation(read_object(evaluated, Measured))
        if evaluated.exists()
        else "Samples have not been measured yet.",
        licence=words or f"None is stated: the licence of the data, {data}, tells what may be done with samples.",
    )


def public_command(command: str) -> str:
    """A command as others may see it, on one line: of paths outside the working folder the last name alone."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote without its end
        return printable(command)
    return printable(shlex.join(map(public_name, words)))


def public_name(word: str) -> str:
    """A path outside the working folder without the folders that it is in, which are nobody else's business."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    return f"{flag}{equals}{Path(value).name}" if value.startswith(("/", "~", "..")) else word


def _metrics(recorded: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields numbers by name, nested ones as outer.inner; ``psnr`` in dB, times in seconds, memory in MB."""
    for name, value in sorted(recorded.items()):
        if isinstance(value, dict):
            yield from _metrics(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield markdown_code(f"{prefix}{name}"), f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _evaluation(recorded: dict[str, Any]) -> str:
    """Lists what `mnif eval` measured, with its protocol and the command."""
    protocol = ", ".join(printable(f"{name} {value}") for name, value in sorted(recorded.get("protocol", {}).items()))
    measured = {name: value for name, value in recorded.items() if name not in ("protocol", "inputs")}
    lines = [f"- {name}: {value}" for name, value in _metrics(measured)]
    head = (
        f"Measured by {markdown_code(public_command(recorded['command']))}"
        + (f" ({protocol})" if protocol else "")
        + ":"
    )
    return "\n".join([head, "", *lines])


def model_folder(name: str | Path) -> Path:
    """Finds the folder of a model named by a path, or by ``user/name`` on the hub if there is no such path.

    Raises:
        UserError: the hub cannot be reached, or has no such model.
    """
    folder = Path(name)
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.parent.is_dir()
    if not on_hub or folder.exists():
        return folder
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


def upload(folder: Path, source: Path, repo_id: str, private: bool | None = None, **options: Any) -> str:
    """Uploads a model folder with its card: that of the run it came from or, if there is no run, the one it had there.

    Args:
        folder: what is uploaded; gets the card.
        source: the model folder that the model was loaded from; may be missing.
        repo_id: ``user/name``, made if it is missing.
        private: whether a new repository is.
        options: ``commit_message``, ``token``, ``create_pr``.

    Returns:
        The address of the commit.

    Raises:
        UserError: the hub cannot be reached or refuses.
    """
    if (source.parent / "run.json").is_file():
        model_card(source.parent).save(folder / "README.md")
    elif (source / "README.md").is_file():
        shutil.copy(source / "README.md", folder)
    api = HfApi(token=options.pop("token", None))
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options).commit_url)
    except _TROUBLES as error:
        raise UserError(f"{repo_id}: not uploaded ({_first_line(error)}); is `hf auth login` done?") from None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
