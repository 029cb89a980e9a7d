"""Mixing bases into fields: one matrix product per layer beside the broadcast form, which makes a [B, M, P] tensor.

    python benchmarks/mixing.py

Prints medians of alternating rounds, so that a machine whose speed drifts drifts for both.
"""

import time

import torch

from mnif.models.mnif_model import MNIFModel

BASES, WIDTH, BATCH, ROUNDS = 256, 64, 32, 15


def broadcast_mixing(model: MNIFModel, coefficients: torch.Tensor) -> list[torch.Tensor]:
    return [(coefficients[:, 0, layer, :, None] * bases[None]).sum(dim=1) for layer, bases in enumerate(model.bases)]


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    model = MNIFModel(num_bases=BASES, width=WIDTH, depth=4, latent_dim=1024, cells=1, mixing="average", omega=30.0)
    coefficients = model.coefficients(torch.randn(BATCH, 1024))
    field = model.bake(coefficients)
    mixed = broadcast_mixing(model, coefficients)
    rows = field.params.split([shape.parameters for shape in field.shapes], dim=1)
    difference = max((a - b).abs().max().item() for a, b in zip(rows, mixed, strict=True))

    times: dict[str, list[float]] = {"one matrix product per layer": [], "broadcast": []}
    for round_number in range(ROUNDS + 2):
        for name, function in zip(times, (model.bake, lambda c: broadcast_mixing(model, c)), strict=True):
            started = time.perf_counter()
            function(coefficients)
            if round_number >= 2:
                times[name].append(time.perf_counter() - started)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    print(
        f"M={BASES}, W={WIDTH}, batch {BATCH}, {torch.get_num_threads()} threads; largest difference {difference:.1e}"
    )
    for name, seconds in medians.items():
        print(f"  {name:30} {seconds * 1e3:9.2f} ms")
    fast, slow = medians.values()
    print(f"  ratio {slow / fast:.0f}")


if __name__ == "__main__":
    main()
