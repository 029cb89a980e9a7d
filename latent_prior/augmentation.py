"""Latents of instances that are mirrored or recoloured as `mnif fit` did it at random: more for a prior to learn from.

The prior is told how each was changed, so that its samples are of instances as they are: augmentation that does not
leak (Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import product
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mnif.data.batches import ArrayDataset, array_dataset
from mnif.latents.inference import infer_latents, load_latent_init
from mnif.latents.table import LatentTable
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Change, Observation, Signal
from mnif.signals.registry import signal_of_model
from mnif.training.run_record import read_run_record, stage_one_of
from mnif.utils.errors import UserError
from mnif.utils.process import default_device, progress_bar


@dataclass(frozen=True)
class ChangedInstances:
    """The training instances of a run, and the ways in which its `mnif fit` changed them.

    Attributes:
        decoder: the run's stage one.
        signal: the decoder's.
        encoder: finds latents.
        rows: N training instances, in the order of the run's latent table.
        ways: in each of them an instance goes through one or more changes; as it is is no way of these.
    """

    decoder: MNIFModel
    signal: Signal
    encoder: nn.Module
    rows: ArrayDataset
    ways: list[list[Change]]

    @torch.no_grad()
    def latents(self) -> Float[Tensor, "n ways latent_dim"]:
        """Infers the latents of all instances in all ways, [N, ways, D] on the CPU, by an accelerator if any."""
        decoder, encoder = self.decoder.to(default_device()), self.encoder.to(default_device())
        found: list[Tensor] = []
        with progress_bar(total=len(self.ways) * len(self.rows), desc="changed", unit=self.signal.noun) as bar:
            for way in self.ways:

                def changed(batch: Mapping[str, Tensor], way: list[Change] = way) -> Observation:
                    return reduce(lambda seen, change: change(seen), way, self.signal.observe(batch))

                for latents in infer_latents(decoder, self.signal, self.rows, encoder, 0, observe=changed):
                    found.append(latents.cpu())
                    bar.update(len(latents))
        decoder.cpu()  # where `mnif prior` draws its sheet of samples
        return torch.cat(found).unflatten(0, (len(self.ways), len(self.rows))).transpose(0, 1).contiguous()


def changed_instances(run: Path, decoder: MNIFModel, table: LatentTable) -> ChangedInstances:
    """Reads the data that a run learned from, with the changes that its `mnif fit` was asked for.

    Args:
        run: the run folder.
        decoder: its stage one.
        table: its latents.

    Raises:
        UserError: the run has no encoder, its fit changed nothing, or the data are not those it learned from.
    """
    signal = signal_of_model(decoder)
    encoder = load_latent_init(run / "model", decoder, signal, "encoder")
    assert encoder is not None
    _, record = stage_one_of(read_run_record(run)) or ("", None)
    asked = {} if record is None else record.arguments
    flags = [flag for flag in signal.changes() if asked.get(flag) in (True, "True")]
    if record is None or not flags:
        raise UserError(f"--augment: `mnif fit` changed no {signal.noun} of {run}, as by --random_flip; leave it out")
    source = str(asked.get("data", ""))
    data = signal.load_like(source)
    place = {id: row for row, id in enumerate(data.ids)}
    if data.fingerprint() != record.inputs.get("data_fingerprint") or not place.keys() >= set(table.ids):
        raise UserError(f"--augment: {source} is not what {run} learned from any more; leave it out")
    kept = [place[id] for id, is_held_out in zip(table.ids, table.held_out.tolist(), strict=True) if not is_held_out]
    rows = array_dataset(data.arrays()).subset(np.array(kept))
    choices = product(*([None, *signal.changes()[flag]] for flag in flags))
    _, *ways = ([change for change in way if change is not None] for way in choices)
    return ChangedInstances(decoder, signal, encoder, rows, ways)
