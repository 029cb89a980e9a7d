"""Files of published weights: looked for, downloaded once, and never used unless their hash is the standard one."""

import os
import shutil
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from mnif.utils.errors import UserError
from mnif.utils.files import cache_folder, sha256_of_file, written_atomically

_SECONDS = 30  # without an answer


@dataclass(frozen=True)
class PublishedWeights:
    """A file as its makers published it.

    Attributes:
        name: of the file.
        size: in bytes.
        sha256: of its content, hexadecimal.
        url: where it can be had.
        flag: of the command line that names a copy.
        variable: of the environment, likewise.
        instead: what works without it.
    """

    name: str
    size: int
    sha256: str
    url: str
    flag: str
    variable: str
    instead: str


INCEPTION = PublishedWeights(
    name="pt_inception-2015-12-05-6726825d.pth",
    size=95_628_359,
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    flag="--inception_weights",
    variable="MNIF_INCEPTION_WEIGHTS",
    instead="--extractor lite0 works offline; its distance is fd_lite0, not FID",
)


def found_weights(weights: PublishedWeights, given: Path | None = None) -> Path:
    """Finds the file: ``given``, else what the environment names, else the cached one, else it is downloaded.

    Raises:
        UserError: the file named does not exist or has another hash, or it cannot be downloaded.
    """
    named = given or (Path(named) if (named := os.environ.get(weights.variable)) else None)
    cached = cache_folder() / "weights" / weights.name
    path = named or cached
    if path.is_file():
        _check(path, weights)
        return path
    if named is not None:
        raise UserError(f"{path}: no such file; {weights.name} ({weights.size:,} bytes) is needed")
    return _downloaded(weights, cached)


def _downloaded(weights: PublishedWeights, path: Path) -> Path:
    try:
        with written_atomically(path) as temporary:
            with urllib.request.urlopen(weights.url, timeout=_SECONDS) as answer, temporary.open("wb") as file:
                shutil.copyfileobj(answer, file)
            _check(temporary, weights)
    except OSError as error:
        raise UserError(
            f"{weights.name} ({weights.size:,} bytes, sha256 {weights.sha256}) is not at {path} and cannot be "
            f"downloaded ({getattr(error, 'reason', None) or error}); put it there or name it with {weights.flag} or "
            f"{weights.variable}; {weights.url} has it; {weights.instead}"
        ) from None
    return path


def _check(path: Path, weights: PublishedWeights) -> None:
    found = sha256_of_file(path)
    if found != weights.sha256:
        raise UserError(
            f"{path}: sha256 {found}; {weights.name} has {weights.sha256}: with other weights the distance would not "
            f"be the published one; {weights.instead}"
        )
