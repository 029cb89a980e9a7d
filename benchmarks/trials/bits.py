"""What the noise on latents buys: fidelity by the bits of an instance, and how far a short prior's samples are.

    python benchmarks/trials/bits.py --data twemoji --flags="--random_flip --random_colours"
    python benchmarks/trials/bits.py --data avatars
    python benchmarks/trials/bits.py --table --plot docs/images/bits.png

Every noise is a run of `mnif fit` and `mnif prior` in --output_dir, and a line of its bits.jsonl, so runs add up and
one that was stopped goes on where it was. docs/experiments.md keeps the table.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib import pyplot

from latent_prior.commands.prior import fit_prior, parse_prior_arguments
from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import sample_latents
from mnif.commands.fit import fit, parse_fit_arguments
from mnif.utils.json_files import read_json

sys.path.append(str(Path(__file__).parents[1]))
from judges import judge_of


@dataclass
class Arguments:
    """Run the trials of one data set, or show all of those that were."""

    data: str = "twemoji"
    """Pictures, as for `mnif fit`."""
    resolution: int = 32
    """As for `mnif fit`."""
    noises: tuple[float, ...] = (0.05, 0.1, 0.3, 0.6)
    """Standard deviations, where a latent's numbers have 1."""
    steps: int = 800
    """Of stage one."""
    prior_steps: int = 1500
    """Of stage two, at --preset edge."""
    flags: str = ""
    """Further flags of `mnif fit`, in one string."""
    num_samples: int = 1000
    """That distances are taken over."""
    output_dir: Path = Path("runs/bits")
    """Of the runs."""
    table: bool = False
    """Print the results as Markdown and do nothing else."""
    plot: Path | None = None
    """Draw them to this PNG and do nothing else."""


def main(arguments: Arguments) -> None:
    results = arguments.output_dir / "bits.jsonl"
    if arguments.table:
        print(table(lines_of(results)))
    if arguments.plot:
        plot(lines_of(results), arguments.plot)
    if arguments.table or arguments.plot:
        return
    known = {(line["data"], line["noise"]) for line in lines_of(results)}
    for noise in arguments.noises:
        if (arguments.data, noise) not in known:
            line = {"data": arguments.data, "noise": noise} | trial(arguments, noise)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(line, flush=True)


def trial(arguments: Arguments, noise: float) -> dict[str, float]:
    """Trains both stages at one noise, and measures reconstructions and samples."""
    run = arguments.output_dir / f"{arguments.data}-{noise}"
    typed = ["--data", arguments.data, "--output_dir", str(run), "--resolution", str(arguments.resolution)]
    typed += ["--latent_noise", str(noise), "--max_train_steps", str(arguments.steps), *arguments.flags.split()]
    fit(parse_fit_arguments([*typed, "--refinement_steps", "0", "--validation_steps", str(arguments.steps)]))
    steps = ["--max_train_steps", str(arguments.prior_steps)]
    fit_prior(parse_prior_arguments(["--run", str(run), "--preset", "edge", *steps]))
    judge, pipeline = judge_of(run), load_pipeline(run / "model")
    pipeline.set_progress_bar_config(disable=True)
    drawn = judge.of_latents(sample_latents(pipeline, 0, range(arguments.num_samples)).numpy())
    some = np.random.default_rng(0).permutation(len(judge.table.train))[: arguments.num_samples]
    learned = judge.of_latents(judge.table.train[some].numpy())
    fitted = read_json(run / "metrics.json")
    return {
        "bits": fitted["bits_per_instance"],
        "psnr_train": fitted["psnr_train"],
        "psnr_heldout_encoder": fitted.get("psnr_heldout_encoder", fitted["psnr_heldout"]),
        "fd_reconstructions": learned[judge.distance],
        "fd_samples": drawn[judge.distance],
        "precision": drawn["precision"],
        "recall": drawn["recall"],
        "nn_ratio_latents": drawn["nn_ratio_latents"],
    }


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def table(lines: list[dict[str, Any]]) -> str:
    columns = [name for name in lines[0] if name not in ("data", "noise")]
    rows = [f"| data | noise | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for line in sorted(lines, key=lambda line: (line["data"], line["noise"])):
        cells = [f"{line[name]:.2f}" if line[name] < 10 else f"{line[name]:.1f}" for name in columns]
        rows.append(f"| {line['data']} | {line['noise']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Fidelity and distances against the bits of an instance."""
    figure, (fidelity, distance) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    by_data: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in sorted(lines, key=lambda line: line["bits"]):
        by_data[line["data"]].append(line)
    for color, (data, points) in zip(("C0", "C1", "C2", "C3"), by_data.items(), strict=False):
        bits = [point["bits"] for point in points]
        fidelity.plot(bits, [point["psnr_heldout_encoder"] for point in points], "o-", color=color, label=data)
        distance.plot(bits, [point["fd_samples"] for point in points], "o-", color=color, label=f"{data}, samples")
        of_training = [point["fd_reconstructions"] for point in points]
        distance.plot(bits, of_training, "s--", color=color, label=f"{data}, training pictures")
    fidelity.set(xlabel="bits of an instance", ylabel="PSNR of held-out pictures, encoder, dB")
    distance.set(xlabel="bits of an instance", ylabel="fd_lite0", ylim=(0, None))
    for axes in (fidelity, distance):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
