"""Mixing bases into fields, in three ways.

    python benchmarks/mixing.py

- One matrix product per layer beside the broadcast form, which makes a [B, M, P] tensor.
- Of sparse coefficients: the product beside a sum of the rows that are taken; and whole bakings, by what the model
  chooses layer by layer, by all bases, and by a model that has no other bases.

Prints the least time of alternating rounds: on a machine that others use too, all above it is theirs.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from mnif.models.mnif_model import MNIFModel
from mnif.models.sparse_coefficients import mix_gathered

BASES, WIDTH, BATCH, ROUNDS = 256, 64, 32, 15
LARGE = {"num_bases": BASES, "width": WIDTH, "depth": 4, "latent_dim": 1024, "cells": 1, "omega": 30.0}
SIZES = {"the default (M=96, width 24, 16 cells)": {}, f"M={BASES}, width {WIDTH}, one field": LARGE}
ACTIVE, BATCHES = (4, 8, 16, 32), (1, 32)


def broadcast_mixing(model: MNIFModel, coefficients: Tensor) -> list[Tensor]:
    return [(coefficients[:, 0, layer, :, None] * bases[None]).sum(dim=1) for layer, bases in enumerate(model.bases)]


def product_mixing(model: MNIFModel, coefficients: Tensor) -> Tensor:
    flat = coefficients.flatten(0, 1)
    return torch.cat([torch.addmm(model.means[i], flat[:, i], bases) for i, bases in enumerate(model.bases)], dim=1)


def gathered_mixing(model: MNIFModel, coefficients: Tensor) -> Tensor:
    flat = coefficients.flatten(0, 1)
    return torch.cat([model.means[i] + mix_gathered(flat[:, i], bases) for i, bases in enumerate(model.bases)], dim=1)


def chosen_mixing(model: MNIFModel, coefficients: Tensor) -> Tensor:
    params = model.bake(coefficients).params
    return params[:, model.shapes[0].parameters :]  # the first layer is not mixed


def least(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """The least milliseconds of each way, after two rounds to warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 2):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: min(seconds[2:]) * 1e3 for name, seconds in times.items()}


def dense() -> None:
    model = MNIFModel(**LARGE, mixing="average")
    coefficients = model.coefficients(torch.randn(BATCH, 1024))
    field = model.bake(coefficients)
    mixed = broadcast_mixing(model, coefficients)
    rows = field.params.split([shape.parameters for shape in field.shapes], dim=1)
    difference = max((a - b).abs().max().item() for a, b in zip(rows, mixed, strict=True))
    ways = {
        "one matrix product per layer": lambda: model.bake(coefficients),
        "broadcast": lambda: broadcast_mixing(model, coefficients),
    }
    print(
        f"M={BASES}, W={WIDTH}, batch {BATCH}, {torch.get_num_threads()} threads; largest difference {difference:.1e}"
    )
    times = least(ways)
    for name, milliseconds in times.items():
        print(f"  {name:30} {milliseconds:9.2f} ms")
    fast, slow = times.values()
    print(f"  ratio {slow / fast:.0f}")


def sparse() -> None:
    for label, settings in SIZES.items():
        print(f"\nsparse, {label}; ms")
        print("| active | batch | product | gathered | baked | all bases, baked | no others, baked | difference |")
        print("|" + "---|" * 8)
        for active in ACTIVE:
            model = MNIFModel(**settings, coefficient_sparsity=active)
            every, few = MNIFModel(**settings), MNIFModel(**settings | {"num_bases": active})
            torch.nn.init.normal_(model.coefficient_map.weight)
            for batch in BATCHES:
                latents = torch.randn(batch, model.config.latent_dim)
                coefficients = model.coefficients(latents)
                ways = {
                    mix.__name__: partial(mix, model, coefficients)
                    for mix in (product_mixing, gathered_mixing, chosen_mixing)
                }
                ways |= {
                    name: partial(chosen_mixing, other, other.coefficients(latents))
                    for name, other in {"all bases": every, "no others": few}.items()
                }
                product = product_mixing(model, coefficients)
                difference = (gathered_mixing(model, coefficients) - product).abs().max() / product.abs().max()
                times = " | ".join(f"{milliseconds:.3f}" for milliseconds in least(ways).values())
                print(f"| {active} | {batch} | {times} | {difference:.0e} |")


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    dense()
    sparse()


if __name__ == "__main__":
    main()
