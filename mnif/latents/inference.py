"""Latents of instances while the bases stand still: found by an encoder or an inner loop, refined by Adam."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mnif.data.batches import ArrayDataset
from mnif.latents.inner_loop import InnerLoop
from mnif.models.encoders import PatchEncoder, TokenEncoder, ViewsEncoder
from mnif.models.io import load_component
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Observation, Signal
from mnif.utils.devices import sent
from mnif.utils.errors import UserError
from mnif.utils.model_folders import model_folder_in
from mnif.utils.process import progress_bar

LatentInit = PatchEncoder | TokenEncoder | ViewsEncoder | InnerLoop | nn.Module | None
Loss = Callable[[MNIFModel, Signal, Tensor, Observation], Tensor]
"""Of latents [B, D] and an observation: one number for each instance, [B]."""
_FROM_ZERO = 5  # a search from zero takes this many times the steps of one that starts near


def initial_latents(decoder: MNIFModel, signal: Signal, latent_init: LatentInit, observation: Observation) -> Tensor:
    """Gives latents for a search to start at, [B, D]: an encoder's or an inner loop's, or zeros without either."""
    if latent_init is None:
        return observation.values.new_zeros(len(observation.values), decoder.config.latent_dim)
    if isinstance(latent_init, InnerLoop):
        return latent_init(decoder, signal, signal.subsample(observation, _generator(0))).detach()
    with torch.no_grad():
        return signal.encode(latent_init, observation)


def optimize_latents(
    decoder: MNIFModel,
    signal: Signal,
    observation: Observation,
    start: Tensor,
    steps: int,
    learning_rate: float = 0.05,
    loss: Loss | None = None,
) -> Tensor:
    """Improves latents by Adam on the latents alone.

    Errors are summed over instances, all of a batch look at the same random parts, and Adam works number by number,
    so an instance's latent does not depend on which others are in its batch.

    Args:
        decoder: the bases.
        signal: what the observation is of.
        observation: of B instances.
        start: latents to start from, [B, D].
        steps: Adam steps; the rate falls to zero as a cosine. 0 returns ``start``.
        learning_rate: the first step's.
        loss: default: the signal's own, the mean squared error.

    Returns:
        [B, D], not finite if the rate is too high.
    """
    if not steps:
        return start
    latents = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=learning_rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        with torch.enable_grad():
            part = signal.subsample(observation, _generator(step))
            if loss is None:
                errors = signal.per_instance_loss(decoder, latents, part)
            else:
                errors = loss(decoder, signal, latents, part)
            (latents.grad,) = torch.autograd.grad(errors.sum(), latents)
        optimizer.step()
        schedule.step()
    return latents.detach()


def infer_latents(
    decoder: MNIFModel,
    signal: Signal,
    rows: ArrayDataset,
    latent_init: LatentInit,
    refinement_steps: int,
    refinement_learning_rate: float = 0.05,
    batch_size: int = 256,
    observe: Callable[[Mapping[str, Tensor]], Observation] | None = None,
    progress: bool = False,
    loss: Loss | None = None,
) -> Iterator[Tensor]:
    """Yields the latents of new instances on frozen bases, a batch at a time.

    Args:
        decoder: the bases.
        signal: what the rows are.
        rows: N instances.
        latent_init: gives the latents to start from; None starts from zero and takes five times as many steps.
        refinement_steps: of :func:`optimize_latents`.
        refinement_learning_rate: likewise.
        batch_size: instances at a time; changes speed and memory only.
        observe: what is known of a batch; default: everything.
        progress: show a bar.
        loss: of :func:`optimize_latents`.

    Raises:
        UserError: latents of a batch are not finite any more; said after the last one, for a look at each would have
            the host wait for an accelerator.
    """
    steps = refinement_steps * (1 if latent_init is not None else _FROM_ZERO)
    finite = torch.ones((), dtype=torch.bool, device=decoder.device)
    with progress_bar(total=len(rows), desc="finding latents", unit=signal.noun, disable=not progress) as bar:
        for batch in rows.batches(batch_size, decoder.device):
            observation = (observe or signal.observe)(batch)
            start = initial_latents(decoder, signal, latent_init, observation)
            latents = optimize_latents(decoder, signal, observation, start, steps, refinement_learning_rate, loss)
            finite = finite & latents.isfinite().all()
            yield latents
            bar.update(len(latents))
    if isinstance(latent_init, InnerLoop):
        latent_init.check()
    if steps and not finite:
        raise UserError("refining the latents diverged; lower --refinement_learning_rate")


@torch.no_grad()
def evaluate_latents(
    decoder: MNIFModel, signal: Signal, rows: ArrayDataset, latents: Tensor, batch_size: int = 64
) -> dict[str, Tensor]:
    """Measures how well latents fit their rows: for each metric of the signal one number per instance, on the CPU."""
    metrics: dict[str, list[Tensor]] = {}
    for batch, some in zip(rows.batches(batch_size, decoder.device), latents.split(batch_size), strict=True):
        for name, values in signal.metrics(decoder, sent(some, decoder.device), batch).items():
            metrics.setdefault(name, []).append(values)
    return {name: torch.cat(values).cpu() for name, values in metrics.items()}


def _generator(step: int) -> torch.Generator:
    """Seeds what a step looks at, the same for every batch, so that the batch does not matter."""
    return torch.Generator().manual_seed(step)


def load_latent_init(folder: Path, decoder: MNIFModel, signal: Signal, method: str = "auto") -> LatentInit:
    """Loads what finds the latents of new data: the folder's encoder or inner loop, or None for a search from zero.

    Args:
        folder: the model folder, or its run's.
        decoder: the model's.
        signal: the model's.
        method: "encoder", "meta" or "auto-decoding" (None); "auto" takes what there is.

    Raises:
        UserError: the folder lacks what ``method`` names.
    """
    folder = model_folder_in(folder)
    name = {"encoder": "encoder", "meta": "inner_loop", "auto-decoding": None}.get(method, "auto")
    if name == "auto":
        name = next((name for name in ("encoder", "inner_loop") if (folder / name).is_dir()), None)
    if name is None:
        return None
    if name == "inner_loop":
        return load_component(InnerLoop, folder, name)
    kind = signal.encoder_class if decoder.config.tokens is None else signal.token_encoder_class
    if kind is None:
        raise UserError(f"{folder / name}: no {signal.noun} of this kind has an encoder for tokens")
    return load_component(kind, folder, name)
