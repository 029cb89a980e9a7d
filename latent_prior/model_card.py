"""The model card: what a model was learned from and how, what was measured, and under which licence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mnif import __version__
from mnif.files import read_json, written_atomically
from mnif.latents import LatentTable
from mnif.model_folder import load_component
from mnif.modeling import MNIFModel

# Of the built-in sets; whoever learns from data of their own knows its licence, and this program does not.
_LICENCES = {
    "twemoji": ("cc-by-4.0", "Twemoji artwork, © Twitter, Inc. and other contributors, CC-BY 4.0"),
    "furniture": ("cc-by-3.0", "Sweet Home 3D's libraries, CC0 and CC-BY 3.0"),
    "furniture-views": ("cc-by-3.0", "Sweet Home 3D's libraries, CC0 and CC-BY 3.0"),
}
_PIPELINE_TAGS = {"image": "unconditional-image-generation"}
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

`{{ data }}`: {{ train }} instances to train, {{ held_out }} held out to choose weights by, the rest (if any) never
looked at. SHA-256 of the data as read: `{{ fingerprint }}`.

## How it was made

```sh
{{ commands }}
```

## Figures

{{ figures }}

{{ evaluation }}

## Licence

{{ licence }}
"""


def write_model_card(run: Path) -> None:
    """Writes ``run/model/README.md`` from what the run has recorded so far."""
    card = model_card(run)
    with written_atomically(run / "model" / "README.md") as temporary:
        temporary.write_text(str(card).rstrip() + "\n")


def model_card(run: Path) -> ModelCard:
    """The card of the model in a run folder.

    Raises:
        UserError: the run folder lacks a finished stage one.
    """
    record, metrics = read_json(run / "run.json"), read_json(run / "metrics.json")
    decoder = load_component(MNIFModel, run / "model", "decoder")
    table = LatentTable.load(run / "latents.safetensors", decoder.fingerprint())
    licence, words = _LICENCES.get(table.data, (None, None))
    evaluated = run / "eval" / "metrics.json"
    figures = [f"- {name}: {value}" for name, value in _figures(metrics)]
    return ModelCard.from_template(
        ModelCardData(
            license=licence,
            library_name="diffusers",
            pipeline_tag=_PIPELINE_TAGS.get(decoder.config.signal),
            tags=["mnif", "neural-fields", "implicit-neural-representations", decoder.config.signal],
        ),
        template_str=_TEMPLATE,
        name=run.resolve().name,
        signal=decoder.config.signal,
        latent_dim=decoder.config.latent_dim,
        version=__version__,
        data=table.data,
        train=len(table.train),
        held_out=int(table.held_out.sum()),
        fingerprint=record.get("fit", {}).get("inputs", {}).get("data_fingerprint", "unknown"),
        commands="\n".join(record[stage]["command"] for stage in _STAGES if stage in record),
        figures="\n".join(figures),
        evaluation=_evaluation(read_json(evaluated)) if evaluated.exists() else "Samples have not been measured yet.",
        licence=words
        or f"None is stated: the licence of the data, {table.data}, tells what may be done with samples.",
    )


def _figures(recorded: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Numbers by name, those within others' as outer.inner; ``psnr`` in dB, times in seconds, memory in MB."""
    for name, value in sorted(recorded.items()):
        if isinstance(value, dict):
            yield from _figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"`{prefix}{name}`", f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _evaluation(recorded: dict[str, Any]) -> str:
    """What `mnif eval` measured, beside its protocol and the command."""
    protocol = ", ".join(f"{name} {value}" for name, value in sorted(recorded.get("protocol", {}).items()))
    measured = {name: value for name, value in recorded.items() if name not in ("protocol", "inputs")}
    lines = [f"- {name}: {value}" for name, value in _figures(measured)]
    head = f"Measured by `{recorded['command']}`" + (f" ({protocol})" if protocol else "") + ":"
    return "\n".join([head, "", *lines])
