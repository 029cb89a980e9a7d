"""What an engine consists of, read from the builder's log: kernels, what was fused into each, and their types.

TensorRT-RTX prints its kernels when profiling_verbosity is DETAILED and the logger takes VERBOSE lines, even on a
machine without a GPU. This file stands by itself (Python 3.8) and is copied into every bundle's ``device/``.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Sequence

_KERNEL = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*)\], TacticName: .*?Metadata: (?P<nodes>.*)"
)
_PROFILE = re.compile(r"_myl(\d+)_\d+$")
_TYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_PARSED = re.compile(r"(?P<name>\S+) \[(?P<operator>\w+)\] (?P<side>inputs|outputs): (?P<tensors>.*)")
_PARSED_TYPE = re.compile(r"\)\[(\w+)\]")
_NO_WORK = "shape_call"  # works sizes out on the host


class Kernel(NamedTuple):
    """One launch.

    Attributes:
        profile: number of the optimisation profile it belongs to; each has kernels of its own.
        name: the compiler's.
        kind: ``"gemm"``, ``"kgen"`` (generated, elementwise), ``"runtime_fusion"`` (a product with what follows), ...
        inputs: types of what it reads, constants last: ``"Float"``, ``"Half"``, ...
        outputs: types of what it writes.
        nodes: names of the graph's nodes it does.
    """

    profile: int
    name: str
    kind: str
    inputs: list[str]
    outputs: list[str]
    nodes: list[str]


def kernels_of_log(lines: Sequence[str]) -> list[Kernel]:
    """The kernels of an engine in the order of their launch; none if the builder did not print them."""
    kernels = []
    for line in "\n".join(lines).split("\n"):
        found = _KERNEL.match(line)
        if found is not None and found["kind"] != _NO_WORK:
            types = [_TYPE.findall(found[part]) for part in ("inputs", "constants", "outputs")]
            nodes = _NODE.findall(found["nodes"])
            profile = _PROFILE.search(found["name"])
            number = int(profile.group(1)) if profile else 0
            kernels.append(Kernel(number, found["name"], found["kind"], types[0] + types[1], types[2], nodes))
    return kernels


def node_types_of_log(lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Node → (operator, type of its first input) as the parser understood the graph, such as ("Sin", "FLOAT")."""
    types = {}
    for line in lines:
        found = _PARSED.match(line)
        if found is not None and found["side"] == "inputs":
            first = _PARSED_TYPE.findall(found["tensors"])
            types[found["name"]] = (found["operator"], first[0] if first else "")
    return types
