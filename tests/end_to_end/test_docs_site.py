"""The site of the documentation: built strictly, whole, and looking at nothing outside of itself."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
docs_site = pytest.importorskip("scripts.docs_site", reason="mkdocs (extra `docs`) is not installed")

pytestmark = pytest.mark.slow


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(config), "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT / "mkdocs.yml", folder)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


class Page(HTMLParser):
    """What a page links to, what it loads, and where it can be linked to.

    Attributes:
        links: of ``a``.
        loaded: of scripts, styles, icons and pictures.
        anchors: ids and names.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in ("script", "img", "source", "iframe") and "src" in values:
            self.loaded.append(values["src"])
        if tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values["href"])


def test_every_link_of_every_page_leads_to_a_place(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 25
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.name}: {link}"
            if parts.fragment and target.suffix == ".html":
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert not [link for link in Page(path).loaded if urlsplit(link).netloc], path.name
    for path in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", path.read_text(encoding="utf-8")), path.name


def test_the_site_has_search_dark_mode_and_docstrings(site: Path) -> None:
    start = (site / "index.html").read_text(encoding="utf-8")
    assert 'data-md-color-scheme="slate"' in start
    assert 'data-md-component="search"' in start
    assert "psnr_heldout" in (site / "search/search_index.json").read_text(encoding="utf-8")
    reference = Page(site / "api/mnif.html")
    assert "mnif.models.mnif_model.MNIFModel.coefficients" in reference.anchors
    assert ":class:" not in (site / "api/evals.html").read_text(encoding="utf-8")


def test_a_dead_link_ends_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# One\n\n[a place](#nowhere)\n")
    rules = re.findall(r"^strict: true$|^validation:\n(?:  .*\n)+", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(rules) == 2
    (tmp_path / "mkdocs.yml").write_text("site_name: x\ntheme: mkdocs\n" + "\n".join(rules))
    built = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert built.returncode != 0
    assert "#nowhere" in built.stderr


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("README.md", "docs/data.md#voxels", "data.md#voxels"),
        ("README.md", "CONTRIBUTING.md", "contributing.md"),
        ("README.md", "docs/images/samples.png", "images/samples.png"),
        ("docs/tutorials/fid.md", "../evaluation.md", "../evaluation.md"),
        ("docs/tutorials/fid.md", "../../README.md", "../index.md"),
        ("docs/data.md", "../mnif/data", "https://github.com/mnif/mnif/tree/main/mnif/data"),
        ("docs/data.md", "../mnif/cli.py", "https://github.com/mnif/mnif/blob/main/mnif/cli.py"),
        ("docs/data.md", "#pictures", "#pictures"),
        ("docs/data.md", "https://example.org/a", "https://example.org/a"),
    ],
)
def test_links_of_the_forge_lead_on_from_the_site(source: str, link: str, expected: str) -> None:
    assert docs_site.site_links(f"see [this]({link}).", source) == f"see [this]({expected})."
