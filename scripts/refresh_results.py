"""Puts an evaluation's table into the README, between its markers: `python scripts/refresh_results.py RUN/eval`."""

import argparse
import sys
from pathlib import Path

from evals.presentation import evaluation_markdown
from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically
from mnif.utils.json_files import read_json

BEGIN, END = "<!-- results: written by scripts/refresh_results.py -->", "<!-- end of results -->"


def refresh(readme: Path, evaluation: Path) -> None:
    """Replaces what stands between the markers of ``readme``.

    Raises:
        UserError: the evaluation is missing, or the markers are.
    """
    text = readme.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(f"{readme}: needs the lines {BEGIN} and {END}")
    table = evaluation_markdown(read_json(evaluation / "metrics.json"), "this model")
    with written_atomically(readme) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("evaluation", type=Path, help="an output of `mnif eval`")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args()
    try:
        refresh(options.readme, options.evaluation)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
