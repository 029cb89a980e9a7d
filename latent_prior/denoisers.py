"""The denoisers: networks over standardised latents, residual ones, the paper's and a transformer; how any is read.

The paper's is a wide network of group norms, with additive skips from its first half to its second (You, Kim, Kim and
Han, Generative Neural Fields by Mixtures of Neural Implicit Functions, NeurIPS 2023). The transformer attends over the
tokens of latents that have them (Peebles and Xie, Scalable Diffusion Models with Transformers, ICCV 2023).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from jaxtyping import Float
from msgspec import Meta
from torch import Tensor, nn

from latent_prior.denoiser_blocks import PaperBlock, ResidualBlock, TransformerBlock
from latent_prior.settings import HEAD_WIDTH, PAPER_GROUPS, DenoiserName, PredictionType
from mnif.data.batches import InstanceGenerator
from mnif.models.io import OwnMemory, load_component
from mnif.models.lineage import lengthened, places
from mnif.models.mnif_model import MNIFModel
from mnif.utils.errors import UserError
from mnif.utils.json_files import Depth, Size, read_json

_SPREAD_OF_POSITIONS = 0.02  # standard deviation, at first


class Denoiser(OwnMemory, ModelMixin, ConfigMixin):
    """What every denoiser has in common: it predicts the clean latent, or what its scheduler says, from a noisy one.

    The mean and standard deviation of the training latents travel with the weights: the network works on
    standardised latents, :meth:`to_latents` gives the decoder's.

    Args:
        latent_dim: D, numbers in a latent.
    """

    def __init__(self, latent_dim: int):
        super().__init__()
        self.register_buffer("latent_mean", torch.zeros(latent_dim))
        self.register_buffer("latent_std", torch.ones(latent_dim))

    def forward(
        self,
        sample: Float[Tensor, "batch latent_dim"],
        timestep: Tensor | float,
        generator: InstanceGenerator | None = None,
        told: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        """Noisy standardised latents [B, D] at the scheduler's timestep, [B] or one number → the prediction [B, D].

        A generator is for dropout while training; without one there is none. What is told [B, time_width] is added to
        the embedding of the time, likewise while training; untold, the latents are of instances as they are.
        """
        raise NotImplementedError

    def standardised(self, latents: Float[Tensor, "*batch latent_dim"]) -> Float[Tensor, "*batch latent_dim"]:
        """The decoder's latents → zero mean and unit variance per dimension."""
        return (latents - self.latent_mean) / self.latent_std

    def to_latents(self, standardised: Float[Tensor, "*batch latent_dim"]) -> Float[Tensor, "*batch latent_dim"]:
        """Standardised latents → the decoder's."""
        return standardised * self.latent_std + self.latent_mean


class ModulatedDenoiser(Denoiser):
    """What denoisers have in common whose blocks are scaled and shifted by the time.

    Args:
        latent_dim: D, numbers in a latent.
        time_width: numbers in the time embedding.
    """

    def __init__(self, latent_dim: int, time_width: int):
        super().__init__(latent_dim)
        self.time_in = nn.Linear(time_width, time_width)

    def time_embedding(self, timestep: Tensor | float) -> Float[Tensor, "batch_or_1 time_width"]:
        """The scheduler's timesteps, [B] or one number, 0 to 1000 → [B or 1, time_width]."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).reshape(-1)
        return F.silu(self.time_in(get_timestep_embedding(timestep, self.config.time_width).to(self.dtype)))


class ResMLPDenoiser(ModulatedDenoiser):
    """A residual network whose blocks are scaled and shifted by the time; small, and exportable.

    Args:
        latent_dim: D, numbers in a latent.
        width: hidden units of the residual stream.
        depth: residual blocks.
        time_width: numbers in the time embedding.
        dropout: in the blocks, while training.
        decoder_fingerprint: of the decoder whose latents these are
            (:meth:`mnif.models.mnif_model.MNIFModel.fingerprint`).
        distilled_steps: the numbers of steps that a student was distilled for; none: it is a teacher.
        rounded_fingerprints: of that decoder in half precision; a pipeline fills them in.
        prediction_type: what is predicted, by its name in diffusers' schedulers; likewise.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: Size = 128,
        width: Size = 512,
        depth: Depth = 4,
        time_width: Size = 128,
        dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0,
        decoder_fingerprint: str = "",
        distilled_steps: Sequence[Size] = (),
        rounded_fingerprints: Sequence[str] = (),
        prediction_type: PredictionType | None = None,
    ):
        super().__init__(latent_dim, time_width)
        self.read = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, time_width, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.write = nn.Linear(width, latent_dim)
        nn.init.zeros_(self.write.weight)
        nn.init.zeros_(self.write.bias)

    def forward(
        self,
        sample: Float[Tensor, "batch latent_dim"],
        timestep: Tensor | float,
        generator: InstanceGenerator | None = None,
        told: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        """Noisy standardised latents [B, D] at the scheduler's timestep → the prediction [B, D]."""
        time = self.time_embedding(timestep)
        if told is not None:
            time = time + told
        hidden = self.read(sample)
        for block in self.blocks:
            hidden = block(hidden, time, generator)
        return self.write(self.norm(hidden))


class PaperDenoiser(Denoiser):
    """The residual network of the paper, of any width and even depth; ``width=4096, depth=8`` is the paper's own.

    Block depth/2 + i gets what went into block depth/2 − 1 − i added to its input.

    Args:
        latent_dim: D, numbers in a latent.
        width: hidden units, a multiple of 16, at least 32: alone in its group, a unit is normalised to nothing.
        depth: residual blocks, an even number.
        time_width: numbers in the sinusoidal time embedding.
        decoder_fingerprint: of the decoder whose latents these are
            (:meth:`mnif.models.mnif_model.MNIFModel.fingerprint`).
        rounded_fingerprints: of that decoder in half precision; a pipeline fills them in.
        prediction_type: what is predicted, by its name in diffusers' schedulers; likewise.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: Size = 128,
        width: Size = 4096,
        depth: Depth = 8,
        time_width: Size = 64,
        decoder_fingerprint: str = "",
        rounded_fingerprints: Sequence[str] = (),
        prediction_type: PredictionType | None = None,
    ):
        super().__init__(latent_dim)
        self.read = nn.Linear(latent_dim, width)
        self.blocks = nn.ModuleList(PaperBlock(width, time_width) for _ in range(depth))
        self.norm = nn.GroupNorm(PAPER_GROUPS, width)
        self.write = nn.Linear(width, latent_dim)

    def forward(
        self,
        sample: Float[Tensor, "batch latent_dim"],
        timestep: Tensor | float,
        generator: InstanceGenerator | None = None,
        told: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        """Noisy standardised latents [B, D] at the scheduler's timestep, [B] or one number → the prediction [B, D]."""
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=self.device).reshape(-1)
        time = get_timestep_embedding(timestep, self.config.time_width).to(self.dtype)
        if told is not None:
            time = time + told
        hidden = self.read(sample)
        inputs: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index < len(self.blocks) // 2:
                inputs.append(hidden)
            else:
                hidden = hidden + inputs.pop()
            hidden = block(hidden, time)
        return self.write(F.silu(self.norm(hidden)))


class TransformerDenoiser(ModulatedDenoiser):
    """A transformer over the tokens of a latent, each at a learned position; what is far apart hears each other.

    Args:
        latent_dim: D, numbers in a latent, a multiple of ``num_tokens``.
        num_tokens: T, tokens in a latent, one after the other (:mod:`mnif.models.token_map`).
        width: numbers in a token within the blocks, a multiple of 32 if it is above.
        depth: blocks.
        time_width: numbers in the time embedding.
        dropout: in the blocks, while training.
        decoder_fingerprint: of the decoder whose latents these are
            (:meth:`mnif.models.mnif_model.MNIFModel.fingerprint`).
        distilled_steps: the numbers of steps that a student was distilled for; none: it is a teacher.
        rounded_fingerprints: of that decoder in half precision; a pipeline fills them in.
        prediction_type: what is predicted, by its name in diffusers' schedulers; likewise.

    Raises:
        ValueError: tokens cannot share the latent, or heads of 32 numbers the width.
    """

    @register_to_config
    def __init__(
        self,
        latent_dim: Size = 256,
        num_tokens: Size = 16,
        width: Size = 128,
        depth: Depth = 4,
        time_width: Size = 128,
        dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0,
        decoder_fingerprint: str = "",
        distilled_steps: Sequence[Size] = (),
        rounded_fingerprints: Sequence[str] = (),
        prediction_type: PredictionType | None = None,
    ):
        super().__init__(latent_dim, time_width)
        if latent_dim % num_tokens:
            raise ValueError(f"latent_dim {latent_dim}: {num_tokens} tokens share it evenly")
        if width > HEAD_WIDTH and width % HEAD_WIDTH:
            raise ValueError(f"width {width}: heads of {HEAD_WIDTH} numbers share it evenly")
        self.read = nn.Linear(latent_dim // num_tokens, width)
        self.positions = nn.Parameter(_SPREAD_OF_POSITIONS * torch.randn(num_tokens, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, time_width, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Linear(time_width, 2 * width)
        self.write = nn.Linear(width, latent_dim // num_tokens)
        for last in (self.modulation, self.write):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self,
        sample: Float[Tensor, "batch latent_dim"],
        timestep: Tensor | float,
        generator: InstanceGenerator | None = None,
        told: Float[Tensor, "batch time_width"] | None = None,
    ) -> Float[Tensor, "batch latent_dim"]:
        """Noisy standardised latents [B, D] at the scheduler's timestep → the prediction [B, D]."""
        time = self.time_embedding(timestep)
        if told is not None:
            time = time + told
        tokens = self.read(sample.unflatten(1, (self.config.num_tokens, -1))) + self.positions
        for block in self.blocks:
            tokens = block(tokens, time, generator)
        scale, shift = self.modulation(time)[:, None].chunk(2, dim=-1)
        return self.write(self.norm(tokens) * (1 + scale) + shift).flatten(1)


def settings_of_tokens(name: DenoiserName, decoder: MNIFModel) -> dict[str, int]:
    """What a denoiser must know of the tokens of a decoder's latents: their number, if it attends over them.

    Raises:
        UserError: it does, and the latents are global.
    """
    if name != "transformer":
        return {}
    if decoder.config.tokens is None:
        raise UserError(
            "--denoiser transformer: attends over tokens, and these latents have none; take --denoiser modulated, or "
            "give them a place with `mnif fit --latent_layout tokens`"
        )
    return {"num_tokens": decoder.config.tokens**decoder.config.dimensions}


DENOISERS: dict[DenoiserName, type[Denoiser]] = {
    "modulated": ResMLPDenoiser,
    "paper": PaperDenoiser,
    "transformer": TransformerDenoiser,
}
"""What `mnif prior --denoiser` names; a new one is added to both, with its flags to `mnif prior`."""


def load_denoiser(folder: Path, name: str = "denoiser", variant: str | None = None) -> Denoiser:
    """Reads the denoiser ``folder/name`` of whatever kind, in evaluation mode.

    Args:
        folder: the model folder.
        name: ``"denoiser"``, or ``"student"`` for the one that `mnif distill` makes.
        variant: of the weights (:func:`mnif.models.io.weights_file`).

    Raises:
        UserError: the folder or the component is missing or damaged, or of a kind that is not known here.
    """
    config = folder / name / "config.json"
    named = read_json(config).get("_class_name") if config.is_file() else ResMLPDenoiser.__name__
    kinds = {kind.__name__: kind for kind in DENOISERS.values()}
    if not isinstance(named, str) or named not in kinds:
        raise UserError(f"{config}: a {named!s:.40} is no denoiser; {' or '.join(kinds)} is needed")
    return load_component(kinds[named], folder, name, variant)


@torch.no_grad()
def continued(denoiser: Denoiser, decoder: MNIFModel, mean: Tensor, std: Tensor) -> Denoiser:
    """Makes a denoiser for the latents of a decoder that was grown, of one that knows those of an earlier generation.

    At first it draws earlier latents as before: further numbers are not read yet, and their mean is predicted.

    Args:
        denoiser: of the earlier generation.
        decoder: that was grown.
        mean: of the latents to learn from, [D]; of the numbers that there were before, the denoiser's own stays.
        std: their standard deviations, likewise.
    """
    fresh = {"decoder_fingerprint": decoder.fingerprint(), "rounded_fingerprints": ()}
    longer = lengthened(denoiser, decoder, **fresh)
    new = torch.ones(decoder.config.latent_dim, dtype=torch.bool)
    new[places(decoder, denoiser.config.latent_dim)] = False
    state = longer.state_dict()
    state["latent_mean"][new], state["latent_std"][new] = mean[new], std[new]
    if state["read.weight"].shape[1] < len(new):  # one matrix serves all tokens
        new = new.view(decoder.num_tokens, -1)[0]
    state["read.weight"][:, new] = 0
    state["write.weight"][new], state["write.bias"][new] = 0, 0
    return longer


def check_decoder(decoder: MNIFModel, denoiser: Denoiser) -> None:
    """Makes sure that a denoiser's latents are the decoder's; others would decode to nonsense.

    What is compared is what the weights are, in whatever precision they are kept: a denoiser knows what its decoder's
    are in float32 and what they are rounded to. One that was written before it did learns it here.

    Raises:
        UserError: they belong to another decoder.
    """
    fingerprint, own, rounded = decoder.fingerprint(), *_fingerprints(denoiser)
    if fingerprint not in (own, *rounded):
        raise UserError(
            f"the denoiser was trained for decoder {own[:12] or 'unknown'}, "
            f"but the decoder here is {fingerprint[:12]}; run `mnif prior` again"
        )
    if not rounded:
        denoiser.register_to_config(rounded_fingerprints=decoder.rounded_fingerprints())


def _fingerprints(denoiser: Denoiser) -> tuple[str, Sequence[str]]:
    """Those of the decoder that a denoiser was trained for: as it was, and rounded if that is known."""
    return denoiser.config.get("decoder_fingerprint", ""), denoiser.config.get("rounded_fingerprints", ())
