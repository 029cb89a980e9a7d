"""The README and the docs: their Python runs, their commands exist with their flags, their links and paths lead on."""

import contextlib
import io
import re
import textwrap
import tomllib
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch

from latent_prior.pipeline import MNIFPipeline
from mnif.cli import COMMANDS, main
from mnif.latents.table import LatentTable

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = sorted((ROOT / "examples/paper").glob("*.sh"))
PACKAGES = ("mnif", "latent_prior", "export", "evals", "tests", "benchmarks", "examples", "scripts", "docs")
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""What speaks of the project as it is."""

pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@cache
def help_of(command: str) -> str:
    """What `mnif COMMAND --help` prints, by a capture of its own, as pytest has one for each test."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    return printed.getvalue()


def shell_of(page: Path) -> list[str]:
    """All of a script, or a page's blocks of shell and its commands within sentences."""
    text = page.read_text().replace("\\\n", " ")
    if page.suffix == ".sh":
        return [text]
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return blocks + re.findall(r"`(mnif [^`]*)`", text)


@pytest.mark.parametrize("page", NOW + SCRIPTS, ids=lambda path: path.name)
def test_commands_exist_with_their_flags(page: Path) -> None:
    for shell in shell_of(page):
        for name, rest in re.findall(r"(?:^|[\s;|])mnif +([a-z][a-z-]*)([^\n#;|]*)", shell):
            assert name in COMMANDS, f"{page.name}: no command mnif {name}"
            for flag in re.findall(r"--([a-z_]+)", rest):
                assert re.search(rf"--{flag}\b|--[a-z]*-?no-{flag}\b", help_of(name)), (
                    f"{page.name}: mnif {name} has no --{flag}"
                )


@cache
def anchors_of(page: Path) -> set[str]:
    """The anchors that the forge gives a page's headings; the site is told to give the same."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.add(anchor if anchor not in found else f"{anchor}-1")
    return found


@pages
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\((?!https?:)([^)\s]+)", text)
    for link in links + re.findall(r"(?:src|href)=\"(?!https?:)([^\"]+)", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link} is not there"
        if anchor:
            assert anchor in anchors_of(target), f"{page.name}: {link} leads to no heading"
    for path in re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w./-]+)`", text):
        is_there = page.name == "CHANGELOG.md" or (ROOT / path).exists()  # what has changed may be gone
        assert Path(path).stem == "x" or is_there, f"{page.name}: {path} is not there"


@pytest.mark.parametrize("page", NOW, ids=lambda path: path.name)
def test_names_of_modules_lead_somewhere(page: Path) -> None:
    for name in re.findall(r"`((?:mnif|latent_prior|export|evals)\.[\w.]+)", page.read_text()):
        module, _, rest = name.rpartition(".")
        with contextlib.suppress(ModuleNotFoundError):
            module, rest = import_module(name).__name__, ""
        assert not rest or hasattr(import_module(module), rest), f"{page.name}: there is no {name}"


@pytest.fixture
def demo(pipeline: MNIFPipeline, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which ``runs/demo`` is a finished run, small enough for a test."""
    run = tmp_path / "runs/demo"
    pipeline.save_pretrained(run / "model")
    fingerprint = pipeline.decoder.fingerprint()
    table = LatentTable(
        torch.randn(6, 12), list("abcdef"), torch.tensor([False] * 4 + [True] * 2), fingerprint, "letters"
    )
    table.save(run / "latents.safetensors")
    (run / "bundle").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(MNIFPipeline, "push_to_hub", lambda self, repo_id, **options: repo_id)
    return tmp_path


@pytest.mark.parametrize("name", ["README.md", "docs/overview.md", "docs/sampling.md"])
def test_python_runs_as_it_stands(name: str, demo: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        known: dict[str, object] = {}
        exec(compile(block, name, "exec"), known)
        assert "pipeline" in known


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own packages
def test_the_notebook_runs_from_end_to_end(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples/walk_between_samples.ipynb", as_version=4)
    assert len(notebook.cells) == 10
    assert not any(cell.get("outputs") for cell in notebook.cells), "the notebook is kept without outputs"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(demo / "ipython"))
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(demo)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 4, outputs


def test_python_of_a_signal_is_that_of_the_example() -> None:
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/new_signal.md").read_text(), flags=re.DOTALL | re.MULTILINE
    )
    example = (ROOT / "examples/audio_signal.py").read_text()
    for line in textwrap.dedent(block).splitlines():
        words = line.split("#")[0].split("(self)")[0].strip()
        assert words in example, f"docs/new_signal.md: {line!r} is not in the example"


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[<>=,]", line)[0] for lines in needed for line in lines} - {"mnif-diffusion"}
    told = {
        name
        for line in (ROOT / "docs" / "dependencies.md").read_text().split("## Written by hand")[0].splitlines()
        if line.startswith("|")
        for name in re.findall("`([^`]+)`", line.rsplit("|", 2)[0])
    }
    assert names <= told
    assert told <= names | set(project["optional-dependencies"])
