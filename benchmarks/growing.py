"""What growing keeps and what it reaches: `mnif grow` beside fine-tuning, replay, and training anew.

    python benchmarks/growing.py --output_dir runs/growing --steps 1500

Learns Twemoji without people (designs that are not drawn in five skin tones), then people: grown with frozen bases,
grown with replay, fine-tuned, and anew on both for as many steps together. Writes the table to OUTPUT_DIR/growing.md;
a run that is there already is gone on with. docs/growing.md keeps the table.
"""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from mnif.data.batches import array_dataset
from mnif.data.images import load_images
from mnif.latents.inference import evaluate_latents, infer_latents, load_latent_init
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.registry import signal_of_model

REFINEMENT_STEPS = 60


@dataclass
class Arguments:
    """Train whatever is not there yet, and measure all of it."""

    output_dir: Path
    """Gets the data, the runs and the table."""
    steps: int = 1500
    """Of the old model, and of each that learns people after it; anew both are learned for twice as many."""
    resolution: int = 32
    """Pixels per axis."""
    num_bases: int = 64
    """Of the old model; a third of all."""
    latent_dim: int = 96
    """Of the old model."""
    add_bases: int = 32
    """What it is grown by."""
    add_latents: int = 32
    """What its latents are grown by."""
    flags: str = "--stride 2"
    """Further flags of every `mnif fit`."""
    learning: str = "--random_flip --random_colours"
    """Further flags of every `mnif fit` and `mnif grow`."""


def main(arguments: Arguments) -> None:
    """Trains, measures, and writes the table."""
    folder = arguments.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_data(folder, arguments.resolution)
    for name, command in commands(arguments).items():
        print(f"\n{name}: mnif {command}", flush=True)
        subprocess.run([sys.executable, "-m", "mnif", *command.split()], check=True)
    (folder / "growing.md").write_text(table(arguments))
    print((folder / "growing.md").read_text())


def write_data(folder: Path, resolution: int) -> None:
    """Cuts Twemoji into people, whose designs come in several skin tones, and things, and writes both and each."""
    if (folder / "both.npz").is_file():
        return
    data = load_images("twemoji", resolution)
    variants, ids, groups = Counter(data.groups), np.array(data.ids), np.array(data.groups)
    people = np.array([variants[group] > 1 for group in data.groups])
    for name, rows in {"things": ~people, "people": people, "both": people | ~people}.items():
        np.savez(folder / f"{name}.npz", images=data.images[rows], ids=ids[rows], groups=groups[rows])


def commands(arguments: Arguments) -> dict[str, str]:
    """The command behind each way, by its name."""
    folder, steps = arguments.output_dir, f"--max_train_steps {arguments.steps}"
    shared = f"{arguments.learning} --refinement_steps {REFINEMENT_STEPS}"
    whole = f"--num_bases {arguments.num_bases + arguments.add_bases}"
    whole += f" --latent_dim {arguments.latent_dim + arguments.add_latents}"
    fit = f"fit --resolution {arguments.resolution} {arguments.flags} {shared}"
    grow = f"grow --model {folder}/things/model --data {folder}/people.npz --add_bases {arguments.add_bases}"
    grow += f" --add_latents {arguments.add_latents} {shared} {steps}"
    things = f"--num_bases {arguments.num_bases} --latent_dim {arguments.latent_dim}"
    return {
        "things": f"{fit} --data {folder}/things.npz {things} {steps} --output_dir {folder}/things",
        "grown": f"{grow} --output_dir {folder}/grown",
        "finetuned": f"{grow} --replay --replay_weight 0 --earlier_learning_rate 1 --output_dir {folder}/finetuned",
        "both": f"{fit} --data {folder}/both.npz {whole} --max_train_steps {2 * arguments.steps}"
        f" --output_dir {folder}/both",
        "replayed": f"{grow} --replay --output_dir {folder}/replayed",
    }


WAYS = {
    "things": "the old model, things alone",
    "grown": "`mnif grow`",
    "replayed": "`mnif grow --replay`",
    "finetuned": "everything fine-tuned on people",
    "both": "anew on both, as many steps as the old model and its growth",
}


def table(arguments: Arguments) -> str:
    """Measures every way: PSNR in dB of old latents, and of held-out things and people found by encoder and search."""
    folder = arguments.output_dir
    old = load_component(MNIFModel, folder / "things/model", "decoder")
    lines = [
        "| way | old latents | the same bytes | held-out things, encoded anew | held-out people |",
        "|---|---|---|---|---|",
    ]
    for name, words in WAYS.items():
        model = folder / name / "model"
        decoder = load_component(MNIFModel, model, "decoder")
        kept, same = of_old_latents(decoder, old, folder) if name != "both" else (None, None)
        found = [held_out_psnr(decoder, model, folder / f"{data}.npz") for data in ("things", "people")]
        shown = "–" if kept is None else f"{kept:.2f}", "–" if same is None else "yes" if same else "no"
        lines.append(f"| {words} | {shown[0]} | {shown[1]} | {found[0]:.2f} | {found[1]:.2f} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


@torch.no_grad()
def of_old_latents(decoder: MNIFModel, old: MNIFModel, folder: Path) -> tuple[float, bool]:
    """PSNR of what the old table's latents decode to, against the things; and whether it is the very same bytes."""
    signal, path = signal_of_model(decoder), folder / "things/latents.safetensors"
    before, now = LatentTable.load_for(old, path), LatentTable.load_for(decoder, path)
    data = signal.load_like(str(folder / "things.npz"))
    place = {id: row for row, id in enumerate(data.ids)}
    rows = array_dataset(data.rows(np.array([place[id] for id in now.ids])).arrays())
    figures = evaluate_latents(decoder, signal, rows, now.latents)["psnr"]
    pairs = zip(before.latents.split(64), now.latents.split(64), strict=True)
    same = all(old(one).numpy().tobytes() == decoder(other).numpy().tobytes() for one, other in pairs)
    return figures.double().mean().item(), same


def held_out_psnr(decoder: MNIFModel, model: Path, source: Path) -> float:
    """Mean PSNR of the held-out part of a set, of latents found by the encoder and refined."""
    signal = signal_of_model(decoder)
    data = signal.load_like(str(source))
    rows = array_dataset(data.rows(data.held_out(0.1)).arrays())
    encoder = load_latent_init(model, decoder, signal)
    latents = torch.cat([*infer_latents(decoder, signal, rows, encoder, REFINEMENT_STEPS)])
    return evaluate_latents(decoder, signal, rows, latents)["psnr"].double().mean().item()


if __name__ == "__main__":
    main(tyro.cli(Arguments, use_underscores=True))
