"""Weights of feature extractors that no package can install: found or downloaded, and always the published ones."""

import os
from dataclasses import dataclass
from pathlib import Path

from mnif.utils.errors import UserError
from mnif.utils.files import cache_folder
from mnif.utils.published import PublishedFile, downloaded


@dataclass(frozen=True)
class PublishedWeights(PublishedFile):
    """Weights as their makers published them.

    Attributes:
        variable: of the environment, which names a copy.
        flag: of the command line, likewise; None if there is none.
        instead: what else can be done without them.
    """

    variable: str
    flag: str | None
    instead: str


def found_weights(weights: PublishedWeights, given: Path | None = None) -> Path:
    """Finds the file: ``given``, else what the environment names, else the cached one, else it is downloaded.

    Raises:
        UserError: the file named does not exist or has another hash, or it cannot be downloaded.
    """
    named = given or (Path(named) if (named := os.environ.get(weights.variable)) else None)
    cached = cache_folder() / "weights" / weights.name
    path = named or cached
    consequence = f"with other weights the distance would not be the published one; {weights.instead}"
    if path.is_file():
        weights.check(path, consequence)
        return path
    if named is not None:
        raise UserError(f"{path}: no such file; {weights.name} ({weights.size:,} bytes) is needed")
    names = " or ".join(filter(None, (weights.flag, weights.variable)))
    instead = f"put it there or name it with {names}; {weights.url} has it; {weights.instead}"
    return downloaded(weights, cached.parent, consequence, instead)
