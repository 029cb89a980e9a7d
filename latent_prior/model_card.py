"""The card of a model, ``README.md`` in its folder: what it was learned from and how, its licence, what was measured.

Commands write it when they change the model, and it says then that samples were not measured; `mnif eval` adds what it
finds (:func:`add_evaluation`).
"""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from latent_prior.pipeline_folder import PICTURE
from mnif import __version__
from mnif.data.builtin import builtin_licence
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_class
from mnif.training.run_record import read_run_record, stage_one_of
from mnif.utils.errors import UserError, markdown_code, printable
from mnif.utils.files import written_atomically
from mnif.utils.json_files import read_json
from mnif.utils.process import public_command, public_name

_CARD = "README.md"

_STAGES = {"fit": "stage one", "grow": "stage one, grown", "prior": "stage two", "distill": "student"}

_UNKNOWN = "unknown"  # the hub's word for a licence that nobody has stated

_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

A generative model of neural fields: {{ signal }} samples are small coordinate networks, mixed from shared basis
networks by a latent of {{ latent_dim }} numbers that a diffusion prior draws. Made with mnif {{ version }}, after You
et al., *Generative Neural Fields by Mixtures of Neural Implicit Functions* (NeurIPS 2023).
{{ picture }}
```python
from latent_prior import MNIFPipeline  # pip install mnif-diffusion

pipeline = MNIFPipeline.from_pretrained("path or user/name of this model")
image = pipeline(batch_size=4).images[0]
```

`diffusers.DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` gives the same pipeline.

## Data

Of {{ data }}: {{ train }} instances to train, {{ held_out }} held out to choose weights by, the rest (if any) never
looked at. SHA-256 of the data as read: `{{ fingerprint }}`.{{ grown }}

## How it was made

```sh
{{ commands }}
```

## Figures

{{ metrics }}

## Evaluation

Samples have not been measured yet.

## Licence

{{ licence }}
"""

_EVALUATION = re.compile(r"(?<=^## Evaluation\n).*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Figure:
    """A number that was measured.

    Attributes:
        key: its name in ``metrics.json``.
        label: its name in a table.
        value: the number.
        std: its standard error, where it is known.
    """

    key: str
    label: str
    value: float
    std: float | None = None


def write_model_card(run: Path) -> None:
    """Writes ``run/model/README.md`` from what the run has recorded so far, and the picture that it shows."""
    shown, picture = run / "samples" / PICTURE, run / "model" / PICTURE
    if shown.is_file():
        with written_atomically(picture) as temporary:
            shutil.copyfile(shown, temporary)
    _write(run / "model", model_card(run))


def _read(path: Path) -> ModelCard:
    """Reads a card, which may be somebody's own."""
    try:
        return ModelCard.load(path, ignore_metadata_errors=True)
    except Exception as error:  # of YAML, of the hub's library or of the file
        raise UserError(f"{path}: no model card ({str(error).splitlines()[0]}); mend or remove it") from None


def _write(model: Path, card: ModelCard) -> None:
    with written_atomically(model / _CARD) as temporary:
        temporary.write_text(str(card).rstrip() + "\n", errors="backslashreplace")


def model_card(run: Path) -> ModelCard:
    """Makes the card of the model in a run folder, before samples are measured.

    Raises:
        UserError: the run folder lacks a finished stage one.
    """
    record, metrics = read_run_record(run), read_json(run / "metrics.json")
    decoder = load_component(MNIFModel, run / "model", "decoder")
    table = LatentTable.load_for(decoder, run / "latents.safetensors")
    stage_one = stage_one_of(record)
    signal, data = decoder.config.signal, markdown_code(public_name(table.data))
    licence, words = _licence(table.data, run / "model")
    has_picture = (run / "model" / PICTURE).is_file()
    return ModelCard.from_template(
        ModelCardData(
            license=licence,
            datasets=_public_data_set(table.data),
            library_name="diffusers",
            pipeline_tag=signal_class(signal).pipeline_tag,
            tags=["mnif", "neural-fields", "implicit-neural-representations", signal],
            widget=[{"text": "64 samples, not selected", "output": {"url": PICTURE}}] if has_picture else None,
        ),
        template_str=_TEMPLATE,
        name=printable(run.resolve().name),
        signal=signal,
        latent_dim=decoder.config.latent_dim,
        version=__version__,
        picture=f"\n![64 samples, not selected]({PICTURE})\n" if has_picture else "",
        data=data,
        train=len(table.train),
        held_out=int(table.held_out.sum()),
        fingerprint=stage_one[1].inputs.get("data_fingerprint", "unknown") if stage_one else "unknown",
        grown=_grown(decoder),
        commands="\n".join(public_command(record[stage].command) for stage in _STAGES if stage in record),
        metrics="\n".join(f"- {name}: {value}" for name, value in _metrics(metrics)),
        licence=words or f"{licence}, as the data, {data}, have it; that tells what may be done with samples.",
    )


def _grown(decoder: MNIFModel) -> str:
    """Says what a model was grown from, whose data it knows too; nothing of one that was not."""
    before = [markdown_code(generation["data"] or "unknown") for generation in decoder.config.lineage[:-1]]
    if not before:
        return ""
    return f"\n\nIt was grown from a model of other data, {', '.join(before)}, whose licences count too."


def add_evaluation(model: Path, figures: Sequence[Figure], reference: str, words: str) -> bool:
    """Writes into the card of a model folder what was measured, as text and as metadata that the hub reads.

    Args:
        model: the model folder.
        figures: of the model's own samples and reconstructions.
        reference: the data that they were measured against.
        words: all of it in Markdown, with protocol and command, without headings.

    Returns:
        Whether there is a card, and it can be written to.

    Raises:
        UserError: the card cannot be read.
    """
    path = model / _CARD
    if not path.is_file() or not os.access(model, os.W_OK):
        return False
    card = _read(path)
    name, data = public_name(reference), _data_of(card)
    data.model_name = data.model_name or _title(card.text)
    data.eval_results = [
        EvalResult(
            task_type=data.pipeline_tag or "other",
            dataset_type=_public_data_set(reference) or re.sub(r"[^\w.-]+", "-", name) or "data",
            dataset_name=name,
            metric_type=figure.key,
            metric_name=figure.label,
            metric_value=figure.value,
            metric_args=None if figure.std is None else {"standard_error": figure.std},
        )
        for figure in figures
    ]
    section = f"\n{words.strip()}\n\n"
    if _EVALUATION.search(card.text):
        card.text = _EVALUATION.sub(lambda _: section, card.text, count=1)
    else:
        card.text = f"{card.text.rstrip()}\n\n## Evaluation\n{section}"
    _write(model, card)
    return True


def _data_of(card: ModelCard) -> ModelCardData:
    assert isinstance(card.data, ModelCardData)
    return card.data


def _title(text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else "mnif"


def _licence(data: str, model: Path) -> tuple[str, str | None]:
    """The licence of a data set by its name on the hub, and in words.

    Whoever learns from data of their own knows its licence, and this program does not: what an earlier card has been
    made to say stays.
    """
    if (known := builtin_licence(data)) is not None:
        return known
    said = None
    with contextlib.suppress(UserError):  # what cannot be read is written anew
        said = _data_of(_read(model / _CARD)).license
    if isinstance(said, str) and said != _UNKNOWN:
        return said, None
    named = markdown_code(public_name(data))
    return _UNKNOWN, f"None is stated: the licence of the data, {named}, tells what may be done with samples."


def _public_data_set(data: str) -> str | None:
    """The name of a data set that others can find, built in or on the hub; None for a path."""
    if data.startswith("hf:"):
        return data.split(":")[1]
    return data.partition(":")[0] if builtin_licence(data) is not None else None


def _metrics(recorded: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields numbers by name, nested ones as outer.inner; ``psnr`` in dB, times in seconds, memory in MB."""
    for name, value in sorted(recorded.items()):
        if isinstance(value, dict):
            yield from _metrics(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield markdown_code(f"{prefix}{name}"), f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
