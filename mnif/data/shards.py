"""Tar files as WebDataset has them: the files of an instance share their name up to its first dot, which is its id.

Shards are looked through header by header, and of large ones the cache folder keeps what was found; what is wanted of
them is read where it stands. Nothing is extracted.
"""

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import msgspec

from mnif.data.arrays import file_stamps
from mnif.data.source import is_hidden, readable
from mnif.utils import __version__
from mnif.utils.errors import UserError
from mnif.utils.files import cache_folder, written_atomically
from mnif.utils.process import progress_bar, tell

MOST_BYTES = 1 << 29
"""Of one picture in a shard, which is read as a whole: some more than the limit of pixels takes unpacked."""

_HEADER_BYTES = 1 << 20  # of names and notes that go before a member, and of zeros at the end
_SHOWN = 5  # kinds of files that are left out
_LARGE = 256  # members, from which on looking through a shard takes longer than opening a file of them


@dataclass(frozen=True, slots=True)
class ShardMember:
    """A file in a shard.

    Attributes:
        shard: the tar file.
        name: in it.
        offset: of its first byte.
        size: in bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.name}"

    def read_bytes(self) -> bytes:
        """Reads all of it.

        Raises:
            UserError: the shard has become shorter since it was looked through.
        """
        with self.shard.open("rb", buffering=0) as file:
            file.seek(self.offset)
            content = file.read(self.size)
        if len(content) != self.size:
            raise UserError(f"{self}: ends too early; the shard was changed meanwhile, run the command again")
        return content


def shard_members(source: str, shards: Iterable[Path], suffixes: tuple[str, ...]) -> dict[str, ShardMember]:
    """Finds the members ``KEY.SUFFIX`` of shards, in their order, by key: the path up to the first dot of the name.

    One line tells what else the shards hold. ``KEY.mask.png`` has the suffix ``.mask.png``, so it is something else.

    Args:
        source: as the user named it.
        shards: tar files.
        suffixes: in small letters.

    Raises:
        UserError: a shard is damaged, cut off or compressed, holds links or names that lead out of it, or a key has
            two such members.
    """
    found: dict[str, ShardMember] = {}
    left_out = Counter[str]()
    for shard in progress_bar(list(shards), desc=f"looking through {source}", unit="shard", leave=False):
        for member in _members(shard):
            *folders, name = _parts(member.name)
            stem, dot, ending = name.partition(".")
            suffix, key = (dot + ending).lower(), readable("/".join([*folders, stem]))
            if any(map(is_hidden, (*folders, name))):
                left_out["hidden"] += 1
            elif suffix not in suffixes:
                left_out[suffix or "without suffix"] += 1
            elif key in found:
                raise UserError(
                    f"{member}: the key {key!r} is taken by {found[key]}; give each picture one of its own"
                )
            elif member.size > MOST_BYTES:
                raise UserError(f"{member}: states {member.size:,} bytes; a picture has at most {MOST_BYTES:,}")
            else:
                found[key] = member
    counted = ", ".join(f"{count} {why}" for why, count in left_out.most_common(_SHOWN))
    if not found:
        names = ", ".join(f"KEY{suffix}" for suffix in suffixes[:_SHOWN])
        raise UserError(f"{source}: no members {names} … in the shards; found {counted or 'none'}")
    if left_out:
        tell(f"{source}: {len(found)} members of shards are read; left out are {counted}")
    return found


class _Headers(FileIO):
    """A tar file of which no more than headers is read at once, whatever sizes they state."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _members(shard: Path) -> Iterator[ShardMember]:
    """Yields the files of a shard in order, as an earlier command has noted them if the shard is what it was then.

    A note that is damaged is made anew, and one that cannot be written is done without.
    """
    key = _key(shard)
    note = cache_folder() / "data" / f"{key}.members"
    try:
        noted = msgspec.msgpack.decode(note.read_bytes(), type=list[tuple[str, int, int]])
    except (OSError, msgspec.DecodeError):
        noted = []
        for member in _looked_through(shard):
            noted.append((member.name, member.offset, member.size))
            yield member
        if len(noted) >= _LARGE and _key(shard) == key:  # else it was changed meanwhile
            with suppress(OSError, UnicodeError), written_atomically(note, flush=False) as temporary:
                temporary.write_bytes(msgspec.msgpack.encode(noted))
    else:
        yield from (ShardMember(shard, *each) for each in noted)


def _key(shard: Path) -> str:
    """Names the note of a shard's members, by the shard's path, size and time of change."""
    stamps = file_stamps([shard] if shard.exists() else [])
    return hashlib.sha256(json.dumps([__version__, "members", *stamps]).encode()).hexdigest()[:32]


def _looked_through(shard: Path) -> Iterator[ShardMember]:
    """Yields the files of a shard in order, and looks at what its headers state before anything is done with it."""
    try:
        with _Headers(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else all of a large shard stay in memory
                if fault := _fault(member, archive.offset):
                    raise UserError(f"{shard}: {member.name!r} {fault}; make the shard anew")
                if not member.isdir():
                    yield ShardMember(shard, member.name, member.offset_data, member.size)
            # A damaged header and the end look alike to tarfile.
            file.seek(archive.offset)
            after = file.read(_HEADER_BYTES)
            if not after or after.strip(b"\0"):
                fault = "damaged or joined to another" if after else "cut off, its closing zeros are missing"
                raise UserError(f"{shard}: is {fault}; make or copy it anew")
    except UserError:
        raise
    except Exception as error:  # what tarfile raises on damaged headers is no closed list
        reason = str(error) or type(error).__name__
        raise UserError(f"{shard}: no readable tar file ({reason}); make it anew, without compression") from None


def _fault(member: tarfile.TarInfo, after: int) -> str | None:
    """Says what is wrong with a member that is followed by the next one at ``after``; None if nothing is."""
    if member.size < 0 or after <= member.offset:
        return "states an impossible size"
    if member.name.startswith("/") or ".." in _parts(member.name):
        return "has a name that leads out of the shard"
    if member.issparse() or not (member.isreg() or member.isdir()):
        return "is a link or device or has holes, where plain files are read"
    return None


def _parts(name: str) -> list[str]:
    """Cuts the name of a member at its slashes, ``./a//b`` like ``a/b``; pathlib takes long for a million."""
    return [part for part in name.split("/") if part not in ("", ".")] or [""]
