"""The guides for devices name commands, flags and tests that exist."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from export.bundle import COMMANDS
from mnif.cli import COMMANDS as MNIF_COMMANDS
from mnif.cli import main

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "docs" / name for name in ("edge.md", "edge_checklist.md", "serving.md", "browser.md", "overview.md")]
GUIDES += [ROOT / "docs/tutorials/jetson.md", *sorted((ROOT / "examples").glob("*/README.md"))]


def commands_in(text: str, pattern: str) -> dict[str, set[str]]:
    """Name of each command that matches → all flags that stand on its lines."""
    found: dict[str, set[str]] = {}
    for match in re.finditer(rf"{pattern}([^\n`;#|]*)", text.replace("\\\n", " ")):
        found.setdefault(match[1], set()).update(re.findall(r"--[a-z_]+", match[2]))
    return found


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
@pytest.mark.parametrize(
    ("pattern", "known"),
    [(r"device/(\w+)\.py", COMMANDS), (r"mnif (export|build|verify|bench|inspect)\b", MNIF_COMMANDS)],
)
def test_commands_of_the_guides_have_the_flags_they_are_given(
    guide: Path, pattern: str, known: object, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, flags in commands_in(guide.read_text(), pattern).items():
        assert name in known
        if name in ("sample", "update"):  # on a device; `mnif sample` is another
            command = import_module(f"export.device.{name}").main
        else:
            command = lambda arguments, name=name: main([name, *arguments])  # noqa: E731
        with pytest.raises(SystemExit):
            command(["--help"])
        shown = capsys.readouterr().out
        for flag in flags:
            assert re.search(rf"{flag}\b", shown), f"{guide.name}: {name} has no {flag}"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_links_of_the_guides_lead_somewhere(guide: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", guide.read_text()):
        assert (guide.parent / link).exists(), f"{guide}: {link} is not there"


def test_checklist_names_every_gpu_test() -> None:
    checklist = (ROOT / "docs/edge_checklist.md").read_text()
    names = [name for path in sorted((ROOT / "tests").rglob("test_*.py")) for name in gpu_tests(path)]
    assert names
    for name in names:
        assert f"`{name}`" in checklist, f"docs/edge_checklist.md does not name {name}"
    for name in re.findall(r"`(test_\w+\.py::test_\w+)`", checklist):
        assert name in names, f"docs/edge_checklist.md names {name}, which is no GPU test"


def gpu_tests(path: Path) -> list[str]:
    """A file's tests marked ``gpu``, on themselves or all together, as ``file::test``."""
    module = ast.parse(path.read_text())
    marked = any(
        isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "pytestmark"
        and "mark.gpu" in ast.unparse(node)
        for node in module.body
    )
    return [
        f"{path.name}::{node.name}"
        for node in module.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if marked or any("mark.gpu" in ast.unparse(each) for each in node.decorator_list)
    ]
