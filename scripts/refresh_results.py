"""Puts an evaluation's figures into the pages that show them: `python scripts/refresh_results.py RUN/eval`.

The headlines go into README.md and the whole table into docs/results.md, each between its markers.
"""

import argparse
import sys
from pathlib import Path

from evals.presentation import evaluation_markdown, headlines_markdown, read_evaluation
from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically

BEGIN, END = "<!-- results: written by scripts/refresh_results.py -->", "<!-- end of results -->"

PAGES = {"README.md": headlines_markdown, "docs/results.md": evaluation_markdown}
"""Page → what writes its part, from the metrics of an evaluation and a name for its column."""


def refresh(root: Path, evaluation: Path) -> None:
    """Replaces what stands between the markers of the pages.

    Args:
        root: of the repository.
        evaluation: an output of `mnif eval`.

    Raises:
        UserError: the evaluation is missing or damaged, or the markers of a page are missing; no page is changed.
    """
    metrics, texts = read_evaluation(evaluation / "metrics.json"), {}
    for name, written in PAGES.items():
        page = root / name
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not (begin and end):
            raise UserError(f"{page}: needs the lines {BEGIN} and {END}")
        texts[page] = f"{before}{BEGIN}\n\n{written(metrics, 'this model')}\n{END}{after}"
    for page, text in texts.items():
        with written_atomically(page) as temporary:
            temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evaluation", type=Path, help="an output of `mnif eval`")
    parser.add_argument("--root", type=Path, default=Path(), help="of the repository")
    options = parser.parse_args()
    try:
        refresh(options.root, options.evaluation)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
