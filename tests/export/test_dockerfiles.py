"""The Dockerfiles: what they say can be read, what they copy is in a bundle, and that much of one runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2] / "examples/docker"
FILES = sorted(HERE.glob("*.Dockerfile"))
INSTRUCTIONS = {"ARG", "FROM", "RUN", "WORKDIR", "COPY", "ENV", "VOLUME", "USER", "ENTRYPOINT", "CMD"}

files = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Every instruction with its words, comments left out and lines that go on put together."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    whole = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in whole)]


@files
def test_it_can_be_read_and_has_one_stage_as_a_user_of_its_own(path: Path) -> None:
    found = instructions(path)
    names = [name for name, _ in found]
    assert set(names) <= INSTRUCTIONS
    assert names[:2] == ["ARG", "FROM"]
    (user,) = [words for name, words in found if name == "USER"]
    assert names.index("USER") > max(index for index, name in enumerate(names) if name == "RUN")
    assert any("useradd --create-home" in words and user in words for name, words in found if name == "RUN")
    for name, words in found:
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", words], check=False).returncode == 0
        if name in ("VOLUME", "ENTRYPOINT", "CMD"):
            assert words.startswith("[")
    assert re.search("Nothing has built|No board has built", path.read_text())  # until one has


@files
def test_the_default_tag_is_one_of_the_table(path: Path) -> None:
    (_, argument), (_, image), *_ = instructions(path)
    name, tag = argument.split("=")
    rows = re.findall(rf"`{path.name}` \| `([\w./:-]+)`", (HERE / "README.md").read_text())
    assert image.replace(f"${{{name}}}", tag) in rows
    for row in rows:
        assert row.startswith(image.partition(":")[0])
        assert ":" not in row or path.name.startswith("desktop") or row.partition(":")[2] in path.read_text()


def test_every_jetpack_of_the_guide_has_an_image() -> None:
    guide = (HERE.parents[1] / "docs/edge.md").read_text()
    table = guide.split("| JetPack | boards |")[1].split("\n\n")[0]
    jetpacks = re.findall(r"^\| ([\d., ]+) \|", table, flags=re.MULTILINE)
    assert len(jetpacks) == 5
    for jetpack in jetpacks:
        assert f"| {jetpack} |" in (HERE / "README.md").read_text()


@files
def test_what_is_copied_runs(path: Path, exported: Path, tmp_path: Path) -> None:
    """The same COPY lines, the same command, without Docker: with ONNX Runtime, as there is no GPU."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, words in instructions(path):
        if name == "COPY":
            *sources, target = shlex.split(words)
            for source in sources:
                if (exported / source).is_dir():
                    assert target == source
                    shutil.copytree(exported / source, folder / target)
                else:
                    assert target == "./"
                    shutil.copyfile(exported / source, folder / source)
    command = dict(instructions(path))
    words = [*re.findall('"([^"]+)"', command["CMD"]), "--backends", "onnxruntime"]
    environment = {"PATH": os.environ["PATH"], "MNIF_STATE": str(tmp_path / "state"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout
