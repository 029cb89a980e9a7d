"""The graphs of radiance fields alone, with fixed inputs and exact answers, as :mod:`export.graphs.cases` has them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from export.graphs.cases import REFERENCED_BAKED, GraphCase, reference_of
from export.graphs.profiles import Profile, profile_of
from export.graphs.radiance import points_graph, rays_graph
from mnif.modeling import MNIFModel
from mnif.radiance import Cameras, RadianceField, Rays
from mnif.rendering import turntable_poses

_REFERENCES = 2  # instances
_PLACES = 64  # rays or points of each, in a reference
_MOST_POINTS = 1 << 17  # asked of all cells together by the largest engine
# Densities are 20 and more times as large as the values they are made of.
_LIMITS = {"rays": (1e-5, 2e-4), "points": (1e-4, 4e-3)}


@torch.no_grad()
def radiance_cases(decoder: MNIFModel, signal: RadianceField, latents: Tensor, seed: int) -> Iterator[GraphCase]:
    """*rays* and *points* of any instance; ``latents`` [n, D] make the references."""
    coefficients = decoder.coefficients(latents[:_REFERENCES])
    for kind, model in (("rays", rays_graph(decoder, signal)), ("points", points_graph(decoder, signal))):
        places = _places(kind, signal, len(coefficients), seed)
        inputs = {"coefficients": coefficients.numpy()} | {name: place.numpy() for name, place in places.items()}
        exact, single = _answers(kind, decoder, signal, coefficients, places)
        reference = reference_of(kind, inputs, exact, single, _LIMITS[kind])
        yield GraphCase(kind, kind, model, _profile(decoder, signal, kind, model), reference)


@torch.no_grad()
def baked_radiance_cases(
    decoder: MNIFModel, signal: RadianceField, latents: Tensor, labels: Sequence[dict[str, Any]], seed: int
) -> Iterator[GraphCase]:
    """*rays* and *points* of each of ``latents`` [n, D], without a batch; the first few have references."""
    for index, (latent, label) in enumerate(zip(latents, labels, strict=True)):
        coefficients = decoder.coefficients(latent[None])
        baked = decoder.bake(coefficients)
        for kind, graph in (("rays", rays_graph), ("points", points_graph)):
            name, model, reference = f"baked_{index:04d}_{kind}", graph(decoder, signal, baked), None
            if index < REFERENCED_BAKED:
                places = _places(kind, signal, 1, seed)
                exact, single = (
                    {output: answer[0] for output, answer in answers.items()}
                    for answers in _answers(kind, decoder, signal, coefficients, places)
                )
                inputs = {source: place[0].numpy() for source, place in places.items()}
                reference = reference_of(name, inputs, exact, single, _LIMITS[kind])
            profile = _profile(decoder, signal, kind, model)
            yield GraphCase(name, kind, model, profile, reference, instance=label)


def _places(kind: str, signal: RadianceField, count: int, seed: int) -> dict[str, Tensor]:
    """Rays of whole pictures from around, or points all over the cube, [count, places, 3] each."""
    if kind == "points":
        spread = np.random.default_rng(seed).uniform(-signal.bound, signal.bound, (count, _PLACES, 3))
        return {"points": torch.from_numpy(spread.astype(np.float32))}
    poses = turntable_poses(count, signal.camera_distance, elevation=20.0)[:, None]
    intrinsics = torch.tensor(signal.intrinsics).expand(count, -1)
    rays = [each.flatten(1, 3) for each in Cameras(poses, intrinsics, *signal.size).rays()]
    chosen = torch.linspace(0, rays[0].shape[1] - 1, _PLACES).round().long()
    return dict(zip(("origins", "directions"), (each[:, chosen] for each in rays), strict=True))


def _answers(
    kind: str, decoder: MNIFModel, signal: RadianceField, coefficients: Tensor, places: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """In float64 and in float32."""
    exact = copy.deepcopy(decoder).double()
    doubled = {name: place.double() for name, place in places.items()}
    answer = _rendered if kind == "rays" else _asked
    return answer(exact, signal, coefficients.double(), doubled), answer(decoder, signal, coefficients, places)


def _rendered(
    decoder: MNIFModel, signal: RadianceField, coefficients: Tensor, places: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {"colours": signal.render(decoder, coefficients, Rays(places["origins"], places["directions"]))}


def _asked(
    decoder: MNIFModel, signal: RadianceField, coefficients: Tensor, places: dict[str, Tensor]
) -> dict[str, Tensor]:
    values = decoder.values_at(coefficients, places["points"] / signal.bound)
    density = F.softplus(10 * values[..., 3:] - 3) * (2 / signal.bound)  # as RadianceField.render has it
    return {"colours": values[..., :3], "density": density}


def _profile(decoder: MNIFModel, signal: RadianceField, kind: str, model: onnx.ModelProto) -> Profile:
    """From one ray or point to as many as all cells can be asked at."""
    most = _MOST_POINTS // decoder.config.cells**3 // (signal.samples if kind == "rays" else 1)
    most = max(most, 4)
    lengths = {"minimum": 1, "optimum": most // 4, "maximum": most}
    return profile_of(model, **{size: {"batch": 1 if n < most else 4, kind: n} for size, n in lengths.items()})
