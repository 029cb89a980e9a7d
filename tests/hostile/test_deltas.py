"""Damaged and hostile deltas, their hashes made anew: a bundle stays as it is, or becomes a whole one."""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.delta import open_base, write_delta
from export.device.bundle import BundleFolder, manifest_digest
from export.device.update import main as update
from tests.export.test_replacing_a_bundle import contents
from tests.hostile.mutators import damaged_bytes, damaged_json


@pytest.fixture(scope="module")
def made_delta(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the bundle to one with a README of other words and a graph less."""
    folder = tmp_path_factory.mktemp("delta")
    new = Path(shutil.copytree(exported, folder / "new"))
    manifest = json.loads((new / "manifest.json").read_text())
    del manifest["files"][manifest["graphs"].pop("baked_0001")["file"]]
    (new / "README.md").write_text((new / "README.md").read_text().replace("mnif bundle", "another bundle"))
    content = (new / "README.md").read_bytes()
    manifest["files"]["README.md"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (new / "manifest.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    (folder / "delta").mkdir()
    write_delta(open_base(exported), new, folder / "delta")
    return folder / "delta"


@pytest.fixture
def delta(made_delta: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_delta, tmp_path / "delta"))


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "board/bundle", copy_function=_link))


def _link(source: str, target: str) -> None:
    Path(target).hardlink_to(source)  # quick; an update writes into no file that is there


def resealed(delta: Path) -> None:
    """Makes the hashes anew, as far as the delta is one."""
    path = delta / "delta.json"
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return
    if not isinstance(content, dict):
        return
    data = (delta / "delta.bin").read_bytes()
    if isinstance(content.get("data"), dict):
        content["data"] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps(content | {"digest": manifest_digest(content)}))


def check(delta: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> str | None:
    """Updates; what the one line says if it is refused, else None."""
    before = contents(bundle.parent)
    code = update(["--bundle", str(bundle), "--delta", str(delta)])
    lines = capsys.readouterr().err.splitlines()
    assert (code, len(lines)) in ((0, 0), (2, 1))
    if code == 2:
        assert contents(bundle.parent) == before
        return lines[0]
    folder = BundleFolder(bundle)
    for name in folder.manifest["files"]:
        folder.read(name)
    return None


@pytest.mark.parametrize("seed", range(80))
def test_descriptions(seed: int, delta: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = delta / "delta.json"
    path.write_bytes(damaged_json(path.read_bytes(), seed))
    resealed(delta)
    check(delta, bundle, capsys)


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("sealed", [False, True])
def test_data(seed: int, sealed: bool, delta: Path, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = delta / "delta.bin"
    whole = path.read_bytes()
    path.write_bytes(damaged_bytes(whole, seed))
    if sealed:
        resealed(delta)
    refusal = check(delta, bundle, capsys)
    assert sealed or path.read_bytes() == whole or "delta.bin: differs from what was exported" in (refusal or "")


Change = Callable[[dict[str, Any]], None]


def renamed(name: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["files"][name] = content["files"].pop("README.md")

    return change


def steps(*steps: list[int], size: int | None = None) -> Change:
    def change(content: dict[str, Any]) -> None:
        total = sum(step[-1] for step in steps) if size is None else size
        content["files"]["README.md"] |= {"steps": list(steps), "bytes": total}

    return change


def without_manifest(content: dict[str, Any]) -> None:
    del content["files"]["manifest.json"]


def other_source(name: str) -> Change:
    def change(content: dict[str, Any]) -> None:
        content["sources"] = [name] * len(content["sources"])

    return change


def further_file(content: dict[str, Any]) -> None:
    content["files"]["device/evil.py"] = {"sha256": hashlib.sha256(b"").hexdigest(), "bytes": 0, "steps": []}


def fewer_files(content: dict[str, Any]) -> None:
    del content["files"]["README.md"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed("../../thesis.txt"), "no file of a bundle"),
        (renamed("/etc/passwd"), "no file of a bundle"),
        (renamed("onnx/../../x"), "no file of a bundle"),
        (renamed("./README.md"), "no file of a bundle"),
        (renamed("onnx//x"), "no file of a bundle"),
        (renamed("engines/decoder.plan"), "no file of a bundle"),
        (renamed("a\\b"), "no file of a bundle"),
        (renamed("a\0b"), "no file of a bundle"),
        (renamed(""), "no file of a bundle"),
        (renamed("R" * 400), "File name too long"),
        (renamed("device"), "its manifest is of other files"),
        (steps([10**9]), "MB are free; make room"),
        (steps([1 << 31], size=1), "the delta.files.README.md.steps[0][0]"),
        (steps([-1], size=1), "the delta.files.README.md.steps[0][0]"),
        (steps([0, 0, 10**6]), "the delta takes bytes 0 to 1000000 of a file of"),
        (steps([0, (1 << 31) - 1, 1]), "the delta takes bytes"),
        (steps([50, 0, 1]), "has the step [50, 0, 1]"),
        (steps([1, 2]), "has the step [1, 2]"),
        (steps([], size=0), "has the step []"),
        (steps([5], size=6), "do not make 6 bytes"),
        (steps([100_000]), "ends too early"),
        (steps([5]), "becomes another file than was exported"),
        (without_manifest, "makes files and no manifest.json"),
        (other_source("../../etc/passwd"), "the bundle it applies to has no ../../etc/passwd"),
        (further_file, "its manifest is of other files"),
        (fewer_files, "becomes another file"),
    ],
)
def test_deltas_that_ask_for_what_none_does(
    change: Change,
    words: str,
    delta: Path,
    bundle: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    little = shutil.disk_usage(bundle)._replace(free=1 << 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    content = json.loads((delta / "delta.json").read_text())
    change(content)
    (delta / "delta.json").write_text(json.dumps(content))
    resealed(delta)
    assert words in (check(delta, bundle, capsys) or "")


def test_a_bomb_is_unpacked_no_further_than_was_said(
    delta: Path, bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """128 MB of zeros."""
    packer = zlib.compressobj(9)
    (delta / "delta.bin").write_bytes(b"".join(packer.compress(bytes(1 << 20)) for _ in range(128)) + packer.flush())
    resealed(delta)
    assert "becomes another file than was exported" in (check(delta, bundle, capsys) or "")


def test_many_steps_are_no_way_to_fill_a_disk(
    delta: Path, bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    little = shutil.disk_usage(bundle)._replace(free=1 << 26)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    content = json.loads((delta / "delta.json").read_text())
    steps(*[[0, 0, 10_000]] * 20_000)(content)
    (delta / "delta.json").write_text(json.dumps(content))
    resealed(delta)
    assert "200.0 MB beside the old one, and 67.1 MB are free" in (check(delta, bundle, capsys) or "")
