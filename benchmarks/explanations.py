"""Which score names the coefficients that matter? The removal test of the atlas by several scores, and their cost.

    python benchmarks/explanations.py --model runs/demo/model --num_instances 6

Taken away are the strongest 1 % of an instance's coefficients, 8 at least; printed is how many times as much its
squared error rises then as without as many others, and as without others that sum up to as much.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import Tensor

from evals.atlas.measured import measured_atlas
from evals.atlas.mixture import Mixture, Subject
from evals.atlas.removal import error_rises, estimated_rises, removal_test
from evals.atlas.usage import basis_norms
from evals.loaded_run import load_run


@dataclass
class Arguments:
    """Compares scores."""

    model: Path
    """The model folder, with the latents of its data beside it."""
    num_instances: int = 6
    """Held-out instances."""


def by_size(mixture: Mixture, subject: Subject) -> Tensor:
    """|α - baseline| ‖B‖, which asks no data."""
    moved = (subject.coefficients - mixture.baseline).abs()
    return moved * basis_norms(mixture.decoder, moved.shape[1])


def by_gradient(mixture: Mixture, subject: Subject) -> Tensor:
    """The gradient of the error times the coefficient, its absolute value: one pass backward."""
    seen = mixture.observed(subject, 1, 0)
    coefficients = subject.coefficients[None].clone().requires_grad_()
    values = mixture.signal.predict(mixture.by_coefficients, mixture.of_all_layers(coefficients), seen)
    (gradient,) = torch.autograd.grad(seen.errors(values).sum(), coefficients)
    return (gradient[0] * (subject.coefficients - mixture.baseline)).abs()


SCORES: dict[str, Callable[[Mixture, Subject], Tensor]] = {
    "size: |a| |B|": by_size,
    "gradient x coefficient": by_gradient,
    "estimated rise": estimated_rises,
    "rise, as the atlas has it": error_rises,
}


def main() -> None:
    arguments = tyro.cli(Arguments)
    run = load_run(arguments.model)
    assert run.table is not None, "no latents beside the model"
    run.decoder.requires_grad_(False)
    data = run.signal.load_like(run.table.data)
    none = run.table.latents[:0]
    atlas = measured_atlas(run.decoder, run.signal, run.table, data, none, arguments.num_instances)
    for name, score in SCORES.items():
        started = time.process_time()
        scores = [score(atlas.mixture, subject) for subject in atlas.subjects]
        seconds = (time.process_time() - started) / len(scores)
        test = removal_test(atlas.mixture, atlas.subjects, scores, [atlas.named])
        others, as_large = test.ratios(atlas.named)
        print(f"{name:28} {others:7.1f} {as_large:7.1f} {seconds:8.2f} s of a processor per instance")


if __name__ == "__main__":
    main()
