"""The generations of a model that was grown: how the next one is made, and how an earlier one is had back.

A growth leaves what was there as it was, unless it was told to move it, so every earlier generation is a part of the
model: its weights without those that came later. That it is the very model of then, its fingerprint tells.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from mnif.models.growth import Generation
from mnif.models.mnif_model import MNIFModel, decoder_fingerprint
from mnif.models.sparse_coefficients import share_of_each
from mnif.utils.errors import UserError


def grown(model: MNIFModel, num_bases: int, latent_dim: int) -> MNIFModel:
    """Makes the next generation of a model, with further bases freshly drawn; it learns nothing of the old ones.

    Args:
        model: as it is.
        num_bases: further bases in each layer.
        latent_dim: further numbers in a latent; of direct coefficients they are worked out.

    Raises:
        ValueError: they cannot be shared out among cells or tokens.
    """
    settings = _settings(model)
    if settings["coefficient_form"] == "direct":
        by_place, active = model.is_sparse_by_place, settings["coefficient_sparsity"]
        of_a_cell = share_of_each(active, [model.generations[0], num_bases])[1] if by_place else num_bases
        latent_dim = settings["latent_dim"] // sum(model.mapped_bases) * of_a_cell
    settings["growths"] = [*settings["growths"], {"num_bases": num_bases, "latent_dim": latent_dim}]
    settings["num_bases"] += num_bases
    settings["latent_dim"] += latent_dim
    child = MNIFModel(**settings)
    child.load_state_dict(model.state_dict(), strict=False)
    return child


def freeze_earlier(model: MNIFModel) -> None:
    """Makes sure that training moves nothing but what came with the last growth."""
    model.requires_grad_(False)
    model.later[-1].requires_grad_(True)


def ancestor(model: MNIFModel, generation: int) -> MNIFModel:
    """Makes an earlier generation of a model from the weights that it still has, in evaluation mode.

    Args:
        model: that was grown.
        generation: 0 is the first; as many as there are growths is the model itself.

    Raises:
        UserError: a later growth has moved those weights, or they are not those of then.
    """
    fingerprint = fingerprints(model)[generation]
    for later in model.config.lineage[generation + 1 :]:
        if not later["frozen"]:
            raise UserError(
                f"generation {fingerprint[:12]}: its bases moved when the model was grown by {later['data']} with "
                "--replay; only its own folder has them"
            )
    settings, state = _settings_then(model, generation), _state_then(model, generation)
    if decoder_fingerprint(settings, state) != fingerprint:
        raise UserError(f"generation {fingerprint[:12]}: the weights here are not those of then")
    earlier = MNIFModel(**settings)
    earlier.load_state_dict(state)
    return earlier.eval()


def fingerprints(model: MNIFModel) -> list[str]:
    """Lists the fingerprints of all generations of a model, the first one first and its own last.

    Those that are a part of the model as they were are worked out from its weights; of those that a later growth
    moved, what was noted then is taken.
    """
    lineage, own = model.config.lineage, model.fingerprint()
    found = []
    for generation in range(len(model.later)):
        if all(later["frozen"] for later in lineage[generation + 1 :]):
            found.append(decoder_fingerprint(_settings_then(model, generation), _state_then(model, generation)))
        else:
            found.append(lineage[generation]["fingerprint"])
    return [*found, own]


def places(model: MNIFModel, latent_dim: int) -> Tensor:
    """Finds where the ``latent_dim`` numbers of an earlier generation's latent lie in the model's: [D] int64."""
    per_token = latent_dim // model.num_tokens
    return torch.arange(model.config.latent_dim).view(model.num_tokens, -1)[:, :per_token].flatten()


def widened(model: MNIFModel, latents: Tensor) -> Tensor:
    """Puts zeros where latents [N, D of an earlier generation] lack numbers: [N, D], which decode to the same."""
    wide = latents.new_zeros(len(latents), model.config.latent_dim)
    return wide.index_copy_(1, places(model, latents.shape[1]).to(latents.device), latents)


@torch.no_grad()
def lengthened(component: Any, model: MNIFModel, **settings: Any) -> Any:
    """Makes a network for a model's latents of one for those of an earlier generation, to go on learning with.

    What has to do with the earlier numbers is as it was, what is new is freshly drawn: of an encoder the output rows,
    of an inner loop the rates, of a denoiser what reads and writes them.

    Args:
        component: an encoder, an inner loop or a denoiser.
        model: that was grown.
        settings: of the new component, where they are not the old one's.
    """
    before = {key: value for key, value in component.config.items() if not key.startswith("_")}
    place = places(model, before["latent_dim"])
    longer = type(component)(**before | {"latent_dim": model.config.latent_dim} | settings)
    state = component.state_dict()
    for name, values in longer.state_dict().items():
        axes = [axis for axis, size in enumerate(values.shape) if size != state[name].shape[axis]]
        if not axes:
            values.copy_(state[name])
            continue
        (axis,) = axes
        count = state[name].shape[axis]  # of all numbers, or where tokens share a matrix of one token's
        values.index_copy_(axis, place if len(place) == count else torch.arange(count), state[name])
    return longer


def _settings(model: MNIFModel) -> dict[str, Any]:
    """The arguments that make a model of this form again."""
    return deepcopy({key: value for key, value in model.config.items() if not key.startswith("_")})


def _settings_then(model: MNIFModel, generation: int) -> dict[str, Any]:
    settings = _settings(model)
    later = settings["growths"][generation:]
    lineage: list[Generation] = settings["lineage"]
    return settings | {
        "num_bases": settings["num_bases"] - sum(growth["num_bases"] for growth in later),
        "latent_dim": settings["latent_dim"] - sum(growth["latent_dim"] for growth in later),
        "growths": settings["growths"][:generation],
        "lineage": lineage[: generation + 1] if generation else [],
    }


def _state_then(model: MNIFModel, generation: int) -> dict[str, Tensor]:
    later = tuple(f"later.{number}." for number in range(generation, len(model.later)))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(later)}
