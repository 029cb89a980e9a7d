"""What changed between two bundles, as bytes: a delta for the boards that have the older one (`mnif export --since`).

A matrix that grew by rows, or one that is now in another file, is the same bytes at another place. They are found by
anchors (Manber, Finding similar files in a large file system, 1994): places chosen by a hash of the bytes that follow,
so that the same content has the same anchors wherever it lies. Every match of an anchor is then made as long as it is.
"""

import heapq
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from export.device.bundle import MANIFEST, BundleError, BundleFolder, manifest_digest
from export.device.delta import DATA, DELTA, DELTA_SCHEMA, Delta, describe_bundle, name_bundle
from mnif.utils.errors import UserError
from mnif.utils.files import sha256_of_file, written_atomically


def open_base(path: Path) -> BundleFolder:
    """Opens the bundle that a delta is to apply to, each of its files as it was exported.

    Raises:
        UserError: it is no bundle, or not whole.
    """
    try:
        folder = BundleFolder(path)
        for name in folder.manifest["files"]:
            folder.read(name)
    except BundleError as error:
        raise UserError(f"--since: {error}") from None
    return folder


class _Copy(NamedTuple):
    """A part of a new file, ``length`` bytes from ``at`` on, that ``source`` of the old ones has at ``offset``."""

    at: int
    source: int
    offset: int
    length: int


_SHORTEST = 64  # bytes of a copy; its step takes some twenty

_MOST_STEPS = 1 << 16  # of a delta, whose JSON boards read whole


def _longest(copies: dict[str, list[_Copy]]) -> dict[str, list[_Copy]]:
    """Leaves out the shortest copies where there are too many."""
    lengths = heapq.nlargest(_MOST_STEPS, (copy.length for each in copies.values() for copy in each))
    least = lengths[-1] + 1 if len(lengths) == _MOST_STEPS else 0
    return {name: [copy for copy in each if copy.length >= least] for name, each in copies.items()}


_WINDOW = 32  # bytes that decide whether an anchor is there

_ONE_IN = 5  # bits: one place of 32 is an anchor

_FACTORS = np.array(  # odd, with no pattern: the golden ratio's and those of MurmurHash3 and xxHash
    [0x9E3779B97F4A7C15, 0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53, 0xC2B2AE3D27D4EB4F], dtype=np.uint64
)

_AT_ONCE = 1 << 16  # places, so that what is worked out stays in the processor's cache


def _anchors(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the anchors of bytes: their hashes and places, [n] uint64 and int64.

    Where bytes repeat with a period of 8 or a part of it (zeros, equal numbers) there are none: zlib packs them.
    """
    hashes, places = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for begin in range(0, len(content) - _WINDOW + 1, _AT_ONCE):
        count = min(_AT_ONCE, len(content) - _WINDOW + 1 - begin)
        words = np.ndarray(count + 24, "<u8", content[begin : begin + count + 31], strides=(1,)).copy()
        parts = [words[first : first + count] for first in range(0, _WINDOW, 8)]
        hashed = sum(part * factor for part, factor in zip(parts, _FACTORS, strict=True))
        chosen = np.flatnonzero(hashed >> np.uint64(64 - _ONE_IN) == 0)
        chosen = chosen[np.any([parts[0][chosen] != part[chosen] for part in parts[1:]], axis=0)]
        hashes.append(hashed[chosen])
        places.append(chosen + begin)
    return np.concatenate(hashes), np.concatenate(places)


@dataclass(frozen=True)
class _Pool:
    """The files of a bundle one after the other, and their anchors.

    Attributes:
        names: of the files.
        starts: [files + 1], where each begins, and the end.
        content: all bytes.
        hashes: of the anchors, in rising order, each once.
        places: of their first occurrence.
    """

    names: list[str]
    starts: np.ndarray
    content: np.ndarray
    hashes: np.ndarray
    places: np.ndarray

    @classmethod
    def of(cls, bundle: BundleFolder) -> "_Pool":
        """Reads a bundle."""
        names = sorted([*bundle.manifest["files"], MANIFEST])
        contents = [_bytes_of(bundle.path / name) for name in names]
        starts = np.cumsum([0, *map(len, contents)])
        found = [_anchors(content) for content in contents]
        hashes, first = np.unique(np.concatenate([each for each, _ in found]), return_index=True)
        places = np.concatenate([each + start for (_, each), start in zip(found, starts, strict=False)])
        return cls(names, starts, np.concatenate(contents), hashes, places[first])

    def find_copies(self, content: np.ndarray) -> Iterator[_Copy]:
        """Yields what of a file's bytes is in the pool, in order and without overlap."""
        hashes, places = _anchors(content)
        order = np.argsort(hashes)  # looked up in rising order, which is the quickest
        row = np.empty(len(hashes), np.int64)
        row[order] = np.minimum(np.searchsorted(self.hashes, hashes[order]), max(len(self.hashes) - 1, 0))
        known = self.hashes[row] == hashes if len(self.hashes) else np.zeros(len(hashes), bool)
        places, origins = places[known], self.places[row[known]]
        done = index = 0
        while index < len(places):
            place, origin = int(places[index]), int(origins[index])
            source = int(np.searchsorted(self.starts, origin, "right")) - 1
            first, end = int(self.starts[source]), int(self.starts[source + 1])
            before = _count_equal(content[done:place][::-1], self.content[first:origin][::-1])
            length = before + _count_equal(content[place:], self.content[origin:end])
            if length >= _SHORTEST:
                yield _Copy(place - before, source, origin - before - first, length)
                done = place - before + length
            index = max(index + 1, int(np.searchsorted(places, done)))


def _count_equal(one: np.ndarray, other: np.ndarray) -> int:
    """Counts the bytes with which both begin."""
    count, step, most = 0, 256, min(len(one), len(other))
    while count < most:
        end = min(count + step, most)
        differing = np.flatnonzero(one[count:end] != other[count:end])
        if len(differing):
            return count + int(differing[0])
        count, step = end, min(4 * step, 1 << 20)
    return most


def write_delta(base: BundleFolder, new: Path, output: Path) -> str:
    """Writes what makes one bundle of another, and makes sure that it does.

    Args:
        base: the older bundle (:func:`open_base`).
        new: the newer bundle's folder.
        output: gets ``delta.json`` and ``delta.bin``.

    Returns:
        A line that says how large it is.
    """
    after = BundleFolder(new)
    known, files = base.manifest["files"], after.manifest["files"]
    changed = [name for name in files if known.get(name) != files[name]]
    if after.manifest["digest"] != base.manifest["digest"]:
        changed.append(MANIFEST)
    pool = _Pool.of(base)
    copies = _longest({name: list(pool.find_copies(_bytes_of(new / name))) for name in sorted(changed)})
    used = sorted({copy.source for each in copies.values() for copy in each})
    (output / DELTA).unlink(missing_ok=True)  # so that nothing is taken for a delta until both files are there
    packer = zlib.compressobj(9)
    with written_atomically(output / DATA) as temporary, temporary.open("wb") as file:
        for name, found in copies.items():
            content = _bytes_of(new / name)
            for begin, end in _between(found, len(content)):
                file.write(packer.compress(content[begin:end].data))
        file.write(packer.flush())
    description = {
        "schema": DELTA_SCHEMA,
        "base": describe_bundle(base.manifest),
        "bundle": describe_bundle(after.manifest),
        "sources": [pool.names[source] for source in used],
        "files": {name: _file_entry(new / name, found, used) for name, found in copies.items()},
        "data": {"sha256": sha256_of_file(output / DATA), "bytes": (output / DATA).stat().st_size},
    }
    with written_atomically(output / DELTA) as temporary:
        temporary.write_text(json.dumps(description | {"digest": manifest_digest(description)}, sort_keys=True) + "\n")
    for _, pieces in Delta(output).rebuilt(base):
        for _ in pieces:
            pass
    whole = sum(file["bytes"] for file in files.values())
    size = sum((output / name).stat().st_size for name in (DELTA, DATA))
    return (
        f"{output}: {size / 1e6:.3f} MB for a bundle of {whole / 1e6:.1f} MB, {len(changed)} of {len(files) + 1} "
        f"files changed; it applies to {name_bundle(describe_bundle(base.manifest))}"
    )


def _file_entry(path: Path, copies: list[_Copy], used: list[int]) -> dict[str, Any]:
    """Says what a file is put together of."""
    steps, size = [], path.stat().st_size
    gaps = list(_between(copies, size))
    for (begin, end), copy in zip(gaps, [*copies, None], strict=True):
        if end > begin:
            steps.append([end - begin])
        if copy is not None:
            steps.append([used.index(copy.source), copy.offset, copy.length])
    return {"sha256": sha256_of_file(path), "bytes": size, "steps": steps}


def _between(copies: list[_Copy], size: int) -> Iterator[tuple[int, int]]:
    """Yields the part of a file before each copy, and the part after the last."""
    at = 0
    for copy in copies:
        yield at, copy.at
        at = copy.at + copy.length
    yield at, size


def _bytes_of(path: Path) -> np.ndarray:
    return np.frombuffer(path.read_bytes(), np.uint8)
