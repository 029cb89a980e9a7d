"""Lines for NVIDIA's own tools, trtexec and Polygraphy, as each generation of TensorRT takes them.

What a generation's trtexec knows is that of NVIDIA/TensorRT's ``samples/common/sampleOptions.cpp`` at its releases:
``--stronglyTyped`` came with 9.1, and a flag that is not known ends trtexec before it begins. The guide "Migrating
trtexec Usage from TensorRT 10.x to 11.x" lists what 11 has no more: every precision flag, as all networks are strongly
typed there; ``--stronglyTyped`` is taken and does nothing.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generation:
    """TensorRT versions whose tools take the same flags.

    Attributes:
        title: for people, with the JetPacks that have them.
        first: the oldest version that mnif knows of it, (major, minor).
        strongly_typed: it can take types as the graph has them.
        trtexec: flags that make trtexec do so, where it does not unasked.
        polygraphy: likewise for Polygraphy.
        int8: flags of both without which matrices stored in int8 are refused.
    """

    title: str
    first: tuple[int, int]
    strongly_typed: bool
    trtexec: tuple[str, ...] = ()
    polygraphy: tuple[str, ...] = ()
    int8: tuple[str, ...] = ()


GENERATIONS = (
    Generation("TensorRT 8.5 and 8.6 (JetPack 5.1 and 6.0)", (8, 5), False, int8=("--int8",)),
    Generation("TensorRT 10 (JetPack 6.1 to 7.2)", (10, 0), True, ("--stronglyTyped",), ("--strongly-typed",)),
    Generation("TensorRT 11 (from JetPack 7.2.2 on)", (11, 0), True),
)
"""What JetPacks have brought since 5.1, the oldest first; no JetPack had TensorRT 9."""


def trtexec_command(name: str, graph: Mapping[str, Any], generation: Generation) -> str:
    """Writes the line that builds and times one graph's engine, to be run in the bundle's folder.

    TensorRT 8 picks types by speed, and trtexec would have to be told the type of every layer by name; a mixed graph's
    plan is built by ``device/build.py`` there, which does that, and timed by trtexec.

    Args:
        name: of the graph.
        graph: the manifest's entry.
        generation: of TensorRT.
    """
    if graph["half"] and not generation.strongly_typed:
        best = _shapes("shapes", graph["profile"], "optimum")
        build = f"python3 device/build.py --graphs {name} --batch_sizes"
        return f"{build} && trtexec --loadEngine=engines/{name}.plan {best}"
    sizes = [
        _shapes(flag, graph["profile"], size)
        for flag, size in (("minShapes", "minimum"), ("optShapes", "optimum"), ("maxShapes", "maximum"))
    ]
    stored = generation.int8 if graph["has_int8"] else ()
    flags = ["--noTF32", *generation.trtexec, *stored]
    return " ".join(["trtexec", f"--onnx={graph['file']}", f"--saveEngine={name}.engine", *sizes, *flags])


def polygraphy_commands(graph: Mapping[str, Any], generation: Generation) -> list[str]:
    """Writes Polygraphy's lines for a graph: what it is made of, and what TensorRT answers beside ONNX Runtime.

    Inputs are uniform in [-1, 1], masks in [0, 1], TF32 is off unasked, and the answers may differ by the manifest's
    tolerance. A mixed graph under TensorRT 8 has the first line alone: Polygraphy would let TensorRT choose its types.

    Args:
        graph: the manifest's entry, with a reference.
        generation: of TensorRT.
    """
    inspect = f"polygraphy inspect model {graph['file']} --show layers attrs"
    if graph["half"] and not generation.strongly_typed:
        return [inspect]
    profile, words = graph["profile"], ["polygraphy", "run", graph["file"], "--onnxrt", "--trt"]
    words += [*generation.polygraphy, *(generation.int8 if graph["has_int8"] else ())]
    for flag, size in (
        ("input-shapes", "optimum"),
        ("trt-min-shapes", "minimum"),
        ("trt-opt-shapes", "optimum"),
        ("trt-max-shapes", "maximum"),
    ):
        words += [f"--{flag}", *(f"{source}:{_listed(shapes[size])}" for source, shapes in sorted(profile.items()))]
    masks = ["mask:[0,1]"] if "mask" in profile else []
    words += ["--val-range", *masks, "[-1,1]", "--check-error-stat", "max", "--rtol", "0"]
    return [inspect, shlex.join([*words, "--atol", f"{graph['tolerance']['max_abs']:.1e}"])]


def _shapes(flag: str, profile: Mapping[str, Mapping[str, list[int]]], size: str) -> str:
    return f"--{flag}={','.join(f'{source}:{_by(shapes[size])}' for source, shapes in sorted(profile.items()))}"


def _by(shape: list[int]) -> str:
    return "x".join(map(str, shape))


def _listed(shape: list[int]) -> str:
    return f"[{','.join(map(str, shape))}]"
