"""What growing keeps and what it reaches: `mnif grow` beside fine-tuning, replay, and training anew.

    python benchmarks/growing.py --output_dir runs/growing --steps 1500
    python benchmarks/growing.py --output_dir runs/seats --data furniture --resolution 16 --steps 250 --flags=

Learns a part of a built-in set (Twemoji without people, the designs that are drawn in five skin tones; furniture
without seats), then the rest: grown with frozen bases, grown with replay, fine-tuned, and anew on both for as many
steps together. Writes the tables to OUTPUT_DIR/growing.md, for docs/growing.md; a run that is there is gone on with.
"""

import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor

from evals.metrics.neighbours import nearest_neighbour_distances
from latent_prior.distillation import energy_distance
from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import sample_latents
from mnif.data.batches import array_dataset
from mnif.data.dataset import Split
from mnif.data.images import load_images
from mnif.data.voxels import load_voxels
from mnif.latents.inference import evaluate_latents, infer_latents, load_latent_init
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model

REFINEMENT_STEPS = 60
SAMPLES = 512

PARTS = {"twemoji": ("things", "people"), "furniture": ("others", "seats")}  # what is learned first, and then
SEATS = re.compile("chair|sofa|bench|stool|couch|seat|settee")


@dataclass
class Arguments:
    """Train whatever is not there yet, and measure all of it."""

    output_dir: Path
    """Gets the data, the runs and the tables."""
    data: Literal["twemoji", "furniture"] = "twemoji"
    """The set that is learned in two parts."""
    steps: int = 1500
    """Of the old model, and of each that learns the rest after it; anew both are learned for twice as many."""
    resolution: int = 32
    """Pixels or cells per axis."""
    num_bases: int = 64
    """Of the old model."""
    latent_dim: int = 96
    """Of the old model."""
    add_bases: int = 32
    """What it is grown by."""
    add_latents: int = 32
    """What its latents are grown by."""
    prior_steps: int = 0
    """Of a prior of the old model, and of each that goes on with it or begins anew; 0: none is learned."""
    flags: str = "--stride 2"
    """Further flags of every `mnif fit`."""
    learning: str | None = None
    """Further flags of every `mnif fit` and `mnif grow`; default: --random_flip, of pictures --random_colours too."""
    prior_flags: str = "--preset edge"
    """Further flags of every `mnif prior`."""
    seed: int = 0
    """Of everything that is learned; the data are cut in the same way."""


def main(arguments: Arguments) -> None:
    """Trains, measures, and writes the tables."""
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, arguments.data, arguments.resolution)
    for name, command in commands(arguments).items():
        if name == "prior of scratch" and not (folder / "scratch").is_dir():
            shutil.copytree(folder / "grown", folder / "scratch")
        print(f"\n{name}: mnif {command}", flush=True)
        subprocess.run([sys.executable, "-m", "mnif", *command.split()], check=True)
    text = table(arguments)
    if arguments.prior_steps:
        text += "\n" + samples_table(arguments)
    (folder / "growing.md").write_text(text)
    print(text)


def write_data(folder: Path, source: str, resolution: int) -> None:
    """Cuts a set into what is learned first and what is learned then, and writes both and each."""
    if (folder / "both.npz").is_file():
        return
    if source == "twemoji":
        data = load_images(source, resolution)
        variants = Counter(data.groups)
        values, later = {"images": data.images}, np.array([variants[group] > 1 for group in data.groups])
    else:
        data = load_voxels(source, resolution)
        values, later = {"voxels": data.occupancy()}, np.array([bool(SEATS.search(id.lower())) for id in data.ids])
    old, new = PARTS[source]
    ids, groups = np.array(data.ids), np.array(data.groups)
    for name, rows in {old: ~later, new: later, "both": later | ~later}.items():
        parts = {kind: array[rows] for kind, array in values.items()}
        np.savez_compressed(folder / f"{name}.npz", **parts, ids=ids[rows], groups=groups[rows])
        print(f"{name}: {rows.sum()}", flush=True)


def commands(arguments: Arguments) -> dict[str, str]:
    """The command behind each way, by its name; the prior of the old model is learned before that grows."""
    folder, steps = arguments.output_dir, f"--max_train_steps {arguments.steps} --seed {arguments.seed}"
    old, new = PARTS[arguments.data]
    learning = arguments.learning or "--random_flip" + " --random_colours" * (arguments.data == "twemoji")
    shared = f"{learning} --refinement_steps {REFINEMENT_STEPS}"
    whole = f"--num_bases {arguments.num_bases + arguments.add_bases}"
    whole += f" --latent_dim {arguments.latent_dim + arguments.add_latents}"
    fit = f"fit --resolution {arguments.resolution} {arguments.flags} {shared}"
    grow = f"grow --model {folder}/old/model --data {folder}/{new}.npz --add_bases {arguments.add_bases}"
    grow += f" --add_latents {arguments.add_latents} {shared} {steps}"
    first = f"--num_bases {arguments.num_bases} --latent_dim {arguments.latent_dim}"
    every = {
        "old": f"{fit} --data {folder}/{old}.npz {first} {steps} --output_dir {folder}/old",
        "grown": f"{grow} --output_dir {folder}/grown",
        "finetuned": f"{grow} --replay --replay_weight 0 --earlier_learning_rate 1 --output_dir {folder}/finetuned",
        "both": f"{fit} --data {folder}/both.npz {whole} --max_train_steps {2 * arguments.steps}"
        f" --seed {arguments.seed} --output_dir {folder}/both",
        "replayed": f"{grow} --replay --output_dir {folder}/replayed",
    }
    if not arguments.prior_steps:
        return every
    prior = f"prior {arguments.prior_flags} --max_train_steps {arguments.prior_steps} --seed {arguments.seed}"
    own = {f"prior of {name}": f"{prior} --run {folder}/{name}" for name in ("old", "scratch", "grown", "both")}
    own["prior of scratch"] += " --from_scratch"
    return {"old": every.pop("old"), "prior of old": own.pop("prior of old")} | every | own


WAYS = {
    "old": "the old model, {old} alone",
    "grown": "`mnif grow`",
    "replayed": "`mnif grow --replay`",
    "finetuned": "everything fine-tuned on {new}",
    "both": "anew on both, as many steps as the old model and its growth",
}


def table(arguments: Arguments) -> str:
    """Measures every way: old latents, and held-out instances of both parts, found by encoder and search."""
    folder, (part, rest) = arguments.output_dir, PARTS[arguments.data]
    old = load_component(MNIFModel, folder / "old/model", "decoder")
    lines = [
        f"| way | old latents | the same bytes | held-out {part}, encoded anew | held-out {rest} |",
        "|---|---|---|---|---|",
    ]
    for name, words in WAYS.items():
        model = folder / name / "model"
        decoder = load_component(MNIFModel, model, "decoder")
        kept, same = of_old_latents(decoder, old, folder, part) if name != "both" else ("–", None)
        found = [held_out_quality(decoder, model, folder / f"{data}.npz") for data in (part, rest)]
        shown = "–" if same is None else "yes" if same else "no"
        lines.append(f"| {words.format(old=part, new=rest)} | {kept} | {shown} | {found[0]} | {found[1]} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def quality_of(figures: dict[str, Tensor]) -> str:
    """The mean IoU of shapes, the mean PSNR in dB of all else."""
    name, digits = ("iou", 3) if "iou" in figures else ("psnr", 2)
    return f"{figures[name].double().mean().item():.{digits}f}"


@torch.no_grad()
def of_old_latents(decoder: MNIFModel, old: MNIFModel, folder: Path, part: str) -> tuple[str, bool]:
    """Quality of what the old table's latents decode to, against what was learned; whether it is the same bytes."""
    signal, path = signal_of_model(decoder), folder / "old/latents.safetensors"
    before, now = LatentTable.load_for(old, path), LatentTable.load_for(decoder, path)
    data = signal.load_like(str(folder / f"{part}.npz"))
    place = {id: row for row, id in enumerate(data.ids)}
    rows = array_dataset(data.rows(np.array([place[id] for id in now.ids])).arrays())
    quality = quality_of(evaluate_latents(decoder, signal, rows, now.latents))
    pairs = zip(before.latents.split(64), now.latents.split(64), strict=True)
    same = all(old(one).numpy().tobytes() == decoder(other).numpy().tobytes() for one, other in pairs)
    return quality, same


def held_out_quality(decoder: MNIFModel, model: Path, source: Path) -> str:
    """Mean quality of the held-out part of a set, of latents found by the encoder and refined."""
    signal = signal_of_model(decoder)
    data = signal.load_like(str(source))
    rows = array_dataset(data.rows(data.held_out(0.1)).arrays())
    encoder = load_latent_init(model, decoder, signal)
    latents = torch.cat([*infer_latents(decoder, signal, rows, encoder, REFINEMENT_STEPS)])
    return quality_of(evaluate_latents(decoder, signal, rows, latents))


PRIORS = {
    "old": "of the old model",
    "grown": "of `mnif grow`, gone on with",
    "scratch": "of `mnif grow`, from scratch",
    "both": "of the model learned anew on both",
}


def samples_table(arguments: Arguments) -> str:
    """Measures samples: energy distances from held-out instances of both parts, and how many are of the new one."""
    folder, parts = arguments.output_dir, PARTS[arguments.data]
    known, held_out = (
        [values_of(arguments, part, split) for part in parts] for split in (Split.TRAIN, Split.HELD_OUT)
    )
    share = len(known[1]) / sum(map(len, known))
    lines = [
        f"| prior | from held-out {parts[0]} | from held-out {parts[1]} | from both | samples nearest to {parts[1]} |",
        "|---|---|---|---|---|",
    ]
    drawn = {words: samples_of(folder / name / "model") for name, words in PRIORS.items()}
    rows = torch.linspace(0, sum(map(len, known)) - 1, SAMPLES).round().long()
    for words, values in (drawn | {"floor: training instances of both": torch.cat(known)[rows]}).items():
        distances = [energy_distance(values, truth) for truth in (*held_out, torch.cat(held_out))]
        _, nearest = nearest_neighbour_distances(values.numpy(), torch.cat(known).numpy())
        new = f"{np.mean(nearest >= len(known[0])):.0%}" if words in drawn else f"{share:.0%}"
        lines.append(f"| {words} | {' | '.join(f'{distance:.3f}' for distance in distances)} | {new} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def values_of(arguments: Arguments, part: str, split: Split) -> Tensor:
    """The instances of one side of a part's split, their values over the root of their number: [N, values]."""
    decoder = load_component(MNIFModel, arguments.output_dir / "old/model", "decoder")
    signal = signal_of_model(decoder)
    data = signal.load_like(str(arguments.output_dir / f"{part}.npz"))
    rows = array_dataset(data.rows(data.split(0.1, 0.05) == split).arrays())
    values = torch.cat([signal.observe(batch).values for batch in rows.batches(64)]).flatten(1)
    return values / values.shape[1] ** 0.5


@torch.no_grad()
def samples_of(model: Path) -> Tensor:
    """Draws samples, as :func:`values_of` gives instances; the bounds of their values are kept."""
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    latents = sample_latents(pipeline, 0, range(SAMPLES))
    values = torch.cat([pipeline.decoder(some) for some in latents.split(64)]).clamp(-1, 1).flatten(1)
    return values / values.shape[1] ** 0.5


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
