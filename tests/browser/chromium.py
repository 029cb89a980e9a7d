"""A page in a real browser, as tests ask about it."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent
NODE = shutil.which("node")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

needs_node = pytest.mark.skipif(NODE is None, reason="no Node.js on this machine")
needs_browser = pytest.mark.skipif(
    NODE is None or CHROMIUM is None or not (FOLDER / "node_modules/playwright-core").is_dir(),
    reason="needs Node.js, Chromium and `npm ci` in tests/browser",
)


def asked_of_page(address: str, script: str, expected_complaints: Sequence[str] = (), **options: Any) -> Any:
    """What ``script``, the body of a function of Playwright's `page`, returns; the page must not complain.

    Args:
        address: of the page.
        script: JavaScript.
        expected_complaints: words of those that the page must make.
        options: of the page, such as ``viewport`` and ``colorScheme``.
    """
    command = [NODE, FOLDER / "drive.mjs", address, CHROMIUM, json.dumps(options)]
    done = subprocess.run(map(str, command), input=script, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    complaints = answer["complaints"]
    assert len(complaints) == len(expected_complaints), complaints
    for words, complaint in zip(expected_complaints, complaints, strict=True):
        assert words in complaint
    return answer.get("found")
