"""The lines for trtexec and Polygraphy: each generation takes them, and Polygraphy's own parser does."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.device.bundle import BundleFolder
from export.tensorrt_tools import GENERATIONS, Generation, polygraphy_commands, trtexec_command
from mnif.utils.json_files import read_json
from tests.fakes.trtexec import FLAGS

ROOT = Path(__file__).parents[2]
OLDEST, OPTING, NEWEST = GENERATIONS
titles = pytest.mark.parametrize("generation", GENERATIONS, ids=lambda each: each.title)


@pytest.fixture
def graphs(exported: Path) -> dict[str, dict[str, Any]]:
    return read_json(exported / "manifest.json")["graphs"]


def trtexec_calls(lines: str) -> Iterator[list[str]]:
    """The words of every trtexec in some lines of a shell."""
    for line in lines.replace("\\\n", " ").splitlines():
        for command in line.split("&&"):
            words = shlex.split(command, comments=True)
            if words and words[0].endswith("trtexec"):
                yield words[1:]


def flags_of(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words}


def versions_of(generation: Generation) -> list[tuple[int, int]]:
    return [
        version for version in FLAGS if max(g.first for g in GENERATIONS if g.first <= version) == generation.first
    ]


@titles
def test_every_version_of_a_generation_knows_the_flags(
    graphs: dict[str, dict[str, Any]], generation: Generation
) -> None:
    assert versions_of(generation)
    for name, graph in graphs.items():
        for stored in (False, True):
            (words,) = trtexec_calls(trtexec_command(name, graph | {"has_int8": stored}, generation))
            for version in versions_of(generation):
                assert flags_of(words) <= FLAGS[version], f"{name} on {version}"


def test_types_are_held_to_the_graph_in_every_generation(graphs: dict[str, dict[str, Any]]) -> None:
    for name, graph in graphs.items():
        old, opting, newest = (trtexec_command(name, graph, generation) for generation in GENERATIONS)
        assert "--stronglyTyped" in opting
        assert newest == opting.replace(" --stronglyTyped", "")
        if graph["half"]:
            build, _, run = old.partition(" && ")
            assert build == f"python3 device/build.py --graphs {name} --batch_sizes"
            assert f"--loadEngine=engines/{name}.plan" in run
        else:
            assert old == newest
        narrow = trtexec_command(name, graph | {"has_int8": True, "half": []}, OLDEST)
        assert narrow.endswith("--noTF32 --int8")


def test_shapes_of_the_lines_are_the_profiles(graphs: dict[str, dict[str, Any]]) -> None:
    for name, graph in graphs.items():
        (words,) = trtexec_calls(trtexec_command(name, graph, OPTING))
        command = dict(word.lstrip("-").partition("=")[::2] for word in words)
        assert command["onnx"] == graph["file"]
        for flag, size in (("min", "minimum"), ("opt", "optimum"), ("max", "maximum")):
            given = dict(part.split(":") for part in command[f"{flag}Shapes"].split(","))
            assert {source: list(map(int, shape.split("x"))) for source, shape in given.items()} == {
                source: shapes[size] for source, shapes in graph["profile"].items()
            }


def test_the_readme_has_both_forms_of_every_graph(exported: Path, graphs: dict[str, dict[str, Any]]) -> None:
    readme = (exported / "README.md").read_text()
    for generation in (OLDEST, OPTING):
        assert f"**{generation.title}**" in readme
        for name, graph in graphs.items():
            assert trtexec_command(name, graph, generation) in readme


def test_lines_of_the_docs_run_on_every_version() -> None:
    """They load plans, which all versions do with the same flags."""
    calls = [
        words
        for page in sorted((ROOT / "docs").rglob("*.md"))
        for words in trtexec_calls("\n".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.M)))
    ]
    assert calls
    for words in calls:
        for version, known in FLAGS.items():
            assert flags_of(words) <= known, f"{words} on {version}"


def run_polygraphy(folder: Path, *commands: list[str]) -> subprocess.CompletedProcess[str]:
    """Several commands of Polygraphy in one process of its own, which leaves files open and asks deprecated things."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed")
    code = "import json, sys; from polygraphy.tools import main; sys.exit(max(map(main, json.loads(sys.argv[1]))))"
    command = [sys.executable, "-W", "ignore", "-c", code, json.dumps(commands)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@titles
def test_polygraphy_takes_the_lines(exported: Path, generation: Generation, tmp_path: Path) -> None:
    """Its own parser does, and what it would run is right: without TensorRT it writes that as Python."""
    commands, scripts = [], {}
    for name in ("decoder", "decoder_mixed", "encoder", "sampler_3_mixed"):
        graph = BundleFolder(exported).graph(name) | {"has_int8": name.startswith("sampler")}
        inspect, *runs = (shlex.split(line)[1:] for line in polygraphy_commands(graph, generation))
        assert len(runs) == (generation.strongly_typed or not graph["half"])
        for words in runs:
            scripts[tmp_path / f"{name}.py"] = graph
            commands.append([*words, "--gen-script", str(tmp_path / f"{name}.py")])
        commands.append(inspect)
    done = run_polygraphy(exported, *commands)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| Model: ") == 4 or "layer_1/product" in done.stdout
    for script, graph in scripts.items():
        text = script.read_text()
        ast.parse(text)
        assert ("strongly_typed=True" in text) == (generation is OPTING)
        assert "OnnxrtRunner" in text
        assert "TrtRunner" in text
        for source, sizes in graph["profile"].items():
            assert f".add('{source}', min={sizes['minimum']}, opt={sizes['optimum']}, max={sizes['maximum']})" in text
        ranges = "{'mask': (0, 1), '': (-1, 1)}" if "mask" in graph["profile"] else "{'': (-1, 1)}"
        assert f"val_range={ranges}" in text or ("val_range=[(-1, 1)]" in text and "mask" not in graph["profile"])


def test_a_flag_that_polygraphy_does_not_know_is_noticed(exported: Path) -> None:
    done = run_polygraphy(exported, ["inspect", "model", "onnx/decoder.onnx", "--stronglyTyped"])
    assert done.returncode == 1
