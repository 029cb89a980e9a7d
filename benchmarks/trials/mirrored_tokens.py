"""Whether mirroring a picture is an operation on its tokens: how near they decode to the mirrored picture.

    python benchmarks/trials/mirrored_tokens.py --run runs/tokens

The grid of tokens is reversed along its last axis, and then its numbers are mapped by one matrix for all tokens, or by
one of each, which least squares find on one half of the training pictures. The other half is measured.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from latent_prior.augmentation import changed_instances
from mnif.latents.inference import infer_latents
from mnif.latents.table import LatentTable
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import psnr


@dataclass
class Arguments:
    """Measure what reversed tokens decode to."""

    run: Path
    """A run folder of `mnif fit --random_flip --latent_layout tokens`."""


@torch.no_grad()
def main(arguments: Arguments) -> None:
    decoder = load_component(MNIFModel, arguments.run / "model", "decoder")
    table = LatentTable.load_for(decoder, arguments.run / "latents.safetensors")
    instances = changed_instances(arguments.run, decoder, table)
    (mirrored,) = instances.signal.changes()["random_flip"]
    wanted = replace(instances, ways=[[mirrored]]).latents(torch.device("cpu"))[:, 0]
    own = torch.cat([*infer_latents(decoder, instances.signal, instances.rows, instances.encoder, 0)])
    axes = (decoder.config.tokens,) * decoder.config.dimensions
    tokens = own.view(len(own), *axes, -1).flip(decoder.config.dimensions).flatten(1, -2)
    targets = wanted.view_as(tokens)
    found = {
        "as they are": own,
        "reversed": tokens.flatten(1),
        "reversed, one matrix for all tokens": mapped(tokens.flatten(0, 1), targets.flatten(0, 1), tokens.shape[1]),
        "reversed, a matrix for every token": torch.stack(
            [mapped(tokens[:, place], targets[:, place]) for place in range(tokens.shape[1])], dim=1
        ),
        "of the mirrored picture, by the encoder": wanted,
    }
    for name, latents in found.items():
        measured, rows = latents.reshape(len(own), -1)[1::2], instances.rows.subset(np.arange(1, len(own), 2))
        distances: list[Tensor] = []
        for batch in rows.batches(256, decoder.device):
            part = measured[len(torch.cat(distances)) if distances else 0 :][: len(next(iter(batch.values())))]
            distances.append(psnr(decoder(part), mirrored(instances.signal.observe(batch)).values))
        error = (measured - wanted[1::2]).square().mean() / wanted.var(dim=0).mean()
        print(f"{name:40} {torch.cat(distances).mean():6.2f} dB, error in tokens {error:.3f} of their variance")


def mapped(tokens: Tensor, targets: Tensor, of_an_instance: int = 1) -> Tensor:
    """Maps tokens [N, n] to targets [N, n] by the matrix and bias that fit those of every other instance best."""
    inputs = torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1)
    learned = torch.arange(len(tokens)) // of_an_instance % 2 == 0
    matrix = torch.linalg.lstsq(inputs[learned], targets[learned]).solution
    return inputs @ matrix


if __name__ == "__main__":
    main(tyro.cli(Arguments, config=(tyro.conf.OmitArgPrefixes,), use_underscores=True))
