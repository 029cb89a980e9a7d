"""Tar shards of pictures: what is read of them, in which order, and what is refused."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals.image_sets import sample_images
from mnif.cli import main
from mnif.data import shards as shards_module
from mnif.data.images import image_size, load_images
from mnif.data.shards import shard_members
from mnif.signals.registry import detect_signal
from mnif.utils.errors import UserError

MemberChange = Callable[[tarfile.TarInfo], None]


def noise(seed: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def picture(seed: int, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(seed)).save(buffer, format=format)
    return buffer.getvalue()


def write_shard(path: Path, members: dict[str, bytes], change: MemberChange = lambda member: None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            change(member)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines told of what is left out."""
    lines: list[str] = []
    monkeypatch.setattr(shards_module, "tell", lines.append)
    return lines


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards with other members beside the pictures, the second written first."""
    folder = tmp_path / "set"
    write_shard(folder / "b.tar", {"2.webp": picture(2, "WEBP"), "dir/0.JPG": picture(3, "JPEG")})
    members = {"./9.png": picture(0), "9.json": b"{}", "9.mask.png": picture(7), "._9.png": b"", "1.png": picture(1)}
    write_shard(folder / "a.tar", members)
    return folder


def test_shards_hold_what_a_folder_of_the_same_files_does(shards: Path, tmp_path: Path, told: list[str]) -> None:
    files = {"0.png": picture(0), "1.png": picture(1), "2.webp": picture(2, "WEBP"), "3.jpg": picture(3, "JPEG")}
    (tmp_path / "files").mkdir()
    for name, content in files.items():
        (tmp_path / "files" / name).write_bytes(content)
    assert detect_signal(str(shards)) == detect_signal(str(shards / "a.tar")) == "image"
    data = load_images(str(shards), 8)
    assert data.ids == data.groups == ["9", "1", "2", "dir/0"]
    np.testing.assert_array_equal(data.images, load_images(str(tmp_path / "files"), 8).images)
    (line,) = told
    assert line == f"{shards}: 4 members of shards are read; left out are 1 .json, 1 .mask.png, 1 hidden"
    assert load_images(str(shards / "b.tar"), 8).ids == load_images(f"{shards}/b*.tar", 8).ids == ["2", "dir/0"]
    assert sorted(path.name for path in shards.iterdir()) == ["a.tar", "b.tar"]  # nothing is extracted


def test_shards_go_to_the_cache_once(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = load_images(str(shards), 8)
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MNIF_MEMORY_LIMIT_MB", "0")
    mapped = load_images(str(shards), 8)
    assert isinstance(mapped.images, np.memmap)
    assert mapped.fingerprint() == in_memory.fingerprint()
    (file,) = (tmp_path / "cache/data").iterdir()
    written = file.stat().st_mtime_ns
    assert load_images(str(shards), 8).fingerprint() == mapped.fingerprint()
    assert file.stat().st_mtime_ns == written
    write_shard(shards / "a.tar", {"9.png": picture(5), "1.png": picture(6)})
    assert load_images(str(shards), 8).fingerprint() != mapped.fingerprint()


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A shard of so many members that they are noted, in a cache of its own."""
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    return write_shard(tmp_path / "a.tar", {f"{number}.png": b"" for number in range(shards_module._LARGE)})


def members_of(shard: Path) -> list[tuple[str, int, int]]:
    return [(each.name, each.offset, each.size) for each in shard_members("a", [shard], (".png",)).values()]


def test_a_large_shard_is_looked_through_once(large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = members_of(large)
    assert len(first) == shards_module._LARGE
    (note,) = (tmp_path / "cache/data").iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(tarfile, "open", None)
        assert members_of(large) == first
    kept = note.read_bytes()
    for damage in (b"", b"\x93", kept[:-3], b"\x91\x93\xa1a\xa1b\x01"):
        note.write_bytes(damage)
        assert members_of(large) == first
        assert note.read_bytes() == kept


def test_a_shard_that_has_changed_is_looked_through_again(large: Path) -> None:
    members_of(large)
    write_shard(large, {f"{number}.png": b"1" for number in range(2)})
    assert [name for name, _, _ in members_of(large)] == ["0.png", "1.png"]
    large.write_bytes(b"no tar" * 1000)
    with pytest.raises(UserError, match="no readable tar file"):
        members_of(large)


def test_a_note_that_cannot_be_written_is_done_without(large: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert len(members_of(large)) == shards_module._LARGE
    write_shard(large, {f"{number}\udcff.png": b"" for number in range(shards_module._LARGE)})
    assert len(members_of(large)) == shards_module._LARGE


def test_shards_or_pictures_whichever_are_more(shards: Path) -> None:
    (shards / "cover.png").write_bytes(picture(4))
    assert load_images(str(shards), 8).ids == ["9", "1", "2", "dir/0"]
    for seed in range(3):
        (shards / f"{seed}.png").write_bytes(picture(seed))
    assert load_images(str(shards), 8).ids == ["0.png", "1.png", "2.png", "cover.png"]


def test_samples_in_shards(tmp_path: Path) -> None:
    names = [f"{sample:06d}" for sample in range(4)]
    write_shard(tmp_path / "samples-00000.tar", {f"{name}.png": picture(int(name)) for name in names})
    (tmp_path / "samples.json").write_text("{}")
    (tmp_path / "preview").mkdir()
    for name in ("grid.png", "interpolation.png"):
        (tmp_path / "preview" / name).write_bytes(picture(9))
    assert image_size(str(tmp_path)) == 12
    expected = np.stack([noise(seed) for seed in range(4)])
    for source in (tmp_path, tmp_path / "samples-00000.tar"):
        found = sample_images(str(source))
        assert (found.count, found.size) == (4, (12, 12))
        np.testing.assert_array_equal(found.read(range(1, 3)), expected[1:3])
        np.testing.assert_array_equal(load_images(str(source), 12).images, expected)
    (tmp_path / "notes.pdf").touch()
    with pytest.raises(UserError, match=r"notes\.pdf: no picture; move it away from the samples"):
        sample_images(str(tmp_path))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_images(str(path), 8)
    assert str(path) in str(caught.value)
    return str(caught.value)


def link(member: tarfile.TarInfo) -> None:
    member.type, member.linkname, member.size = tarfile.SYMTYPE, "/etc/passwd", 0


def device(member: tarfile.TarInfo) -> None:
    member.type, member.size = tarfile.CHRTYPE, 0


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("a.png", link, "'a.png' is a link or device"),
        ("a.png", device, "'a.png' is a link or device"),
        ("/etc/a.png", lambda member: None, "'/etc/a.png' has a name that leads out"),
        ("b/../../a.png", lambda member: None, "'b/../../a.png' has a name that leads out"),
        ("a.png", lambda member: setattr(member, "size", -512), "'a.png' states an impossible size"),
        ("a.png", lambda member: setattr(member, "size", 1 << 60), "states 1,152,921,504,606,846,976 bytes"),
        ("a.png", lambda member: setattr(member, "size", 1 << 20), "unexpected end of data"),
        ("a.txt", lambda member: setattr(member, "size", 1 << 70), "no readable tar file"),
        ("a.png", lambda member: setattr(member, "pax_headers", {"a": "b" * (1 << 21)}), "a header of 2"),
    ],
)
def test_hostile_members_are_one_line(tmp_path: Path, name: str, change: MemberChange, reason: str) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(picture(0))
    change(member)
    header = member.tobuf(tarfile.PAX_FORMAT if member.pax_headers else tarfile.GNU_FORMAT)
    content = picture(0).ljust(1024, b"\0") if member.size else b""
    (tmp_path / "a.tar").write_bytes(header + content + bytes(1024))
    assert reason in refused(tmp_path / "a.tar")


def test_large_members_are_refused_unless_they_are_not_wanted(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for name in ("0.mp4", "0.png"):
        member = tarfile.TarInfo(name)
        member.size = 1 << 30
        with path.open("wb") as file:  # a sparse file: nothing is written of the gigabyte
            file.write(member.tobuf())
            file.seek(1 << 30, 1)
            file.write(bytes(1024))
        assert ("states 1,073,741,824 bytes" if name == "0.png" else "found 1 .mp4") in refused(path)


def test_damaged_shards_are_one_line(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {f"{seed}.png": picture(seed) for seed in range(3)})
    whole = path.read_bytes()
    second = whole.index(b"1.png")
    for content, reason in (
        (b"", "no readable tar file (empty file)"),
        (b"no tar" * 200, "no readable tar file"),
        (whole[:second], "cut off"),
        (whole[: second + 600], "unexpected end of data"),
        (whole[:second] + b"7" + whole[second + 1 :], "damaged"),
        (whole + whole, "joined to another"),
        (whole.replace(picture(1)[33:60], bytes(27)), "1.png: unreadable picture"),
        (whole.replace(picture(1)[:60], b"P" * 60), "unreadable picture (cannot identify image file); remove"),
    ):
        path.write_bytes(content)
        assert reason in refused(path), reason
    with tarfile.open(path, "w:gz"):
        pass
    assert "without compression" in refused(path)


def test_keys_are_unique_over_all_shards(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shard(shards / "c.tar", {"1.jpg": picture(8, "JPEG")})
    with pytest.raises(UserError, match=r"c\.tar: 1\.jpg: the key '1' is taken by .*a\.tar: 1\.png"):
        load_images(str(shards), 8)
    assert main(["fit", "--data", str(shards), "--output_dir", str(shards / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the key" in line]
    assert "give each picture one of its own" in line
    assert not (shards / "run").exists()


def test_shards_without_pictures_say_what_they_hold(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "a.tar", {"0.npy": b"", "1.npy": b"", "0.view.png": picture(0)})
    with pytest.raises(UserError, match=r"no members KEY\.png … in the shards; found 2 \.npy, 1 \.view\.png"):
        shard_members("a", [path], (".png",))
