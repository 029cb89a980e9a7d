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
from export.graphs.fields import all_layers, baked_layers, coefficient_shape, evaluate_layers
from export.graphs.specs import REFERENCED_BAKED, GraphSpec, Profile, profile_of, reference_of
from mnif.models.mnif_model import MNIFModel
from mnif.models.siren import BakedField
from mnif.signals.radiance import Cameras, RadianceField, Rays
from mnif.signals.volume_rendering import turntable_poses

_TINY = 1e-10  # as in mnif.signals.volume_rendering, instead of a direction's exact zero


def points_graph(decoder: MNIFModel, signal: RadianceField, field: BakedField | None = None) -> onnx.ModelProto:
    """Builds ``coefficients``, ``points`` → ``colours``, ``density``.

    They are [batch, points, 3], [batch, points, 3] and [batch, points, 1]. Points are in
    world coordinates, densities per unit of them.

    Args:
        decoder: the model.
        signal: its signal.
        field: one instance's networks: no ``coefficients`` then, and no axis ``batch``.
    """
    builder = GraphBuilder()
    values = _values(builder, decoder, signal, field, _with_batch(builder, "points", field))
    colours, density = _colours_and_density(builder, signal, values)
    if field is not None:
        colours, density = (builder.squeeze(each, [0], f"{each}/alone") for each in (colours, density))
    shape: Shape = _batched(field, ["points", 3])
    results = {"colours": (colours, shape), "density": (density, [*shape[:-1], 1])}
    return builder.model("points", _sources(decoder, field) | {"points": shape}, results)


def rays_graph(decoder: MNIFModel, signal: RadianceField, field: BakedField | None = None) -> onnx.ModelProto:
    """Builds ``coefficients``, ``origins``, ``directions`` → ``colours``, the last three [batch, rays, 3].

    Origins are in world coordinates, directions of length one.

    Args:
        decoder: the model.
        signal: its signal.
        field: one instance's networks: no ``coefficients`` then, and no axis ``batch``.
    """
    builder = GraphBuilder()
    origins, directions = (_with_batch(builder, name, field) for name in ("origins", "directions"))
    near, length = _interval(builder, signal, origins, directions)
    middles = (np.arange(signal.samples, dtype=np.float32) + np.float32(0.5)) / np.float32(signal.samples)
    place = builder.constant("depths/place", middles)
    depths = builder.add("Add", [near, builder.add("Mul", [length, place], "depths/along")], "depths")

    along = builder.add(
        "Mul",
        [builder.unsqueeze(directions, [-2], "points/directions"), builder.unsqueeze(depths, [-1], "points/depths")],
        "points/along",
    )
    points = builder.add("Add", [builder.unsqueeze(origins, [-2], "points/origins"), along], "points/by_ray")
    values = _values(builder, decoder, signal, field, builder.reshape(points, (0, -1, 3), "points"))
    values = builder.reshape(values, (0, -1, signal.samples, 4), "values/by_ray")
    colours, density = _colours_and_density(builder, signal, values)
    seen = _composite(builder, signal, colours, builder.squeeze(density, [-1], "density/by_ray"), length)
    if field is not None:
        seen = builder.squeeze(seen, [0], "seen/alone")
    shape: Shape = _batched(field, ["rays", 3])
    sources = _sources(decoder, field) | {"origins": shape, "directions": shape}
    return builder.model("rays", sources, {"colours": (seen, shape)})


def _sources(decoder: MNIFModel, field: BakedField | None) -> dict[str, Shape]:
    return {} if field is not None else {"coefficients": coefficient_shape(decoder)}


def _batched(field: BakedField | None, shape: list[int | str]) -> list[int | str]:
    return shape if field is not None else ["batch", *shape]


def _with_batch(builder: GraphBuilder, source: str, field: BakedField | None) -> str:
    """Gives a baked graph's input [n, 3] a batch of one; that of any instance has its batch."""
    return source if field is None else builder.unsqueeze(source, [0], f"{source}/batch")


def _values(
    builder: GraphBuilder, decoder: MNIFModel, signal: RadianceField, field: BakedField | None, points: str
) -> str:
    """Evaluates the fields at points [batch, n, 3] of the world: [batch, n, 4]."""
    layers = all_layers(builder, decoder, "coefficients") if field is None else baked_layers(builder, field)
    inside = builder.add("Mul", [points, builder.number(1 / signal.bound)], "field/points")
    by_cell = builder.unsqueeze(inside, [1], "field/by_cell")
    if decoder.config.cells == 1:
        return builder.squeeze(
            evaluate_layers(builder, by_cell, layers, decoder.config.output_sine), [1], "field/values"
        )
    cells = torch.cartesian_prod(*[torch.arange(decoder.config.cells)] * 3)
    offset = (decoder.config.cells - 1 - 2 * cells)[None, :, None].float()
    scaled = builder.add("Mul", [by_cell, builder.number(decoder.config.cells)], "field/scaled")
    local = builder.add("Add", [scaled, builder.constant("field/offset", offset)], "field/coordinates")
    answers = evaluate_layers(builder, local, layers, decoder.config.output_sine)
    weights = _cell_weights(builder, decoder, inside, cells)
    return builder.reduce_sum(builder.add("Mul", [answers, weights], "field/shared"), 1, "field/values", keep=False)


def _cell_weights(builder: GraphBuilder, decoder: MNIFModel, points: str, cells: torch.Tensor) -> str:
    """Adds the weights of the cells at points [batch, n, 3]: [batch, cells, n, 1], summing to 1 over the cells.

    On one axis, a ramp runs up at each border; a cell's weight is its own ramp minus that of the next one.
    """
    config = decoder.config
    # A ramp of no width is a step that belongs to the right cell, as in mnif.models.cell_grid.
    steepness, middle = (1 / (2 * config.overlap), 0.5) if config.overlap > 0 else (1e12, 1.0)
    borders = torch.arange(1, config.cells, dtype=torch.float32)
    position = builder.add("Mul", [points, builder.number(config.cells / 2)], "shares/scaled")
    position = builder.add("Add", [position, builder.number(config.cells / 2)], "shares/position")
    apart = builder.unsqueeze(position, [1], "shares/apart")
    distance = builder.add(
        "Sub", [apart, builder.constant("shares/borders", borders[:, None, None])], "shares/distance"
    )
    steep = builder.add("Mul", [distance, builder.number(steepness)], "shares/steep")
    shifted = builder.add("Add", [steep, builder.number(middle)], "shares/shifted")
    ramp = builder.add("Clip", [shifted, builder.scalar(0.0), builder.scalar(1.0)], "shares/ramp")
    ends = {"first": builder.number(1.0), "last": builder.number(0.0)}
    blank = builder.add("Mul", [apart, builder.number(0.0)], "shares/blank")
    full, none = (builder.add("Add", [blank, value], f"shares/{name}") for name, value in ends.items())
    left = builder.add("Concat", [full, ramp], "shares/left", axis=1)
    right = builder.add("Concat", [ramp, none], "shares/right", axis=1)
    by_axis = builder.add("Sub", [left, right], "shares/by_axis")  # [batch, cells per axis, n, 3]
    weight = ""
    for axis, name in enumerate(builder.split(by_axis, (1, 1, 1), [f"shares/axis_{axis}" for axis in range(3)])):
        number = builder.constant(f"shares/cell_{axis}", cells[:, axis])
        of_cell = builder.add("Gather", [name, number], f"shares/of_cell_{axis}", axis=1)
        weight = builder.add("Mul", [weight, of_cell], f"shares/up_to_{axis}") if weight else of_cell
    return weight


def _colours_and_density(builder: GraphBuilder, signal: RadianceField, values: str) -> tuple[str, str]:
    """Turns values [..., 4] into colours [..., 3] and density [..., 1] per unit of length in the world."""
    colours, raw = builder.split(values, (3, 1), ["colours_of_points", "density/raw"])
    raised = builder.add("Mul", [raw, builder.number(10.0)], "density/raised")
    soft = builder.add(
        "Softplus", [builder.add("Sub", [raised, builder.number(3.0)], "density/shifted")], "density/soft"
    )
    return colours, builder.add("Mul", [soft, builder.number(2 / signal.bound)], "density/of_points")


def _interval(builder: GraphBuilder, signal: RadianceField, origins: str, directions: str) -> tuple[str, str]:
    """Finds where rays enter the cube and how far they are inside, both [batch, rays, 1].

    As :func:`mnif.signals.volume_rendering.box_intersection` has it, clipped to the signal's near and far.
    """
    zero, bound = builder.number(0.0), builder.number(signal.bound)
    flat = builder.add("Less", [builder.add("Abs", [directions], "box/steepness"), builder.number(_TINY)], "box/flat")
    slope = builder.add("Where", [flat, builder.number(_TINY), directions], "box/slope")
    crossings = []
    for name, side in (("low", builder.number(-signal.bound)), ("high", bound)):
        gap = builder.add("Sub", [side, origins], f"box/{name}_gap")
        crossings.append(builder.add("Div", [gap, slope], f"box/{name}"))
    first, last = (builder.add(kind, crossings, f"box/{kind.lower()}") for kind in ("Min", "Max"))
    entry = builder.add("ReduceMax", [first], "box/entry", axes=[-1], keepdims=1)
    near = builder.add("Max", [entry, zero], "box/near")
    far = builder.add("ReduceMin", [last], "box/far", axes=[-1], keepdims=1)
    along = builder.reduce_sum(builder.add("Mul", [origins, directions], "box/products"), -1, "box/along", keep=True)
    closest = builder.add("Max", [builder.add("Neg", [along], "box/behind"), zero], "box/closest")
    hit = builder.add("Greater", [far, near], "box/hit")
    limits = [builder.scalar(signal.near), builder.scalar(signal.far)]
    near, far = (
        builder.add(
            "Clip", [builder.add("Where", [hit, end, closest], f"box/{name}_or_closest"), *limits], f"box/{name}_end"
        )
        for name, end in (("near", near), ("far", far))
    )
    return near, builder.add("Sub", [far, near], "box/length")


def _composite(builder: GraphBuilder, signal: RadianceField, colours: str, density: str, length: str) -> str:
    """Turns colours [batch, rays, samples, 3] and density [batch, rays, samples] into light [batch, rays, 3].

    :func:`mnif.signals.volume_rendering.composite`; what lies before a sample is summed by a product with a triangle
    of ones.
    """
    samples = signal.samples
    shares = np.full(samples, 1 / samples, dtype=np.float32)
    shares[-1] /= 2  # depths are the middles of intervals, and the last sample reaches to the end of its own
    lengths = builder.add("Mul", [length, builder.constant("light/shares", shares)], "light/lengths")
    thickness = builder.add("Mul", [density, lengths], "light/thickness")
    triangle = builder.constant("light/triangle", np.triu(np.ones((samples, samples), dtype=np.float32), 1))
    before = builder.add("MatMul", [thickness, triangle], "light/before")
    reaching = builder.add("Exp", [builder.add("Neg", [before], "light/before_negative")], "light/reaching")
    passing = builder.add("Exp", [builder.add("Neg", [thickness], "light/thickness_negative")], "light/passing")
    kept = builder.add("Sub", [builder.number(1.0), passing], "light/kept")
    weights = builder.unsqueeze(builder.add("Mul", [reaching, kept], "light/weights"), [-1], "light/weights_by_colour")
    weighted = builder.add("Mul", [colours, weights], "light/weighted")
    seen = builder.reduce_sum(weighted, -2, "light/from_samples", keep=False)
    total = builder.reduce_sum(thickness, -1, "light/total", keep=True)
    through = builder.add("Exp", [builder.add("Neg", [total], "light/total_negative")], "light/through")
    background = builder.number(1.0 if signal.background == "white" else -1.0)
    return builder.add("Add", [seen, builder.add("Mul", [through, background], "light/behind")], "light/seen")


_REFERENCES = 2  # instances

_PLACES = 64  # rays or points of each, in a reference

_MOST_POINTS = 1 << 17  # asked of all cells together by the largest engine


# Densities are 20 and more times as large as the values they are made of.
_LIMITS = {"rays": (1e-5, 2e-4), "points": (1e-4, 4e-3)}


@torch.no_grad()
def radiance_specs(decoder: MNIFModel, signal: RadianceField, latents: Tensor, seed: int) -> Iterator[GraphSpec]:
    """Yields *rays* and *points* of any instance; ``latents`` [n, D] make the references."""
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
    """Yields *rays* and *points* of each of ``latents`` [n, D], without a batch; the first few have references."""
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
    """Picks rays of pictures from all around, or points all over the cube, [count, places, 3] each."""
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
    """Returns what PyTorch answers in float64 and in float32."""
    exact = copy.deepcopy(decoder).double()
    doubled = {name: place.double() for name, place in places.items()}
    answer = _render_rays if kind == "rays" else _query_points
    return answer(exact, signal, coefficients.double(), doubled), answer(decoder, signal, coefficients, places)


def _render_rays(
    decoder: MNIFModel, signal: RadianceField, coefficients: Tensor, places: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {"colours": signal.render(decoder, coefficients, Rays(places["origins"], places["directions"]))}


def _query_points(
    decoder: MNIFModel, signal: RadianceField, coefficients: Tensor, places: dict[str, Tensor]
) -> dict[str, Tensor]:
    values = decoder.values_at(coefficients, places["points"] / signal.bound)
    density = signal.density(values[..., 3:])
    return {"colours": values[..., :3], "density": density}


def _profile(decoder: MNIFModel, signal: RadianceField, kind: str, model: onnx.ModelProto) -> Profile:
    """Profiles a graph from one ray or point to as many as all cells can be asked at."""
    most = _MOST_POINTS // decoder.config.cells**3 // (signal.samples if kind == "rays" else 1)
    most = max(most, 4)
    lengths = {"minimum": 1, "optimum": most // 4, "maximum": most}
    return profile_of(model, **{size: {"batch": 1 if n < most else 4, kind: n} for size, n in lengths.items()})
