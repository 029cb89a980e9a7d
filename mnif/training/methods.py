"""The three ways of learning bases: what each minimises in a step of training, what moves it, and how good it is."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mnif.data.batches import ArrayDataset, InstanceGenerator
from mnif.latents.embedding import LatentEmbedding
from mnif.latents.inner_loop import InnerLoop
from mnif.models.mnif_model import MNIFModel
from mnif.signals.base import Augmentation, GridSignal, Observation, Signal
from mnif.training.muon import Muon

_VALIDATED = 512  # instances of each side that a validation looks at, at most


class LearningMethod(nn.Module):
    """A way of learning: called on a batch of rows and their keys, gives the loss.

    ``row`` [B] are row numbers; ``key`` [B] makes what is random for each of them
    (:class:`mnif.data.batches.InstanceGenerator`).

    Args:
        decoder: the bases.
        signal: what the data are.
        gradient_weight: of the gradient's error in the loss, of signals on grids
            (:meth:`mnif.signals.base.GridSignal.loss_with_gradients`).
    """

    def __init__(self, decoder: MNIFModel, signal: Signal, gradient_weight: float = 0.0):
        super().__init__()
        self.decoder, self.signal, self.gradient_weight = decoder, signal, gradient_weight

    def mean_loss(self, latents: Tensor, part: Observation) -> Tensor:
        """The mean over a batch of the squared error, and of that of the gradient if it has a weight."""
        if self.gradient_weight and isinstance(self.signal, GridSignal):
            return self.signal.loss_with_gradients(self.decoder, latents, part, self.gradient_weight).mean()
        return self.signal.per_instance_loss(self.decoder, latents, part).mean()

    @abstractmethod
    def latents(self, observation: Observation, row: Tensor) -> Tensor:
        """The latents [B, D] of a batch as they are found now, without noise; ``row`` [B] are row numbers."""

    def others(self) -> list[nn.Parameter]:
        """What is learned besides the decoder."""
        own = {id(parameter) for parameter in self.decoder.parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in own]


class EncoderMethod(LearningMethod):
    """An encoder names the latent, the decoder draws it; both learn from the squared error.

    Args:
        decoder: the bases.
        signal: what the data are.
        encoder: of the signal (:meth:`mnif.signals.base.Signal.encoder`).
        latent_noise: standard deviation of the noise added to latents while training. It keeps neighbouring latents
            drawing similar instances, which the prior needs.
        augmentations: random changes to make before learning (:meth:`mnif.signals.base.Signal.augmentations`).
        gradient_weight: as of every way of learning.
    """

    def __init__(
        self,
        decoder: MNIFModel,
        signal: Signal,
        encoder: nn.Module,
        latent_noise: float,
        augmentations: Sequence[Augmentation] = (),
        gradient_weight: float = 0.0,
    ):
        super().__init__(decoder, signal, gradient_weight)
        self.encoder, self.latent_noise, self.augmentations = encoder, latent_noise, augmentations

    def forward(self, row: Tensor, key: Tensor, **batch: Tensor) -> Tensor:
        """Mean loss of a batch."""
        observation, generator = self.signal.observe(batch), InstanceGenerator(key)
        for augmentation in self.augmentations:
            observation = augmentation(observation, generator)
        latents = self.latents(observation, row)
        latents = latents + self.latent_noise * generator.normal(latents.shape[1])
        return self.mean_loss(latents, self.signal.subsample(observation))

    def bits_per_instance(self) -> float:
        """Computes what a latent carries past its noise: D/2 · log2(1 + 1/σ²) bits, infinite without noise.

        That is the capacity of D Gaussian channels (Shannon, 1949), for the encoder gives its numbers unit variance.
        """
        if not self.latent_noise:
            return math.inf
        return self.decoder.config.latent_dim / 2 * math.log2(1 + self.latent_noise**-2)

    def latents(self, observation: Observation, row: Tensor) -> Tensor:
        """The encoder's."""
        return self.signal.encode(self.encoder, observation)


class AutoDecoderMethod(LearningMethod):
    """Every instance owns a row of latents that learns together with the bases (DeepSDF; Park et al., CVPR 2019).

    Args:
        decoder: the bases.
        signal: what the data are.
        rows: this process's latents.
        latent_regularisation: weight of the latents' mean square in the loss.
        gradient_weight: as of every way of learning.
    """

    def __init__(
        self,
        decoder: MNIFModel,
        signal: Signal,
        rows: LatentEmbedding,
        latent_regularisation: float,
        gradient_weight: float = 0.0,
    ):
        super().__init__(decoder, signal, gradient_weight)
        self.rows, self.latent_regularisation = rows, latent_regularisation

    def forward(self, row: Tensor, **batch: Tensor) -> Tensor:
        """Mean loss of a batch, and the latents' regularisation."""
        latents = self.rows.take(row)
        error = self.mean_loss(latents, self.signal.subsample(self.signal.observe(batch)))
        return error + self.latent_regularisation * latents.square().mean()

    def latents(self, observation: Observation, row: Tensor) -> Tensor:
        """The rows as they are."""
        return self.rows.read(row)


class MetaMethod(LearningMethod):
    """Bases from which a few gradient steps on the latent reach any instance (CAVIA; the paper's stage one).

    Args:
        decoder: the bases.
        signal: what the data are.
        inner_loop: the steps; its rates learn together with the bases.
        second_order: differentiate through the steps. First order is faster and reaches less.
        start_noise: the latents start at N(0, start_noise²) in training; they start at 0 afterwards.
        gradient_weight: as of every way of learning; the steps themselves go by the squared error.
    """

    def __init__(
        self,
        decoder: MNIFModel,
        signal: Signal,
        inner_loop: InnerLoop,
        second_order: bool,
        start_noise: float = 1e-4,
        gradient_weight: float = 0.0,
    ):
        super().__init__(decoder, signal, gradient_weight)
        self.inner_loop, self.second_order, self.start_noise = inner_loop, second_order, start_noise

    @torch.compiler.disable  # torch.compile makes graphs that cannot be differentiated twice
    def forward(self, row: Tensor, key: Tensor, **batch: Tensor) -> Tensor:
        """Mean loss of a batch after the inner loop."""
        part = self.signal.subsample(self.signal.observe(batch))
        start = self.start_noise * InstanceGenerator(key).normal(self.decoder.config.latent_dim)
        latents = self.inner_loop(self.decoder, self.signal, part, start, self.second_order)
        return self.mean_loss(latents, part)

    def latents(self, observation: Observation, row: Tensor) -> Tensor:
        """After the inner loop, on one random part of what is known."""
        return self.inner_loop(self.decoder, self.signal, self.signal.subsample(observation))


def make_optimizers(
    method: LearningMethod,
    learning_rate: float,
    basis_learning_rate: float,
    adam_beta2: float,
    use_muon: bool,
    earlier_rate: float = 1.0,
) -> list[torch.optim.Optimizer]:
    """Adam with a rate for the bases and one for everything else; Muon in its place for narrow matrices.

    Args:
        method: what learns; latents of its own are moved elsewhere.
        learning_rate: of all but the bases.
        basis_learning_rate: of the bases.
        adam_beta2: of Adam.
        use_muon: whether Muon moves the narrow matrices.
        earlier_rate: of a decoder that was grown, multiplies the rates of the generations before the last; what is
            frozen does not move at all.
    """
    adam, by_muon = [], []
    for rate, fields, others in _by_generation(method, earlier_rate):
        matrices = [parameter for parameter in others if use_muon and _is_narrow(parameter)]
        chosen = {id(parameter) for parameter in matrices}
        by_adam = [parameter for parameter in others if id(parameter) not in chosen]
        adam += [(fields, rate * basis_learning_rate), (by_adam, rate * learning_rate)]
        by_muon.append((matrices, rate * learning_rate))
    groups = [{"params": parameters, "lr": rate} for parameters, rate in adam if parameters]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, betas=(0.9, adam_beta2), weight_decay=0.0, fused=True)
    ]
    return optimizers + [Muon(matrices, rate) for matrices, rate in by_muon if matrices]


def _by_generation(method: LearningMethod, earlier_rate: float) -> Iterator[tuple[float, list, list]]:
    """Yields what moves at one rate: the rate, parameters of fields, and all others; what came last comes first."""
    decoder, others = method.decoder, method.others()
    parts = [([*decoder.shared, *decoder.means, *decoder.bases], [decoder.coefficient_map])]
    parts += [([*growth.bases], [growth.coefficient_map, growth.earlier_map]) for growth in decoder.later]
    for number, (fields, maps) in enumerate(reversed(parts)):
        others = others if number == 0 else []
        others += [parameter for each in maps if each is not None for parameter in each.parameters()]
        fields, others = ([each for each in part if each.requires_grad] for part in (fields, others))
        yield earlier_rate if number else 1.0, fields, others


def _is_narrow(parameter: Tensor) -> bool:
    """Whether it is a matrix that Muon moves in no time; the cost is the cube of the shorter side."""
    return parameter.ndim == 2 and min(parameter.shape) <= 256


def validation_rows(rows: ArrayDataset, method: LearningMethod, accelerator: Accelerator) -> ArrayDataset:
    """This process's share of the instances a validation looks at, evenly spread over all of them."""
    index = torch.linspace(0, len(rows) - 1, min(len(rows), _VALIDATED)).long()
    if isinstance(method, AutoDecoderMethod):
        return rows.subset(index[method.rows.owns(index)].numpy())
    return rows.subset(index[accelerator.process_index :: accelerator.num_processes].numpy())


@torch.no_grad()
def mean_psnr(method: LearningMethod, rows: ArrayDataset, accelerator: Accelerator) -> float:
    """Mean PSNR in dB of instances with the latents that are found for them now, over all processes."""
    total_and_count = torch.zeros(2, device=accelerator.device)
    for batch in rows.batches(64, accelerator.device) if len(rows) else ():
        latents = method.latents(method.signal.observe(batch), batch["row"])
        values = method.signal.metrics(method.decoder, latents, batch)["psnr"]
        total_and_count += torch.stack([values.sum(), values.new_full((), len(values))])
    total, count = accelerator.reduce(total_and_count, "sum").tolist()
    return total / count
