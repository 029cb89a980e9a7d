"""`mnif export` where a bundle is already: its own files are replaced, all others stay, and no kill mixes two."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import export.bundle
from export.device.bundle import BundleError, BundleFolder, manifest_digest
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.utils.files import sha256_of_file
from mnif.utils.json_files import read_json

# Runs a `mnif` command that is killed when it moves its second file.
KILLED = """
import os, shutil, signal, sys
from mnif.cli import main

move, moved = shutil.move, []

def killed(*paths):
    if moved:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(paths)
    return move(*paths)

shutil.move = killed
sys.exit(main(sys.argv[1:]))
"""
OTHERS = {"precious.txt": b"mine", "onnx/notes/a.txt": b"mine", "triton/decoder/1/model.plan": b"mine"}
OTHERS |= {"engines/decoder.plan": b"a plan", ".hidden.tmp": b"mine"}


@pytest.fixture
def words(pipeline: MNIFPipeline, tmp_path: Path) -> list[str]:
    """A quick export into ``bundle``; further flags may follow."""
    pipeline.save_pretrained(tmp_path / "model")
    words = ["export", "--model", f"{tmp_path}/model", "--output_dir", f"{tmp_path}/bundle", "--precision", "fp32"]
    return [*words, "--num_inference_steps", "1", "--compile_rtx", "off", "--num_baked"]


@pytest.fixture
def bundle(words: list[str], tmp_path: Path) -> Path:
    """Of one baked sample, among files that are none of the bundle's."""
    assert main([*words, "1"]) == 0
    for name, content in OTHERS.items():
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "bundle" / name).write_bytes(content)
    return tmp_path / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_whole(bundle: Path, others: dict[str, bytes]) -> dict:
    """The manifest, if it is good, names what is there beside ``others``, and nothing is left beside the bundle."""
    manifest = BundleFolder(bundle).manifest
    there = contents(bundle)
    assert {name: there.pop(name) for name in others} == others
    assert there.keys() == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert sha256_of_file(bundle / name) == entry["sha256"]
    assert not list(bundle.parent.glob(".*"))
    return manifest


def test_what_the_manifest_does_not_name_stays(
    words: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = bundle / "onnx/decoder.onnx"
    before = graph.stat().st_mtime_ns
    capsys.readouterr()
    assert main([*words, "1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    for count in ("2", "0"):  # a graph more, and then two that go
        assert main([*words, count]) == 0
        assert "4 files of others in it stay as before" in capsys.readouterr().out
        manifest = check_whole(bundle, OTHERS)
        assert sum(name.startswith("baked") for name in manifest["graphs"]) == int(count)
    assert graph.stat().st_mtime_ns == before  # not touched: the plans of a graph that is the same are too
    assert main([*words, "0", "--triton"]) == 0
    assert main([*words, "0"]) == 0
    check_whole(bundle, OTHERS)
    assert [path.name for path in (bundle / "triton").iterdir()] == ["decoder"]  # with the plan that is the user's


def test_what_is_in_the_way_is_refused_and_nothing_is_touched(
    words: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = bundle / "onnx/baked_0001.onnx"
    for make in (lambda: mine.write_text("mine"), mine.mkdir, lambda: mine.symlink_to("nowhere")):
        make()
        before = contents(bundle)
        capsys.readouterr()
        assert main([*words, "2"]) == 2
        line = f"mnif export: {mine} is not of the bundle and in its way; move it, or choose another --output_dir\n"
        assert capsys.readouterr().err == line
        assert contents(bundle) == before
        assert main([*words, "1"]) == 0  # still there, and in nobody's way
        mine.rmdir() if mine.is_dir() else mine.unlink()
    (bundle / "triton/decoder/1/model.plan").unlink()
    shutil.rmtree(bundle / "triton")
    (bundle / "triton").write_text("mine")
    assert main([*words, "1", "--triton"]) == 2
    assert f"{bundle / 'triton'} is not of the bundle" in capsys.readouterr().err
    assert (bundle / "triton").read_text() == "mine"


@pytest.mark.parametrize("next", ["2", "1", "0"])
def test_stopped_anywhere_it_is_no_bundle_and_the_next_command_mends_it(
    words: list[str], bundle: Path, next: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether that is the same command, the one before, or another."""
    stops = 0
    while True:
        left = stops

        def stopping(step: Callable) -> Callable:
            def stopped(*arguments: object) -> None:
                nonlocal left
                if left == 0:
                    raise KeyboardInterrupt
                left -= 1
                step(*arguments)

            return stopped

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "move", stopping(shutil.move))
            patch.setattr(export.bundle, "_remove", stopping(export.bundle._remove))
            code = main([*words, "0", "--resolution", "12"])
        if code == 0:
            break
        assert code == 130
        with pytest.raises(BundleError, match=r"the export was stopped half-way; run `mnif export` again"):
            BundleFolder(bundle)
        assert main([*words, next]) == 0
        manifest = check_whole(bundle, OTHERS)
        assert sum(name.startswith("baked") for name in manifest["graphs"]) == int(next)
        stops += 1
    assert stops == {"0": 5, "1": 6, "2": 7}[next]
    check_whole(bundle, OTHERS)


def test_what_a_killed_export_left_goes_with_the_next(words: list[str], bundle: Path) -> None:
    (bundle.parent / "run.py").write_text(KILLED)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(bundle.parent / "run.py"), *words, "2", "--resolution", "12"]
    done = subprocess.run(script, capture_output=True, env=environment)
    assert done.returncode == -9, done.stderr
    assert len(list(bundle.parent.glob(".bundle.*.tmp"))) == 1
    assert read_json(bundle / "manifest.json")["schema"] == "unfinished"
    assert main([*words, "0"]) == 0
    check_whole(bundle, OTHERS)


def test_temporaries_of_others_are_left_alone(
    words: list[str], bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of this bundle go even where there is nothing to do."""
    others = [".bundle.notes.tmp", ".bundle.v2.ab3d_f9h.tmp", ".bundle2.ab3d_f9h.tmp", "bundle.ab3d_f9h.tmp"]
    for name in (*others, ".bundle.ab3d_f9h.tmp", ".bundle.ab3d_f9h.old"):
        (bundle.parent / name / "onnx").mkdir(parents=True)
    (bundle / ".manifest.json.12.tmp").write_text("{")
    assert main([*words, "1"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert sorted(path.name for path in bundle.parent.glob("*bundle*")) == sorted([*others, "bundle"])
    assert not (bundle / ".manifest.json.12.tmp").exists()


def test_a_changed_manifest_is_no_guide(words: list[str], bundle: Path) -> None:
    """It is written anew, and what it names elsewhere is nobody's to remove."""
    (bundle.parent / "thesis.txt").write_text("years of work")
    manifest = read_json(bundle / "manifest.json")
    names = ["../thesis.txt", str(bundle.parent / "thesis.txt"), "engines/decoder.plan", "", "onnx"]
    manifest["files"] |= {name: {"sha256": "0", "bytes": 1} for name in names}
    manifest["digest"] = manifest_digest(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert main([*words, "1"]) == 0
    assert (bundle.parent / "thesis.txt").read_text() == "years of work"
    manifest = check_whole(bundle, OTHERS)
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"grid": {}}))
    assert main([*words, "1"]) == 0
    assert check_whole(bundle, OTHERS)["grid"] == manifest["grid"]
