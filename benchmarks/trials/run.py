"""Trials of stage one: candidates of variants.py on a data set, beside the default, at equal steps.

    python benchmarks/trials/run.py --variants default "mixed first layer" --seeds 0 1 2
    python benchmarks/trials/run.py --table

Every trial is one line of the results file, so runs add up and one that was stopped goes on where it was. What is
measured on are held-out instances; the test split is never looked at. docs/experiments.md keeps the tables.
"""

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from losses import PointLoss
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from variants import VARIANTS, Variant

from evals.features import extractor_by_name
from evals.features.extractor import extract_features
from evals.features.resize import bicubic_antialias
from evals.metrics.frechet import frechet_distance_from_features
from evals.metrics.reconstruction import border_step_ratio
from mnif.commands.fit import parse_fit_arguments
from mnif.data.batches import ArrayDataset, ShuffledBatches, array_dataset, evenly_spaced, instance_keys
from mnif.data.dataset import Split
from mnif.latents.inference import evaluate_latents, infer_latents
from mnif.models.cell_grid import CellGrid
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import GridSignal, Observation, Signal
from mnif.signals.image import Image
from mnif.signals.registry import signal_class
from mnif.training.assembly import cells_and_tokens, make_method
from mnif.training.fit_arguments import DECODER_SETTINGS
from mnif.training.methods import EncoderMethod, LearningMethod, make_optimizers
from mnif.training.tied_sets import tie_sets
from mnif.utils.pixels import to_uint8
from mnif.utils.process import progress_bar

from muon import Muon  # isort: skip


@dataclass
class Arguments:
    """Run trials, or print the table of those in the results file."""

    variants: list[str] = field(default_factory=lambda: ["default"])
    """Names of variants.py."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Each variant is run with each."""
    data: str = "twemoji"
    """As for `mnif fit`."""
    resolution: int | None = None
    """As for `mnif fit`."""
    steps: int = 1200
    """Optimizer steps of a trial."""
    flags: str = ""
    """Further flags of `mnif fit` for all, in one string."""
    results: Path = Path("runs/trials.jsonl")
    """One line of JSON for each trial."""
    table: bool = False
    """Print the results as Markdown and do nothing else."""


def main(arguments: Arguments) -> None:
    if arguments.table:
        print(table(arguments.results))
        return
    done = {_key(line) for line in _lines(arguments.results)}
    for name in arguments.variants:
        for seed in arguments.seeds:
            setting = {"data": arguments.data, "resolution": arguments.resolution, "steps": arguments.steps}
            setting |= {"flags": arguments.flags, "variant": name, "seed": seed}
            if _key(setting) in done:
                continue
            line = setting | trial(VARIANTS[name], setting)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


def trial(variant: Variant, setting: dict[str, Any]) -> dict[str, float]:
    """Trains once and measures."""
    typed = ["--data", setting["data"], "--output_dir", "unused", "--seed", str(setting["seed"])]
    typed += ["--resolution", str(setting["resolution"])] if setting["resolution"] else []
    fit = parse_fit_arguments([*typed, "--max_train_steps", str(setting["steps"]), *setting["flags"].split()])
    fit = replace(fit, **variant.arguments)
    kind = signal_class(fit.signal)
    data = kind.load(fit.data, asdict(fit))
    signal = kind.from_data(data, asdict(fit))
    fit.cells, fit.tokens = cells_and_tokens(fit, signal)
    splits = data.split(fit.held_out_fraction, fit.test_fraction)
    train_rows, held_rows = (
        array_dataset(data.rows(splits == split).arrays()) for split in (Split.TRAIN, Split.HELD_OUT)
    )

    torch.manual_seed(fit.seed)
    decoder = variant.decoder(
        channels=signal.channels,
        dimensions=signal.dimensions,
        resolution=signal.grid_resolution,
        latent_dim=fit.latent_dim,
        signal=signal.name,
        signal_settings=signal.settings(),
        **{name: getattr(fit, name) for name in DECODER_SETTINGS},
    )
    variant.prepare(decoder)
    method = make_method(fit, decoder, signal, len(train_rows))
    if variant.noise is not None:
        assert isinstance(method, EncoderMethod)
        variant.noise(method)
    if variant.augment is not None:
        mirrored, augment = signal.augmented, variant.augment
        signal.augmented = lambda observation: _with_values(mirrored(observation), augment)
    if variant.errors != "shares":
        errors = ERRORS[variant.errors]
        signal.per_instance_loss = lambda *of: errors(signal, *of)
    if variant.point_loss is not None:
        point_loss = variant.point_loss
        signal.per_instance_loss = lambda *of: _point_losses(signal, point_loss, *of)
    if variant.border_weight:
        method.register_forward_hook(_BorderLoss(decoder, variant.border_weight))
    started = time.process_time()
    _train(fit, variant, method, train_rows)
    seconds = time.process_time() - started
    vars(signal).pop("per_instance_loss", None)  # all latents are refined by the product's loss
    method.eval()
    return {"cpu_seconds": round(seconds, 1)} | _measured(fit, method, train_rows, held_rows)


def _with_values(observation: Observation, change: Callable[[Tensor], Tensor]) -> Observation:
    return replace(observation, values=change(observation.values))


def _train(fit: Any, variant: Variant, method: LearningMethod, rows: ArrayDataset) -> None:
    """The product's loop without checkpoints: same batches, clipping and schedule."""
    use_muon = fit.matrix_optimizer == "muon"
    usual = make_optimizers(method, fit.learning_rate, fit.basis_learning_rate, fit.adam_beta2, use_muon)
    optimizers = [*_muon(variant, method), *usual]
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parameters = list(method.parameters())
    tie_sets(method.decoder, lambda: method.decoder.progress)
    batches = ShuffledBatches(len(rows), fit.train_batch_size, fit.seed, 0, fit.max_train_steps)
    for step, batch in enumerate(progress_bar(batches, desc="trial", unit="step")):
        torch.manual_seed(fit.seed * 1_000_003 + step)
        method.decoder.progress = step / fit.max_train_steps
        inputs = rows.__getitems__(batch)
        loss = method(key=instance_keys(fit.seed, step, inputs["row"]), **inputs)
        loss.backward()
        clip_grad_norm_(parameters, fit.max_grad_norm)
        factor = _cosine(step, fit.lr_warmup_steps, fit.max_train_steps)
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group, rate in zip(optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * factor
            optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def _cosine(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return step / warmup
    return 0.5 * (1 + torch.cos(torch.tensor((step - warmup) / max(steps - warmup, 1) * torch.pi)).item())


def _muon(variant: Variant, method: LearningMethod) -> list[torch.optim.Optimizer]:
    """Muon for what the variant names; Adam skips it, since it no longer is a parameter with a gradient of its own."""
    decoder = method.decoder
    taken: list[torch.optim.Optimizer] = []
    if "bases" in variant.muon:
        layers = [
            (bases, decoder.shapes[layer]) for bases, layer in zip(decoder.bases, decoder.mixed_layers, strict=True)
        ]
        hidden = [(bases, shape) for bases, shape in layers if shape.inputs == shape.outputs]
        taken.append(Muon(hidden, variant.muon["bases"]))
    matrices = [parameter for parameter in method.others() if parameter.ndim == 2]
    chosen = {"map": [], "encoder": matrices, "narrow": [matrix for matrix in matrices if min(matrix.shape) <= 256]}
    for name in chosen.keys() & variant.muon.keys():
        both = [*chosen[name], decoder.coefficient_map.weight]
        taken.append(Muon([(matrix, None) for matrix in both], variant.muon[name]))
    return taken


class _BorderLoss:
    """Adds the squared difference of neighbouring fields, weighted towards the border, to the loss of a step."""

    def __init__(self, decoder: MNIFModel, weight: float):
        self.weight, self.difference = weight, torch.zeros(())
        original = CellGrid.blend

        def blend(grid: CellGrid, values: Tensor) -> Tensor:
            self.difference = _neighbours_differ(grid, values)
            return original(grid, values)

        decoder.decode_coefficients = lambda coefficients, grid: blend(  # type: ignore[method-assign]
            grid, decoder.bake(coefficients)(grid.coordinates).view(len(coefficients), -1, *_tail(decoder, grid))
        )

    def __call__(self, module: nn.Module, inputs: Any, loss: Tensor) -> Tensor:
        return loss + self.weight * self.difference


def _even_errors(signal: GridSignal, decoder: MNIFModel, latents: Tensor, part: Observation) -> Tensor:
    """The error of every field at its own points, all of which count alike where there is a pixel, [B]."""
    grid = decoder.grid(signal.resolution, *part.query)
    weights = (grid.weights > 0).float() / (grid.weights > 0).sum()
    field = decoder.bake(decoder.coefficients(latents))
    errors = field.errors(grid.coordinates, grid.gather_points(part.values).flatten(0, 1), weights)
    return errors.view(len(latents), -1).sum(dim=1)


ERRORS = {"blended": Signal.per_instance_loss, "even": _even_errors}


def _point_losses(
    signal: GridSignal, loss: PointLoss, decoder: MNIFModel, latents: Tensor, part: Observation
) -> Tensor:
    """Another loss than the squared error, of every field at its own points by their shares of pixels, [B]."""
    grid = decoder.grid(signal.resolution, *part.query)
    places = (len(latents), -1, *grid.points_per_axis)
    values = decoder.bake(decoder.coefficients(latents))(grid.coordinates).view(*places, signal.channels)
    targets = grid.gather_points(part.values).view_as(values)
    return loss(values, targets, (grid.weights / grid.weights.sum()).view(1, *places[1:]))


def _tail(decoder: MNIFModel, grid: CellGrid) -> tuple[int, int]:
    return grid.coordinates.shape[1], decoder.config.channels


def _neighbours_differ(grid: CellGrid, values: Tensor) -> Tensor:
    """The mean over blended pixels of (ours - theirs)², after both are blended along the axes before."""
    dimensions = len(grid.axes)
    values = values.reshape(len(values), *[grid.cells] * dimensions, *grid.points_per_axis, values.shape[-1])
    interleaved = [axis + offset for axis in range(1, dimensions + 1) for offset in (0, dimensions)]
    values = values.permute(0, *interleaved, 2 * dimensions + 1)
    values = values.reshape(len(values), *[grid.cells * points for points in grid.points_per_axis], -1)
    total = values.new_zeros(())
    for axis, (first, second, weight) in enumerate(grid.axes, start=1):
        ours, theirs = values.index_select(axis, first), values.index_select(axis, second)
        blended = ((weight > 0) & (weight < 1)).to(values.dtype).view(-1, *[1] * (dimensions + 1 - axis))
        total = total + ((ours - theirs).square() * blended).sum() / (blended.sum() * ours.numel() / len(first))
        values = torch.lerp(ours, theirs, weight.view(-1, *[1] * (dimensions + 1 - axis)))
    return total / dimensions


@torch.no_grad()
def _measured(fit: Any, method: LearningMethod, train_rows: ArrayDataset, held_rows: ArrayDataset) -> dict[str, float]:
    decoder, signal = method.decoder, method.signal
    latent_init = getattr(method, "encoder", None) or getattr(method, "inner_loop", None)
    some = train_rows.subset(torch.linspace(0, len(train_rows) - 1, min(len(train_rows), 512)).long().numpy())
    metrics: dict[str, float] = {}
    refined = Tensor()
    for part, rows, steps in (("train", some, 0), ("heldout_found", held_rows, 0), ("heldout", held_rows, 60)):
        refined = torch.cat([*infer_latents(decoder, signal, rows, latent_init, steps, batch_size=64)])
        for name, values in evaluate_latents(decoder, signal, rows, refined).items():
            metrics[f"{name}_{part}"] = round(values.mean().item(), 3)
    cells = decoder.config.cells
    if isinstance(signal, Image) and cells > 1:
        (batch,) = held_rows.batches(len(held_rows))
        shown = torch.cat([decoder(latents) for latents in refined.split(64)])
        metrics["border"] = round(border_step_ratio(shown.numpy(), signal.observe(batch).values.numpy(), cells), 3)
    if isinstance(signal, Image) and signal.channels == 3:
        for part, rows in (("train", train_rows), ("heldout", held_rows)):
            metrics[f"rfd_lite0_{part}"] = round(_softness(decoder, signal, rows, latent_init), 2)
    metrics["multiply_adds_per_value"] = decoder.bake(decoder.coefficients(refined[:1])).multiply_adds_per_point()
    return metrics


def _softness(decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latent_init: Any) -> float:
    """The Fréchet distance of reconstructions from their originals, over 1,000 rows at most, as `mnif eval` has it."""
    rows = rows.subset(evenly_spaced(len(rows), 1000))
    latents = torch.cat([*infer_latents(decoder, signal, rows, latent_init, 0, batch_size=64)])
    drawn = np.concatenate([to_uint8(decoder(some)) for some in latents.split(64)])
    (batch,) = rows.batches(len(rows))
    lite0 = extractor_by_name("lite0")
    features = [
        extract_features(images, lite0, bicubic_antialias, progress=False)
        for images in (drawn, batch["images"].numpy())
    ]
    return frechet_distance_from_features(*features)


def table(results: Path) -> str:
    """Markdown: one line for each variant, means over seeds and their spread, the default first."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for line in _lines(results):
        groups[line["data"], line["resolution"], line["steps"], line["flags"], line["variant"]].append(line)
    out, previous = [], None
    for key in sorted(groups, key=lambda key: tuple(map(str, key[:4]))):
        lines = groups[key]
        names = [name for name in lines[0] if name not in ("data", "resolution", "steps", "flags", "variant", "seed")]
        if key[:4] != previous:
            previous = key[:4]
            out += ["", f"{key[0]}, resolution {key[1]}, {key[2]} steps {key[3]}", ""]
            out += ["| variant | seeds | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 2)]
        values = [_mean_and_spread([line[name] for line in lines if name in line]) for name in names]
        out.append(f"| {key[4]} | {len(lines)} | " + " | ".join(values) + " |")
    return "\n".join(out)


def _mean_and_spread(values: list[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.2f} ± {statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


def _lines(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _key(line: dict[str, Any]) -> tuple:
    return tuple(line[name] for name in ("data", "resolution", "steps", "flags", "variant", "seed"))


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,)))
