"""Ways of learning: the amortised encoder, auto-decoding, and finding latents while the bases stand still."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mnif.encoder import PatchEncoder
from mnif.modeling import MNIFModel
from mnif.progress import progress_bar


class AmortisedFitting(nn.Module):
    """An encoder names the latent, the decoder draws it; both learn from the squared error.

    Args:
        decoder: the bases.
        encoder: values → latents.
        latent_noise: standard deviation of the noise added to latents while training. It keeps neighbouring latents
            drawing similar pictures, which the prior needs.
        random_flip: mirror half of the pictures left to right while training.
    """

    def __init__(self, decoder: MNIFModel, encoder: PatchEncoder, latent_noise: float, random_flip: bool):
        super().__init__()
        self.decoder, self.encoder = decoder, encoder
        self.latent_noise, self.random_flip = latent_noise, random_flip
        self.grid = decoder.grid()

    def forward(self, values: Tensor, row: Tensor) -> Tensor:
        """Mean squared error of values [B, R, R, C] in [-1, 1]; the rows' numbers are not needed."""
        if self.random_flip:
            flipped = torch.rand(len(values), 1, 1, 1, device=values.device) < 0.5
            values = torch.where(flipped, values.flip(2), values)
        latents = self.encoder(values)
        latents = latents + self.latent_noise * torch.randn_like(latents)
        return (self.decoder.decode_on(latents, self.grid) - values).square().mean()


class AutoDecoding(nn.Module):
    """Every instance owns a row of latents that learns together with the bases (Park et al., DeepSDF, 2019).

    The rows have sparse gradients, so a step touches the rows of its batch only.

    Args:
        decoder: the bases.
        instances: rows of the table.
        latent_regularisation: weight of the latents' mean square in the loss.
    """

    def __init__(self, decoder: MNIFModel, instances: int, latent_regularisation: float):
        super().__init__()
        self.decoder, self.latent_regularisation = decoder, latent_regularisation
        self.latents = nn.Embedding(instances, decoder.config.latent_dim, sparse=True)
        nn.init.normal_(self.latents.weight, std=0.1)
        self.grid = decoder.grid()

    def forward(self, values: Tensor, row: Tensor) -> Tensor:
        """Mean squared error of values [B, R, R, C] in [-1, 1] for table rows [B], and the latents' regularisation."""
        latents = self.latents(row)
        error = (self.decoder.decode_on(latents, self.grid) - values).square().mean()
        return error + self.latent_regularisation * latents.square().mean()


def refined_latents(
    decoder: MNIFModel,
    values: Tensor,
    start: Tensor,
    steps: int,
    learning_rate: float = 0.05,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Latents that fit ``values`` better, by Adam on the latents alone while the bases stand still.

    Errors are summed over instances and Adam works number by number, so an instance's latent does not depend on
    which others are in its batch.

    Args:
        decoder: the bases.
        values: [N, R, R, C] in [-1, 1], at the decoder's training resolution.
        start: latents to start from, [N, D].
        steps: Adam steps; the rate falls to zero as a cosine. 0 returns ``start``.
        learning_rate: the first step's.
        batch_size: instances at a time; changes speed and memory only.
        progress: show a bar.

    Returns:
        [N, D].
    """
    if not steps:
        return start
    grid = decoder.grid()
    frozen = [p for p in decoder.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    refined = []
    bar = progress_bar(total=len(values), desc="refining latents", unit="image", disable=not progress)
    for target, first in zip(values.split(batch_size), start.split(batch_size), strict=True):
        latents = first.clone().requires_grad_()
        optimizer = torch.optim.Adam([latents], lr=learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            with torch.enable_grad():
                errors = (decoder.decode_on(latents, grid) - target).square().mean(dim=(1, 2, 3))
                (latents.grad,) = torch.autograd.grad(errors.sum(), latents)
            optimizer.step()
            schedule.step()
        refined.append(latents.detach())
        bar.update(len(target))
    bar.close()
    for parameter in frozen:
        parameter.requires_grad_(True)
    return torch.cat(refined)


def encoded_latents(
    decoder: MNIFModel,
    encoder: PatchEncoder | None,
    values: Tensor,
    refinement_steps: int,
    batch_size: int = 256,
    progress: bool = False,
) -> Tensor:
    """Latents of new instances on frozen bases.

    Args:
        decoder: the bases.
        encoder: gives the latents to start from; None starts from zero and takes five times as many steps.
        values: [N, R, R, C] in [-1, 1], at the decoder's training resolution.
        refinement_steps: of :func:`refined_latents`.
        batch_size: instances at a time; changes speed and memory only.
        progress: show a bar.

    Returns:
        [N, D].
    """
    if encoder is not None:
        start = in_batches(encoder, values, batch_size)
    else:
        start, refinement_steps = values.new_zeros(len(values), decoder.config.latent_dim), 5 * refinement_steps
    return refined_latents(decoder, values, start, refinement_steps, batch_size=batch_size, progress=progress)


@torch.no_grad()
def in_batches(function: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int = 256) -> Tensor:
    """``function`` over the rows of ``inputs``, a batch at a time, without gradients."""
    return torch.cat([function(batch) for batch in inputs.split(batch_size)])


def psnr(values: Tensor, targets: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each instance in dB, [N].

    Args:
        values: [N, ...] in about [-1, 1], clipped to it.
        targets: [N, ...] in [-1, 1]. The peak is 2, which equals the PSNR of the same pictures on [0, 1].
    """
    error = (values.clamp(-1, 1) - targets).square().flatten(1).mean(dim=1) / 4
    return -10 * torch.log10(error.clamp_min(1e-10))
