"""A delta makes the very bundle that a fresh export is; whatever stops it leaves the old one or the new one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from export.commands.export import ExportArguments, export_bundle
from export.delta import _Pool, open_base, write_delta
from export.device import files, update
from export.device.bundle import ENGINES, BundleFolder, manifest_digest
from export.device.delta import Delta
from latent_prior.denoisers import ResMLPDenoiser
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.models.mnif_model import MNIFModel
from mnif.utils.json_files import read_json
from tests.conftest import small_decoder, small_pipeline
from tests.export.test_device import old_pythons, run
from tests.export.test_replacing_a_bundle import contents

KINDS = ["same", "prior", "grown", "other"]


def with_another_prior(pipeline: MNIFPipeline) -> MNIFPipeline:
    torch.manual_seed(2)
    for parameter in pipeline.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return pipeline


def with_two_more_bases(pipeline: MNIFPipeline) -> MNIFPipeline:
    old = pipeline.decoder
    decoder = MNIFModel(resolution=16, num_bases=8, width=8, depth=1, latent_dim=12, cells=2).eval()
    with torch.no_grad():
        for rows, earlier in zip(decoder.bases, old.bases, strict=True):
            rows[: len(earlier)] = earlier
    settings = {key: value for key, value in pipeline.denoiser.config.items() if not key.startswith("_")}
    denoiser = ResMLPDenoiser(**settings | {"decoder_fingerprint": decoder.fingerprint()}).eval()
    denoiser.load_state_dict(pipeline.denoiser.state_dict())
    return MNIFPipeline(decoder, denoiser, pipeline.scheduler)


def another_model(_: MNIFPipeline) -> MNIFPipeline:
    torch.manual_seed(3)
    decoder = MNIFModel(resolution=12, num_bases=5, width=12, depth=2, latent_dim=12, cells=1).eval()
    return small_pipeline(decoder)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old``, fresh exports of four newer models, and for each its delta, ``NAME.delta``."""
    folder = tmp_path_factory.mktemp("bundles")
    changes: dict[str, Callable[[MNIFPipeline], MNIFPipeline]] = {
        "old": lambda pipeline: pipeline,
        "same": lambda pipeline: pipeline,
        "prior": with_another_prior,
        "grown": with_two_more_bases,
        "other": another_model,
    }
    for name, change in changes.items():
        options = ExportArguments(model=folder, output_dir=folder / name, num_baked=1, num_inference_steps=[1])
        options = replace(options, compile_rtx="off", precision=["fp32"], sampler_precision=["fp32"])
        model, inputs = change(small_pipeline(small_decoder())), {"of": name}
        export_bundle(model, options, inputs)
        if name == "grown":
            (folder / "command.delta").mkdir()
            export_bundle(model, replace(options, output_dir=folder / "command.delta", since=folder / "old"), inputs)
        if name != "old":
            (folder / f"{name}.delta").mkdir()
            write_delta(open_base(folder / "old"), folder / name, folder / f"{name}.delta")
    return folder


@pytest.fixture
def board(bundles: Path, tmp_path: Path) -> Path:
    """A copy of the old bundle with plans, a file of the user's and one that Python left."""
    bundle = Path(shutil.copytree(bundles / "old", tmp_path / "board/bundle"))
    for name, content in OTHERS.items():
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(content)
    return bundle


PLANS = {"engines/decoder.plan": b"a plan", "engines/decoder.plan.json": b"{}", "engines/sampler_1.plan": b"a plan"}
OTHERS = {**PLANS, "notes/mine.txt": b"mine", "engines/readme": b"mine"}


def apply(bundle: Path, delta: Path, *flags: str) -> int:
    return update.main(["--bundle", str(bundle), "--delta", str(delta), *flags])


def undo(bundle: Path, *flags: str) -> int:
    return update.main(["--bundle", str(bundle), "--undo", *flags])


def beside(bundle: Path) -> list[str]:
    return sorted(path.name for path in bundle.parent.iterdir() if path != bundle)


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("kind", KINDS)
def test_a_board_has_what_a_fresh_export_is_and_goes_back(bundles: Path, board: Path, kind: str) -> None:
    before = contents(board)
    assert apply(board, bundles / f"{kind}.delta") == 0
    fresh, now = contents(bundles / kind), contents(board)
    assert {name: now.pop(name) for name in fresh} == fresh
    assert {"notes/mine.txt": b"mine", "engines/readme": b"mine"}.items() <= now.items() <= OTHERS.items()
    assert len(beside(board)) == 1
    assert undo(board) == 0
    assert contents(board) == before
    assert beside(board) == []


def test_the_command_writes_the_delta_of_the_bundle_that_it_would_write(bundles: Path) -> None:
    assert contents(bundles / "command.delta") == contents(bundles / "grown.delta")


def test_what_is_there_already_is_not_shipped(bundles: Path) -> None:
    sizes = {kind: sum(map(len, contents(bundles / f"{kind}.delta").values())) for kind in KINDS}
    assert sizes["same"] < 1500
    for kind in KINDS:  # never much more than what the whole bundle takes
        assert sizes[kind] < len(zlib.compress(b"".join(contents(bundles / kind).values()), 9)) + 4000
    files = {kind: Delta(bundles / f"{kind}.delta").files for kind in KINDS}
    assert files["same"].keys() == {"manifest.json"}
    graphs = {name for name in files["prior"] if name.startswith("onnx/")}
    assert graphs == {"onnx/sampler_1.onnx", "onnx/baked_0000.onnx"}
    rows = sum(each.numel() * 4 for each in small_decoder().bases)
    for name in ("onnx/decoder.onnx", "onnx/sampler_1.onnx"):  # in both, all bases of before are copies
        file = files["grown"][name]
        assert sum(step[0] for step in file["steps"] if len(step) == 1) < file["bytes"] - rows


def test_copies_are_found_wherever_they_lie(tmp_path: Path, bundles: Path) -> None:
    """Blocks that were moved, doubled and taken from another file, between bytes that are new."""
    old = Path(shutil.copytree(bundles / "old", tmp_path / "old"))
    draw = np.random.default_rng(0)
    graph, weights = (
        np.frombuffer((old / name).read_bytes(), np.uint8) for name in ("onnx/decoder.onnx", "README.md")
    )
    new = [draw.integers(0, 256, size, np.uint8) for size in (3, 70, 1)]
    blocks = [new[0], graph[900:2500], new[1], weights[101:1500], graph[333:1200], new[2], graph[900:2500]]
    content = np.concatenate(blocks)
    pool = _Pool.of(BundleFolder(old))
    copies = list(pool.find_copies(content))
    built, at = np.full(len(content), 256), 0
    for copy in copies:
        assert copy.at >= at
        at = copy.at + copy.length
        source = np.frombuffer((old / pool.names[copy.source]).read_bytes(), np.uint8)
        built[copy.at : at] = source[copy.offset : copy.offset + copy.length]
    assert (built[built < 256] == content[built < 256]).all()
    assert (built == 256).sum() <= sum(map(len, new)) + 2  # a new byte may happen to go on as the old one did
    assert list(pool.find_copies(draw.integers(0, 256, 5000, np.uint8))) == []
    assert list(pool.find_copies(np.zeros(31, np.uint8))) == []


def test_plans_stay_where_their_graph_did(bundles: Path, board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert apply(board, bundles / "prior.delta") == 0
    assert {path.name for path in (board / ENGINES).iterdir()} == {"decoder.plan", "decoder.plan.json", "readme"}
    out = capsys.readouterr().out
    assert "1 plans kept" in out
    assert "1 plans of graphs that changed are to be built again (device/build.py): engines/sampler_1.plan" in out
    (board / "engines/sampler_1.plan").write_bytes(b"built for the new one")
    (board / "engines/decoder.plan").write_bytes(b"built anew")
    (board / "notes/mine.txt").write_bytes(b"gone on")
    assert undo(board) == 0
    now = contents(board)
    assert now["engines/sampler_1.plan"] == b"a plan"  # its own, of the graph it is of
    assert now["engines/decoder.plan"] == b"built anew"
    assert now["notes/mine.txt"] == b"gone on"


def test_a_plan_for_triton_goes_with_its_graph(bundles: Path, board: Path) -> None:
    for name in ("decoder", "sampler_1"):
        (board / f"triton/{name}/1").mkdir(parents=True)
        (board / f"triton/{name}/1/model.plan").write_bytes(b"a plan")
    assert apply(board, bundles / "prior.delta") == 0
    assert [path.name for path in (board / "triton").iterdir()] == ["decoder"]


def test_another_bundle_is_refused_and_a_second_time_is_none(
    bundles: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert apply(board, bundles / "prior.delta") == 0
    before = contents(board.parent)
    capsys.readouterr()
    assert apply(board, bundles / "prior.delta") == 0
    assert "already; nothing to do" in capsys.readouterr().out
    assert apply(board, bundles / "other.delta") == 2
    digests = {name: read_json(bundles / name / "manifest.json")["digest"][:12] for name in ("old", "prior")}
    line = line_of(capsys)
    assert f"other.delta applies to the bundle {digests['old']} (model " in line
    assert f"{board} is {digests['prior']} (model " in line
    assert contents(board.parent) == before


def test_undone_it_is_undone_and_an_update_ends_the_one_before(
    bundles: Path, board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert undo(board) == 2
    assert "nothing to undo, no bundle before it is kept" in line_of(capsys)
    onwards = tmp_path / "onwards"
    onwards.mkdir()
    write_delta(open_base(bundles / "prior"), bundles / "grown", onwards)
    assert apply(board, bundles / "prior.delta") == 0
    assert apply(board, onwards) == 0
    assert len(beside(board)) == 1
    assert undo(board) == 0
    assert undo(board) == 2
    assert read_json(board / "manifest.json") == read_json(bundles / "prior/manifest.json")
    assert apply(board, onwards, "--no_keep") == 0
    assert beside(board) == []
    assert undo(board) == 2
    capsys.readouterr()
    assert undo(board, "--no_keep") == 2
    assert "--no_keep: is for --delta" in line_of(capsys)


def test_check_says_what_would_be_and_leaves_everything(
    bundles: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(board.parent)
    assert apply(board, bundles / "grown.delta", "--check") == 0
    assert "would become the bundle" in capsys.readouterr().out
    assert contents(board.parent) == before
    assert apply(board, bundles / "grown.delta") == 0
    before = contents(board.parent)
    assert undo(board, "--check") == 0
    assert "again; all hashes fit" in capsys.readouterr().out
    assert contents(board.parent) == before


def test_a_damaged_bundle_is_neither_taken_nor_gone_back_to(
    bundles: Path, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = board / "onnx/decoder.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-1] + b"x")
    for kind in ("prior", "grown"):  # one keeps the file, one takes pieces of it
        assert apply(board, bundles / f"{kind}.delta") == 2
        assert f"{graph}: differs from what was exported (SHA-256)" in line_of(capsys)
        assert beside(board) == []
    graph.write_bytes(whole)
    assert apply(board, bundles / "grown.delta") == 0
    (kept,) = beside(board)
    (board.parent / kept / "onnx/decoder.onnx").write_bytes(b"")
    before = contents(board.parent)
    capsys.readouterr()
    assert undo(board) == 2
    assert "differs from what was exported" in line_of(capsys)
    assert contents(board.parent) == before


def test_what_is_in_the_way_is_refused(bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, lean = bundles / "same", Path(shutil.copytree(bundles / "same", tmp_path / "lean"))
    manifest = read_json(lean / "manifest.json")
    del manifest["files"]["README.md"]
    (lean / "README.md").unlink()
    (lean / "manifest.json").write_text(json.dumps(manifest | {"digest": manifest_digest(manifest)}))
    for old, new in ((lean, whole), (whole, lean)):
        board = Path(shutil.copytree(old, tmp_path / f"from_{old.name}/bundle"))
        (tmp_path / f"{new.name}.delta").mkdir()
        write_delta(open_base(old), new, tmp_path / f"{new.name}.delta")
        if new is lean:
            assert apply(board, tmp_path / "lean.delta") == 0
        (board / "README.md").write_text("mine")
        before = contents(board.parent)
        capsys.readouterr()
        assert (apply(board, tmp_path / "same.delta") if new is whole else undo(board)) == 2
        message = f"{board / 'README.md'}: is not of the bundle, and in the way of the other one's file; move it"
        assert line_of(capsys) == f"mnif update: {message}"
        assert contents(board.parent) == before


def test_too_little_room_and_places_without_writing(
    bundles: Path, board: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(board.parent)
    little = shutil.disk_usage(board)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: little)
        assert apply(board, bundles / "grown.delta") == 2
        assert "MB beside the old one, and 0.0 MB are free; make room" in line_of(capsys)

    def full(path: Path, pieces: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def read_only(**_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(update, "_write", full)
        assert apply(board, bundles / "grown.delta") == 2
        assert "No space left on device" in line_of(capsys)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.TemporaryFile", read_only)
        assert apply(board, bundles / "grown.delta") == 2
        assert f"{board.parent}: nothing can be written there (Read-only file system)" in line_of(capsys)
    assert contents(board.parent) == before


def without_exchange(patch: pytest.MonkeyPatch) -> None:
    """As on FAT and some network disks: two renames, and no second names."""

    def no_link(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    patch.setattr(files.ctypes, "CDLL", lambda _: None)
    patch.setattr(os, "link", no_link)


def test_on_a_simple_file_system(bundles: Path, board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    before = contents(board)
    (board / "notes/link").symlink_to("mine.txt")
    assert apply(board, bundles / "grown.delta") == 0
    assert contents(board).items() >= contents(bundles / "grown").items()
    assert os.readlink(board / "notes/link") == "mine.txt"
    assert undo(board) == 0
    assert contents(board) == {**before, "notes/link": b"mine"}
    assert beside(board) == []


CHANGES = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "ctypes.dlsym")


def killed(work: Callable[[], object], step: int) -> bool:
    """Runs in a child that is killed before its ``step``-th change of the disk; tells whether it got so far."""
    child = os.fork()
    if child == 0:
        left = step

        def watch(event: str, arguments: tuple) -> None:
            nonlocal left
            if event in CHANGES or (event == "open" and isinstance(arguments[1], str) and arguments[1] != "r"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(watch)
        os._exit(work() != 0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize("simple", [False, True])
def test_killed_anywhere_it_is_the_old_or_the_new(
    simple: bool, bundles: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update, then going back; the same command, given again, ends what was cut off."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it is killed and not cut off: the disk knows all
    if simple:
        without_exchange(monkeypatch)
    delta, others = bundles / "prior.delta", ("engines/readme", "notes/mine.txt")
    old, new = contents(bundles / "old"), contents(bundles / "prior")
    for work, before, after in (
        (lambda: apply(board, delta), old, new),
        (lambda: undo(board), new, old),
    ):
        start = Path(shutil.copytree(board.parent, board.parent.parent / "start", symlinks=True))
        step = stops = 0
        while killed(work, step):
            if board.exists():  # else between two renames
                now = contents(board)
                assert all(now[name] == OTHERS[name] for name in others)
                assert now.items() >= before.items() or now.items() >= after.items()
            else:
                assert simple
            if not board.exists() or not contents(board).items() >= after.items():
                assert work() == 0
            assert contents(board).items() >= after.items()
            assert update.main(["--bundle", str(board), "--delta", str(delta), "--check"]) == 0
            assert len(beside(board)) == (after is new)
            shutil.rmtree(board.parent)
            shutil.copytree(start, board.parent)
            step, stops = step + 1 + stops // 2, stops + 1
        assert stops > 8
        shutil.rmtree(start)


def test_all_is_on_the_disk_before_it_has_its_name(
    bundles: Path, board: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: set[int] = set()
    flush, exchange = os.fsync, files.exchange_folders

    def noted(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        flush(handle)

    def checked(one: Path, other: Path) -> None:
        new = [path for path in (one, *one.rglob("*")) if path.is_dir() or path.stat().st_nlink == 1]
        assert len(new) > 8
        assert {path.stat().st_ino for path in new} <= flushed
        exchange(one, other)
        assert other.parent.stat().st_ino in flushed

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(update, "exchange_folders", checked)
    assert apply(board, bundles / "prior.delta") == 0


@pytest.mark.parametrize("python", [sys.executable, *old_pythons()])
def test_from_the_bundle_alone(bundles: Path, board: Path, python: str) -> None:
    """By the bundle's own files; the shell that stands in it is told to go where the new one is."""
    done = run(board, python, "update", "--delta", str(bundles / "grown.delta"))
    assert done.returncode == 0, done.stderr
    assert f"a shell that was in the bundle is still in the one before: cd {board}" in done.stdout
    assert contents(board).items() >= contents(bundles / "grown").items()
    drawn = run(board, python, "sample", "--num", "1", "--output_dir", str(board.parent / "drawn"))
    assert drawn.returncode == 0, drawn.stderr
    done = run(board, python, "update", "--undo")
    assert done.returncode == 0, done.stderr
    assert contents(board).items() >= contents(bundles / "old").items()
    done = run(board, python, "update")
    assert done.returncode == 2
    assert done.stderr == "device/update.py: one of the arguments --delta --undo is required\n"


def test_one_update_at_a_time(bundles: Path, board: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with update._held(board):
        words = [sys.executable, "device/update.py", "--delta", str(bundles / "grown.delta")]
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""}
        done = subprocess.run(words, cwd=board, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert done.stderr == f"device/update.py: {board}: is being updated by another process; wait for it\n"


def test_flags_of_the_command(
    pipeline: MNIFPipeline, bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    words = [
        "export",
        "--model",
        f"{tmp_path}/model",
        "--precision",
        "fp32",
        "--num_baked",
        "0",
        "--compile_rtx",
        "off",
    ]
    words += ["--num_inference_steps", "1", "--sampler_precision", "fp32"]
    old, delta = str(bundles / "old"), str(tmp_path / "delta")
    for _ in range(2):  # the second time over the first
        assert main([*words, "--output_dir", delta, "--since", old]) == 0
        out = capsys.readouterr().out
        digest = read_json(bundles / "old/manifest.json")["digest"][:12]
        assert f"{delta}: " in out
        assert f"files changed; it applies to {digest} (model " in out
        assert sorted(contents(Path(delta))) == ["delta.bin", "delta.json"]
    damaged = Path(shutil.copytree(old, tmp_path / "damaged"))
    (damaged / "README.md").write_text("x")
    for output, since, message in (
        (delta, str(damaged), "--since: " + str(damaged / "README.md") + ": differs from what was exported"),
        (delta, str(tmp_path / "nothing"), "--since: "),
        (old, old, "holds something other than a delta"),
        (delta, None, "holds something other than a bundle"),
    ):
        assert main([*words, "--output_dir", output, *(["--since", since] if since else [])]) == 2
        assert message in line_of(capsys)
    assert sorted(contents(Path(delta))) == ["delta.bin", "delta.json"]
    assert main(["sample", "--model", f"{tmp_path}/model", "--output_dir", delta, "--num_samples", "1"]) == 2
    assert "is of `mnif export`, delta.json tells" in line_of(capsys)
