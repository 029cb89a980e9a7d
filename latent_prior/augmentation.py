"""Latents of instances that are mirrored or recoloured as `mnif fit` did it at random: more for a prior to learn from.

The prior is told how each was changed, so that its samples are of instances as they are: augmentation that does not
leak (Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models, 2022).
"""

from collections.abc import Mapping, Sequence
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
from mnif.models.lineage import ancestor, fingerprints, widened
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Change, Observation, Signal
from mnif.signals.registry import signal_of_model
from mnif.training.inheritance import inherited_tables
from mnif.training.run_record import read_run_record, stage_one_of
from mnif.utils.errors import UserError
from mnif.utils.process import progress_bar


@dataclass(frozen=True)
class ChangedInstances:
    """The training instances of a run, and the ways in which its `mnif fit` changed them.

    Attributes:
        decoder: the run's stage one.
        signal: the decoder's.
        encoder: finds latents.
        rows: N training instances, in the order of the run's latent table.
        flags: of the fit, that asked for the changes.
        ways: in each of them an instance goes through one or more changes; as it is is no way of these.
    """

    decoder: MNIFModel
    signal: Signal
    encoder: nn.Module
    rows: ArrayDataset
    flags: list[str]
    ways: list[list[Change]]

    @torch.no_grad()
    def latents(self, device: torch.device) -> Float[Tensor, "n ways latent_dim"]:
        """Infers the latents of all instances in all ways on a device, where decoder and encoder stay: [N, ways, D]
        on the CPU."""
        decoder, encoder = self.decoder.to(device), self.encoder.to(device)
        found: list[Tensor] = []
        with progress_bar(total=len(self.ways) * len(self.rows), desc="changed", unit=self.signal.noun) as bar:
            for way in self.ways:

                def changed(batch: Mapping[str, Tensor], way: list[Change] = way) -> Observation:
                    return reduce(lambda seen, change: change(seen), way, self.signal.observe(batch))

                for latents in infer_latents(decoder, self.signal, self.rows, encoder, 0, observe=changed):
                    found.append(latents)
                    bar.update(len(latents))
        return torch.cat(found).cpu().unflatten(0, (len(self.ways), len(self.rows))).transpose(0, 1).contiguous()


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
    return ChangedInstances(decoder, signal, encoder, rows, flags, ways)


def changed_in_all_generations(run: Path, decoder: MNIFModel, table: LatentTable) -> list[ChangedInstances]:
    """Reads what a run learned from, and then what every generation before did whose latents it has inherited.

    Instances of before are found by the encoder of their own generation, which is kept beside their latents.

    Args:
        run: the run folder.
        decoder: its stage one.
        table: its own latents.

    Raises:
        UserError: of one of them as :func:`changed_instances` says, generations were changed in different ways, or the
            bases of one have moved since.
    """
    found, known = [changed_instances(run, decoder, table)], fingerprints(decoder)
    for path in inherited_tables(run):
        (generation,) = (n for n, fingerprint in enumerate(known) if fingerprint.startswith(path.parent.name))
        try:
            earlier = ancestor(decoder, generation)
        except UserError as error:
            raise UserError(f"--augment: {error}") from None
        found.append(changed_instances(path.parent, earlier, LatentTable.load_for(earlier, path)))
        ours, theirs = (" ".join(f"--{flag}" for flag in each.flags) for each in (found[0], found[-1]))
        if ours != theirs:
            raise UserError(f"--augment: {run} was changed by {ours}, {path.parent} by {theirs}; leave it out")
    return found


def changed_latents(
    generations: Sequence[ChangedInstances], device: torch.device
) -> Float[Tensor, "n ways latent_dim"]:
    """Infers the latents of all instances of all generations in all ways on a device, as the first one's decoder takes
    them: [N, ways, D] on the CPU."""
    decoder = generations[0].decoder
    found = [each.latents(device) for each in generations]
    return torch.cat([widened(decoder, some.flatten(0, 1)).unflatten(0, some.shape[:2]) for some in found])
