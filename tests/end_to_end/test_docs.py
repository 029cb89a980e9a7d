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
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("mnif", "latent_prior", "export", "evals", "tests", "benchmarks", "examples", "scripts", "docs")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


@cache
def help_of(command: str) -> str:
    """What `mnif COMMAND --help` prints, by a capture of its own, as pytest has one for each test."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
        main([command, "--help"])
    return printed.getvalue()


@pages
def test_commands_exist_with_their_flags(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for shell in re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE) + re.findall(
        r"`(mnif [^`]*)`", text
    ):
        for name, rest in re.findall(r"(?:^|[\s;|])mnif +([a-z][a-z-]*)([^\n#;|]*)", shell):
            assert name in COMMANDS, f"{page.name}: no command mnif {name}"
            for flag in re.findall(r"--([a-z_]+)", rest):
                assert re.search(rf"--{flag}\b|--[a-z]*-?no-{flag}\b", help_of(name)), (
                    f"{page.name}: mnif {name} has no --{flag}"
                )


@pages
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link} is not there"
    for path in re.findall(rf"`((?:{'|'.join(PACKAGES)})/[\w./-]+)`", text):
        assert Path(path).stem == "x" or (ROOT / path).exists(), f"{page.name}: {path} is not there"


@pages
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


@pytest.mark.parametrize("name", ["README.md", "docs/sampling.md"])
def test_python_runs_as_it_stands(name: str, demo: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        known: dict[str, object] = {}
        exec(compile(block, name, "exec"), known)
        assert "pipeline" in known


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
    names = {re.split(r"[\[<>=]", line)[0] for lines in needed for line in lines} - {"mnif-diffusion"}
    told = {
        name
        for line in (ROOT / "docs" / "dependencies.md").read_text().split("## Written by hand")[0].splitlines()
        if line.startswith("|")
        for name in re.findall("`([^`]+)`", line.rsplit("|", 2)[0])
    }
    assert names <= told
    assert told <= names | set(project["optional-dependencies"])
