"""Trials of stage two: variants of `mnif prior` and `mnif distill` on a fitted run, beside the controls.

    python benchmarks/priors.py --run runs/demo --variants default flow --seeds 0 1 2
    python benchmarks/priors.py --run runs/demo --variants default --seeds 0 1 2 --distill
    python benchmarks/priors.py --run runs/demo --table

Every trial is a line of RUN/priors.jsonl, so runs add up and one that was stopped goes on where it was; what was
trained stays in RUN/priors. docs/experiments.md and docs/performance.md keep the tables.
"""

import json
import shutil
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro
from judges import Judge, judge_of
from matplotlib import pyplot

from latent_prior.commands.distill import DistillArguments, distill
from latent_prior.commands.prior import fit_prior, parse_prior_arguments
from latent_prior.distillation import energy_distance
from latent_prior.pipeline import load_pipeline
from latent_prior.sampling import sample_latents
from mnif.utils.args import parse_arguments
from mnif.utils.files import write_json
from mnif.utils.json_files import read_json

VARIANTS = {
    "default": "",
    "flow": "--objective flow",
    "v": "--objective v",
    "edge": "--preset edge",
    "latent noise 0.2": "--latent_noise 0.2",
    "last weights": "--keep last",
    "1500 steps": "--max_train_steps 1500",
    "3000 steps": "--max_train_steps 3000",
    "edge, 4000 steps": "--preset edge --max_train_steps 4000",
    "edge, 4000 steps, no dropout": "--preset edge --max_train_steps 4000 --dropout 0 --learning_rate 2e-3",
    "edge, 2500 steps": "--preset edge --max_train_steps 2500",
    "edge, 2500 steps, augmented": "--preset edge --max_train_steps 2500 --augment",
    "edge, 6000 steps, augmented": "--preset edge --max_train_steps 6000 --augment",
    "512 x 6, 6000 steps, augmented": (
        "--depth 6 --dropout 0 --max_train_steps 6000 --validation_steps 500 --augment --mixed_precision bf16"
    ),
    "transformer, 1500 steps, augmented": (
        "--preset transformer-edge --max_train_steps 1500 --validation_steps 500 --augment --mixed_precision bf16"
    ),
    "transformer, 15000 steps, augmented": (
        "--preset transformer-edge --max_train_steps 15000 --validation_steps 1000 --augment --mixed_precision bf16"
    ),
    "transformer, 40000 steps, augmented": (
        "--preset transformer-edge --max_train_steps 40000 --validation_steps 2000 --augment --mixed_precision bf16"
    ),
    "1600 steps, last weights": "--keep last --max_train_steps 1600",
}


@dataclass
class Arguments:
    """Run trials, or print the table of those that were."""

    run: Path
    """A run folder in which `mnif fit` has finished."""
    variants: list[str] = field(default_factory=lambda: ["default"])
    """Of those in this file."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each variant is trained with each, and draws its samples with it."""
    steps: list[int] = field(default_factory=lambda: [20])
    """Of sampling; a line for each."""
    num_samples: int = 1000
    """That distances are taken over."""
    distill: bool = False
    """Also distil a student, and measure it."""
    distill_flags: str = ""
    """Of `mnif distill`, in one string."""
    table: bool = False
    """Print the results as Markdown and do nothing else."""
    plot: Path | None = None
    """Draw distance against novelty of all trials to this PNG and do nothing else."""


def main(arguments: Arguments) -> None:
    results = arguments.run / "priors.jsonl"
    if arguments.table or arguments.plot:
        if arguments.table:
            print(table(results))
        if arguments.plot:
            plot(results, arguments.plot)
        return
    judge = judge_of(arguments.run)
    if not lines_of(results):
        for name, metrics in judge.controls(arguments.num_samples).items():
            record(results, {"variant": "controls", "seed": 0, "drawn": name, "figures": metrics})
    for variant in arguments.variants:
        for seed in arguments.seeds:
            trial(arguments, judge, variant, seed, results)


def trial(arguments: Arguments, judge: Judge, variant: str, seed: int, results: Path) -> None:
    """Trains what is missing of one variant with one seed, and measures what was not."""
    known = {(line["variant"], line["seed"], line["drawn"]) for line in lines_of(results)}
    run = arguments.run / "priors" / f"{slug(variant)}-{seed}"
    copied(arguments.run, run, ["fit"])
    fit_prior(parse_prior_arguments(["--run", str(run), "--seed", str(seed), *VARIANTS[variant].split()]))
    wanted = [(f"teacher, {steps} steps", steps, False) for steps in arguments.steps]
    if arguments.distill:
        teacher, run = run, run / "students" / (slug(arguments.distill_flags) or "default")
        copied(teacher, run, ["fit", "prior"])
        typed = ["--run", str(run), "--seed", str(seed), *arguments.distill_flags.split()]
        distill(parse_arguments(DistillArguments, typed, "mnif distill"))
        students = load_pipeline(run / "model").student.config.distilled_steps
        wanted += [(f"student, {steps} steps {arguments.distill_flags}".strip(), steps, True) for steps in students]
    for drawn, steps, use_student in wanted:
        if (variant, seed, drawn) in known:
            continue
        pipeline = load_pipeline(run / "model")
        pipeline.set_progress_bar_config(disable=True)
        started = time.perf_counter()
        latents = sample_latents(pipeline, seed, range(arguments.num_samples), steps, use_student=use_student)
        metrics = {"seconds_of_drawing": time.perf_counter() - started} | judge.of_latents(latents.numpy())
        standardised = (pipeline.denoiser.standardised(some) for some in (latents, judge.table.train[::2]))
        metrics["energy_distance"] = energy_distance(*standardised)
        stage = read_json(run / "metrics.json")
        for name in ("prior", "distill"):
            metrics |= {f"{name}_{key}": value for key, value in stage.get(name, {}).items()}
        record(results, {"variant": variant, "seed": seed, "drawn": drawn, "figures": metrics})


def slug(text: str) -> str:
    return "-".join(text.replace("-", " ").replace("/", " ").split())


def copied(source: Path, run: Path, stages: list[str]) -> None:
    """A run folder that has what ``stages`` made in another."""
    if run.exists():
        return
    run.mkdir(parents=True)
    shutil.copytree(source / "model", run / "model", ignore=shutil.ignore_patterns("student*"))
    if (index := run / "model/model_index.json").exists():
        parts = {name: part for name, part in read_json(index).items() if not name.startswith("student")}
        write_json(index, parts)
    shutil.copy(source / "latents.safetensors", run)
    recorded, metrics = read_json(source / "run.json"), read_json(source / "metrics.json")
    write_json(run / "run.json", {stage: recorded[stage] for stage in stages})
    left_out = {"prior", "distill"} - set(stages)
    write_json(run / "metrics.json", {key: metrics[key] for key in metrics.keys() - left_out})


def record(results: Path, line: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = {name: value for name, value in line["figures"].items() if name in SHOWN}
    print(line["variant"], line["seed"], line["drawn"], shown, flush=True)


def lines_of(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


SHOWN = (
    *("fd_lite0", "nna_chamfer", "mmd_chamfer", "cov_chamfer", "nn_ratio", "nn_ratio_latents"),
    *("energy_distance", "prior_validation_loss", "prior_denoiser_parameters", "prior_seconds"),
)


def table(results: Path) -> str:
    """Means over seeds, with the standard deviation where there are several."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for line in lines_of(results):
        groups[line["variant"], line["drawn"]].append(line["figures"])
    columns = [name for name in SHOWN if any(name in metrics for (metrics, *_) in groups.values())]
    rows = [f"| variant | drawn by | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for (variant, drawn), found in groups.items():
        cells = []
        for name in columns:
            values = [metrics[name] for metrics in found if name in metrics]
            spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4g}{spread}" if values else "")
        rows.append(f"| {variant} | {drawn} | {len(found)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def plot(results: Path, path: Path) -> None:
    """How near samples are to the data against how far they stay from training latents; seeds are averaged."""
    groups: dict[str, list[dict[str, float]]] = defaultdict(list)
    for line in lines_of(results):
        if line["drawn"] in ("teacher, 20 steps", "gaussian", "real") or line["drawn"].startswith("student"):
            student = line["drawn"].split(" ")[1] + "-step student" if line["drawn"].startswith("student") else ""
            name = line["drawn"] if line["variant"] == "controls" else student or line["variant"]
            groups[name].append(line["figures"])
    distance = next(name for name in SHOWN if all(name in metrics for (metrics, *_) in groups.values()))
    figure, axes = pyplot.subplots(figsize=(9.5, 5), layout="constrained")
    axes.axhline(groups.pop("real")[0][distance], color="grey", linestyle="--", label="real against real")
    axes.axvline(0.9, color="grey", linestyle=":", label="further left: copies")
    places = {
        name: tuple(statistics.mean(metrics[key] for metrics in found) for key in ("nn_ratio_latents", distance))
        for name, found in groups.items()
    }
    for number, (name, (x, y)) in enumerate(sorted(places.items(), key=lambda item: item[1]), start=1):
        marker = "^" if "student" in name else "s" if name == "gaussian" else "o"
        axes.plot(x, y, marker, color=f"C{number % 10}", label=f"{number} {name}")
        axes.annotate(str(number), (x, y), xytext=(-3, 7), textcoords="offset points", fontsize=8)
    axes.set(xlabel="nn_ratio_latents: 1 is as far from training latents as held-out ones", ylabel=distance)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
