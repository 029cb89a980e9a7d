"""What mkdocs is told beyond mkdocs.yml, so that one text is read on the forge and on the site.

README.md is the site's first page, and CONTRIBUTING.md and CHANGELOG.md are pages too; links that leave docs/ lead to
those pages or, where a file is no page, to the forge.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
FORGE = "https://github.com/mnif/mnif"

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the repository → pages of the site, as they are called within docs/."""

_LINK = re.compile(r"(\]\()(?!\w+:|#|/)([^)#\s]+)")

_ROLE = re.compile(r":(?:class|func|mod|data|meth|attr):<code>~?([\w.]+)</code>")
"""Cross-references in docstrings, as they come out of Markdown."""


def site_links(text: str, source: str) -> str:
    """Rewrites the links of a page so that they lead on from its place on the site.

    Args:
        text: Markdown.
        source: the page's file within the repository, such as "README.md" or "docs/edge.md".
    """
    page = PAGES.get(source, source.removeprefix("docs/"))

    def rewritten(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[2]))
        if not (target in PAGES or target.startswith("docs/")):
            kind = "tree" if (ROOT / target).is_dir() else "blob"
            return f"{match[1]}{FORGE}/{kind}/main/{target}"
        target = PAGES.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(target, posixpath.dirname(page) or ".")

    return _LINK.sub(rewritten, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=site_links(text, source)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Rewrites the links of the pages that lie in docs/; a page without others beside it needs no list of them."""
    if page.parent is None:
        page.meta["hide"] = ["navigation"]
    is_generated = page.file.src_uri in PAGES.values()
    return markdown if is_generated else site_links(markdown, f"docs/{page.file.src_uri}")


def on_page_content(html: str, **_: Any) -> str:
    """Makes links of the references in docstrings, where what they name has a place on the site."""
    return _ROLE.sub(r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)
