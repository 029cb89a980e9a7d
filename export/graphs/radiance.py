"""The graphs of radiance fields: points → colours and density, and rays → colours with the volume rendering inside.

Both come in two forms: for any instance, whose coefficients are an input, with a dynamic batch; and baked, one
instance's weights inside, without a batch. The rendering is :meth:`mnif.signals.radiance.RadianceField.render` with
depths in the middles of their intervals.

A point in space is on no grid, so which cells answer for it is worked out in the graph. Sorting points by cell needs
shapes that depend on values, which engines do not have; every cell is asked at every point instead, and the answers
are added with the weights of :func:`mnif.models.cell_grid.assign_points`, most of them zero. That costs cells³ times
the work of one cell, at fixed shapes; the usual radiance field has one cell and pays nothing.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor

from export.graphs.builder import GraphBuilder, Shape
from export.graphs.fields import all_layers, baked_layers, coefficient_shape, evaluated
from export.graphs.specs import REFERENCED_BAKED, GraphSpec, Profile, profile_of, reference_of
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField
from mnif.signals.radiance import Cameras, RadianceField, Rays
from mnif.signals.volume_rendering import turntable_poses

_TINY = 1e-10  # as in mnif.signals.volume_rendering, instead of a direction's exact zero


def points_graph(decoder: MNIFModel, signal: RadianceField, field: BakedField | None = None) -> onnx.ModelProto:
    """``coefficients``, ``points`` → ``colours``, ``density``: the points' places, colours and densities.

    They are [batch, points, 3], [batch, points, 3] and [batch, points, 1]. Points are in
    world coordinates, densities per unit of them.

    Args:
        decoder: the model.
        signal: its signal.
        field: one instance's networks: no ``coefficients`` then, and no axis ``batch``.
    """
    nodes = GraphBuilder()
    values = _values(nodes, decoder, signal, field, _with_batch(nodes, "points", field))
    colours, density = _colours_and_density(nodes, signal, values)
    if field is not None:
        colours, density = (nodes.squeeze(each, [0], f"{each}/alone") for each in (colours, density))
    shape: Shape = _batched(field, ["points", 3])
    results = {"colours": (colours, shape), "density": (density, [*shape[:-1], 1])}
    return nodes.model("points", _sources(decoder, field) | {"points": shape}, results)


def rays_graph(decoder: MNIFModel, signal: RadianceField, field: BakedField | None = None) -> onnx.ModelProto:
    """``coefficients``, ``origins``, ``directions`` → ``colours``, the last three [batch, rays, 3].

    Origins are in world coordinates, directions of length one.

    Args:
        decoder: the model.
        signal: its signal.
        field: one instance's networks: no ``coefficients`` then, and no axis ``batch``.
    """
    nodes = GraphBuilder()
    origins, directions = (_with_batch(nodes, name, field) for name in ("origins", "directions"))
    near, length = _interval(nodes, signal, origins, directions)
    middles = (np.arange(signal.samples, dtype=np.float32) + np.float32(0.5)) / np.float32(signal.samples)
    place = nodes.constant("depths/place", middles)
    depths = nodes.add("Add", [near, nodes.add("Mul", [length, place], "depths/along")], "depths")

    along = nodes.add(
        "Mul",
        [nodes.unsqueeze(directions, [-2], "points/directions"), nodes.unsqueeze(depths, [-1], "points/depths")],
        "points/along",
    )
    points = nodes.add("Add", [nodes.unsqueeze(origins, [-2], "points/origins"), along], "points/by_ray")
    values = _values(nodes, decoder, signal, field, nodes.reshape(points, (0, -1, 3), "points"))
    values = nodes.reshape(values, (0, -1, signal.samples, 4), "values/by_ray")
    colours, density = _colours_and_density(nodes, signal, values)
    seen = _composited(nodes, signal, colours, nodes.squeeze(density, [-1], "density/by_ray"), length)
    if field is not None:
        seen = nodes.squeeze(seen, [0], "seen/alone")
    shape: Shape = _batched(field, ["rays", 3])
    sources = _sources(decoder, field) | {"origins": shape, "directions": shape}
    return nodes.model("rays", sources, {"colours": (seen, shape)})


def _sources(decoder: MNIFModel, field: BakedField | None) -> dict[str, Shape]:
    return {} if field is not None else {"coefficients": coefficient_shape(decoder)}


def _batched(field: BakedField | None, shape: list[int | str]) -> list[int | str]:
    return shape if field is not None else ["batch", *shape]


def _with_batch(nodes: GraphBuilder, source: str, field: BakedField | None) -> str:
    """An input as [batch, n, 3]."""
    return source if field is None else nodes.unsqueeze(source, [0], f"{source}/batch")


def _values(
    nodes: GraphBuilder, decoder: MNIFModel, signal: RadianceField, field: BakedField | None, points: str
) -> str:
    """What the fields say at points [batch, n, 3] of the world: [batch, n, 4]."""
    layers = all_layers(nodes, decoder, "coefficients") if field is None else baked_layers(nodes, field)
    inside = nodes.add("Mul", [points, nodes.number(1 / signal.bound)], "field/points")
    by_cell = nodes.unsqueeze(inside, [1], "field/by_cell")
    if decoder.config.cells == 1:
        return nodes.squeeze(evaluated(nodes, by_cell, layers, decoder.config.output_sine), [1], "field/values")
    cells = torch.cartesian_prod(*[torch.arange(decoder.config.cells)] * 3)
    offset = (decoder.config.cells - 1 - 2 * cells)[None, :, None].float()
    scaled = nodes.add("Mul", [by_cell, nodes.number(decoder.config.cells)], "field/scaled")
    local = nodes.add("Add", [scaled, nodes.constant("field/offset", offset)], "field/coordinates")
    answers = evaluated(nodes, local, layers, decoder.config.output_sine)
    shares = _shares(nodes, decoder, inside, cells)
    return nodes.reduce_sum(nodes.add("Mul", [answers, shares], "field/shared"), 1, "field/values", keep=False)


def _shares(nodes: GraphBuilder, decoder: MNIFModel, points: str, cells: torch.Tensor) -> str:
    """Each cell's share of the value at points [batch, n, 3]: [batch, cells, n, 1], summing to 1 over the cells.

    On one axis, a ramp runs up at each border; a cell's share is its own ramp minus that of the next one.
    """
    config = decoder.config
    # A ramp of no width is a step that belongs to the right cell, as in mnif.models.cell_grid.
    steepness, middle = (1 / (2 * config.overlap), 0.5) if config.overlap > 0 else (1e12, 1.0)
    borders = torch.arange(1, config.cells, dtype=torch.float32)
    position = nodes.add("Mul", [points, nodes.number(config.cells / 2)], "shares/scaled")
    position = nodes.add("Add", [position, nodes.number(config.cells / 2)], "shares/position")
    apart = nodes.unsqueeze(position, [1], "shares/apart")
    distance = nodes.add("Sub", [apart, nodes.constant("shares/borders", borders[:, None, None])], "shares/distance")
    steep = nodes.add("Mul", [distance, nodes.number(steepness)], "shares/steep")
    shifted = nodes.add("Add", [steep, nodes.number(middle)], "shares/shifted")
    ramp = nodes.add("Clip", [shifted, nodes.scalar(0.0), nodes.scalar(1.0)], "shares/ramp")
    ends = {"first": nodes.number(1.0), "last": nodes.number(0.0)}
    blank = nodes.add("Mul", [apart, nodes.number(0.0)], "shares/blank")
    full, none = (nodes.add("Add", [blank, value], f"shares/{name}") for name, value in ends.items())
    left = nodes.add("Concat", [full, ramp], "shares/left", axis=1)
    right = nodes.add("Concat", [ramp, none], "shares/right", axis=1)
    by_axis = nodes.add("Sub", [left, right], "shares/by_axis")  # [batch, cells per axis, n, 3]
    share = ""
    for axis, name in enumerate(nodes.split(by_axis, (1, 1, 1), [f"shares/axis_{axis}" for axis in range(3)])):
        number = nodes.constant(f"shares/cell_{axis}", cells[:, axis])
        of_cell = nodes.add("Gather", [name, number], f"shares/of_cell_{axis}", axis=1)
        share = nodes.add("Mul", [share, of_cell], f"shares/up_to_{axis}") if share else of_cell
    return share


def _colours_and_density(nodes: GraphBuilder, signal: RadianceField, values: str) -> tuple[str, str]:
    """Values [..., 4] → colours [..., 3], and density [..., 1] per unit of length in the world."""
    colours, raw = nodes.split(values, (3, 1), ["colours_of_points", "density/raw"])
    raised = nodes.add("Mul", [raw, nodes.number(10.0)], "density/raised")
    soft = nodes.add("Softplus", [nodes.add("Sub", [raised, nodes.number(3.0)], "density/shifted")], "density/soft")
    return colours, nodes.add("Mul", [soft, nodes.number(2 / signal.bound)], "density/of_points")


def _interval(nodes: GraphBuilder, signal: RadianceField, origins: str, directions: str) -> tuple[str, str]:
    """Where rays enter the cube, and how far they are inside, both [batch, rays, 1].

    As :func:`mnif.signals.volume_rendering.box_intersection` has it, clipped to the signal's near and far.
    """
    zero, bound = nodes.number(0.0), nodes.number(signal.bound)
    flat = nodes.add("Less", [nodes.add("Abs", [directions], "box/steepness"), nodes.number(_TINY)], "box/flat")
    slope = nodes.add("Where", [flat, nodes.number(_TINY), directions], "box/slope")
    crossings = []
    for name, side in (("low", nodes.number(-signal.bound)), ("high", bound)):
        gap = nodes.add("Sub", [side, origins], f"box/{name}_gap")
        crossings.append(nodes.add("Div", [gap, slope], f"box/{name}"))
    first, last = (nodes.add(kind, crossings, f"box/{kind.lower()}") for kind in ("Min", "Max"))
    entry = nodes.add("ReduceMax", [first], "box/entry", axes=[-1], keepdims=1)
    near = nodes.add("Max", [entry, zero], "box/near")
    far = nodes.add("ReduceMin", [last], "box/far", axes=[-1], keepdims=1)
    along = nodes.reduce_sum(nodes.add("Mul", [origins, directions], "box/products"), -1, "box/along", keep=True)
    closest = nodes.add("Max", [nodes.add("Neg", [along], "box/behind"), zero], "box/closest")
    hit = nodes.add("Greater", [far, near], "box/hit")
    limits = [nodes.scalar(signal.near), nodes.scalar(signal.far)]
    near, far = (
        nodes.add(
            "Clip", [nodes.add("Where", [hit, end, closest], f"box/{name}_or_closest"), *limits], f"box/{name}_end"
        )
        for name, end in (("near", near), ("far", far))
    )
    return near, nodes.add("Sub", [far, near], "box/length")


def _composited(nodes: GraphBuilder, signal: RadianceField, colours: str, density: str, length: str) -> str:
    """Colours [batch, rays, samples, 3] and density [batch, rays, samples] → the light of rays [batch, rays, 3].

    :func:`mnif.signals.volume_rendering.composite`; what lies before a sample is summed by a product with a triangle
    of ones.
    """
    samples = signal.samples
    shares = np.full(samples, 1 / samples, dtype=np.float32)
    shares[-1] /= 2  # depths are the middles of intervals, and the last sample reaches to the end of its own
    lengths = nodes.add("Mul", [length, nodes.constant("light/shares", shares)], "light/lengths")
    thickness = nodes.add("Mul", [density, lengths], "light/thickness")
    triangle = nodes.constant("light/triangle", np.triu(np.ones((samples, samples), dtype=np.float32), 1))
    before = nodes.add("MatMul", [thickness, triangle], "light/before")
    reaching = nodes.add("Exp", [nodes.add("Neg", [before], "light/before_negative")], "light/reaching")
    passing = nodes.add("Exp", [nodes.add("Neg", [thickness], "light/thickness_negative")], "light/passing")
    kept = nodes.add("Sub", [nodes.number(1.0), passing], "light/kept")
    weights = nodes.unsqueeze(nodes.add("Mul", [reaching, kept], "light/weights"), [-1], "light/weights_by_colour")
    weighted = nodes.add("Mul", [colours, weights], "light/weighted")
    seen = nodes.reduce_sum(weighted, -2, "light/from_samples", keep=False)
    total = nodes.reduce_sum(thickness, -1, "light/total", keep=True)
    through = nodes.add("Exp", [nodes.add("Neg", [total], "light/total_negative")], "light/through")
    background = nodes.number(1.0 if signal.background == "white" else -1.0)
    return nodes.add("Add", [seen, nodes.add("Mul", [through, background], "light/behind")], "light/seen")


_REFERENCES = 2  # instances


_PLACES = 64  # rays or points of each, in a reference


_MOST_POINTS = 1 << 17  # asked of all cells together by the largest engine


# Densities are 20 and more times as large as the values they are made of.
_LIMITS = {"rays": (1e-5, 2e-4), "points": (1e-4, 4e-3)}


@torch.no_grad()
def radiance_specs(decoder: MNIFModel, signal: RadianceField, latents: Tensor, seed: int) -> Iterator[GraphSpec]:
    """*rays* and *points* of any instance; ``latents`` [n, D] make the references."""
    coefficients = decoder.coefficients(latents[:_REFERENCES])
    for kind, model in (("rays", rays_graph(decoder, signal)), ("points", points_graph(decoder, signal))):
        places = _places(kind, signal, len(coefficients), seed)
        inputs = {"coefficients": coefficients.numpy()} | {name: place.numpy() for name, place in places.items()}
        exact, single = _answers(kind, decoder, signal, coefficients, places)
        reference = reference_of(kind, inputs, exact, single, _LIMITS[kind])
        yield GraphSpec(kind, kind, model, _profile(decoder, signal, kind, model), reference)


@torch.no_grad()
def baked_radiance_specs(
    decoder: MNIFModel, signal: RadianceField, latents: Tensor, labels: Sequence[dict[str, Any]], seed: int
) -> Iterator[GraphSpec]:
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
            yield GraphSpec(name, kind, model, profile, reference, instance=label)


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
    density = signal.density(values[..., 3:])
    return {"colours": values[..., :3], "density": density}


def _profile(decoder: MNIFModel, signal: RadianceField, kind: str, model: onnx.ModelProto) -> Profile:
    """From one ray or point to as many as all cells can be asked at."""
    most = _MOST_POINTS // decoder.config.cells**3 // (signal.samples if kind == "rays" else 1)
    most = max(most, 4)
    lengths = {"minimum": 1, "optimum": most // 4, "maximum": most}
    return profile_of(model, **{size: {"batch": 1 if n < most else 4, kind: n} for size, n in lengths.items()})
