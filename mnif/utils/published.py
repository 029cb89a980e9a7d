"""Files that others publish: downloaded once into a folder of the cache, and never used with another content."""

import hashlib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from mnif.utils.errors import UserError
from mnif.utils.files import written_atomically
from mnif.utils.process import progress_bar

_SECONDS = 30  # without an answer
_AT_ONCE = 1 << 18  # bytes


@dataclass(frozen=True)
class PublishedFile:
    """A file as its makers published it.

    Attributes:
        name: of the file.
        size: in bytes.
        digest: SHA-256 or SHA-512 of its content, hexadecimal; the length tells which.
        url: where it can be had.
    """

    name: str
    size: int
    digest: str
    url: str

    @property
    def algorithm(self) -> str:
        """Names the hash function of the digest, as :mod:`hashlib` does."""
        return "sha512" if len(self.digest) == 128 else "sha256"

    def check(self, path: Path, consequence: str, where: str | None = None) -> None:
        """Makes sure that a file has the published content.

        Args:
            path: the file.
            consequence: why another content matters, or what to do, for the message.
            where: the file's name in the message; default: its path.

        Raises:
            UserError: it has another content.
        """
        with path.open("rb") as file:
            found = hashlib.file_digest(file, self.algorithm).hexdigest()
        if found != self.digest:
            raise UserError(f"{where or path}: {self.algorithm} {found}; {self.name} has {self.digest}: {consequence}")


def downloaded(file: PublishedFile, folder: Path, consequence: str, instead: str) -> Path:
    """Downloads a file into a folder, whole or not at all.

    Args:
        file: what to download.
        folder: where to; its file of the same name, if there is one, is replaced.
        consequence: of another content, for the message.
        instead: what else can be done where it cannot be downloaded, for the message.

    Raises:
        UserError: it cannot be had, or what comes is something else.
        OSError: the disk is full, or the folder cannot be written.
    """
    path = folder / file.name
    with written_atomically(path) as temporary:
        with temporary.open("wb") as target:
            for block in _received(file, path, instead):
                target.write(block)
        file.check(temporary, consequence, file.url)
    return path


def _received(file: PublishedFile, path: Path, instead: str) -> Iterator[bytes]:
    """Yields what comes from the address; no more than one byte over the size, which makes it another file."""
    left = file.size + 1
    try:
        with (
            urllib.request.urlopen(file.url, timeout=_SECONDS) as answer,
            progress_bar(total=file.size, desc=file.name, unit="B", unit_scale=True, leave=False) as bar,
        ):
            while left > 0 and (block := answer.read(min(left, _AT_ONCE))):
                left -= len(block)
                bar.update(len(block))
                yield block
    except (OSError, HTTPException, ValueError) as error:  # of the network: a full disk is the caller's
        raise UserError(
            f"{file.name} ({file.size:,} bytes, {file.algorithm} {file.digest}) is not at {path} and cannot be "
            f"downloaded ({getattr(error, 'reason', None) or error}); {instead}"
        ) from None
