"""A command fills a folder that is free or its own: the folders of all others stay as they are, to the last byte."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from export.device import cli as device_cli
from export.device import sample as device_sample
from latent_prior.pipeline import MNIFPipeline
from mnif.cli import main
from mnif.utils import output_folders
from mnif.utils.errors import UserError
from mnif.utils.output_folders import BEGUN, LOCK, check_output_folder, held_folder

SMALL = ["--resolution", "16", "--cells", "2", "--num_bases", "6", "--width", "8", "--depth", "1"]
SMALL += ["--latent_dim", "12", "--encoder_width", "16"]
QUICK = ["--max_train_steps", "2", "--train_batch_size", "8", "--refinement_steps", "0", "--compile", "off"]
COMMANDS = ["fit", "compare-fit", "pilot", "encode", "decode", "sample", "export", "eval"]


def command(name: str, output: Path, source: Path, pictures: Path) -> list[str]:
    """What fills a folder in no time, from the run in ``source``."""
    model = ["--model", f"{source}/model"]
    flags = {
        "fit": ["--data", str(pictures), *SMALL, *QUICK],
        "compare-fit": ["--data", str(pictures), *SMALL, *QUICK, "--methods", "auto-decoding", "--probes", "2"],
        "pilot": ["--data", str(pictures), *SMALL, *QUICK, "--num_bases", "2", "3", "--probes", "2"],
        "encode": [*model, "--data", str(pictures), "--preset", "fast"],
        "decode": [*model, "--latents", f"{source}/latents.safetensors", "--num", "2"],
        "sample": [*model, "--num_samples", "2", "--num_inference_steps", "2"],
        "export": [*model, "--num_baked", "0", "--precision", "fp32", "--compile_rtx", "off"],
        "eval": ["--samples", str(pictures), "--reference", str(pictures), "--num_samples", "20"],
    }
    return [name, *flags[name], "--output_dir", str(output)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, picture_folder: Path) -> Path:
    """A folder of every command, by its name."""
    folders = tmp_path_factory.mktemp("folders")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MNIF_CACHE", str(folders / "cache"))
        for name in COMMANDS:
            assert main(command(name, folders / name, folders / "fit", picture_folder)) == 0, name
            if name == "fit":
                prior = ["prior", "--run", str(folders / "fit"), "--width", "16", "--depth", "1"]
                assert main([*prior, "--max_train_steps", "2", "--compile", "off"]) == 0
    return folders


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture
def unreadable(tmp_path: Path) -> Path:
    """Data that look like pictures, until they are read."""
    folder = tmp_path / "unreadable"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"nothing")
    return folder


@pytest.mark.parametrize("owner", COMMANDS)
def test_a_folder_of_another_command_is_refused_before_any_work(
    filled: Path, owner: str, tmp_path: Path, unreadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is no model and data cannot be read: who worked first would say so."""
    before = contents(filled / owner)
    for name in COMMANDS:
        if name != owner:
            message = error_of(command(name, filled / owner, tmp_path / "nothing", unreadable), capsys)
            assert message.startswith(f"mnif {name}: {filled / owner} is of `mnif {owner}`, "), message
            assert message.endswith("choose another --output_dir")
    assert contents(filled / owner) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_goes_on_in_its_own_folder(
    filled: Path, name: str, picture_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MNIF_CACHE", str(filled / "cache"))
    before = contents(filled / name)
    (filled / name / "notes.txt").write_text("mine")
    (filled / name / ".notes.tmp").write_text("mine")
    assert main(command(name, filled / name, filled / "fit", picture_folder)) == 0
    after = contents(filled / name)
    assert after.pop("notes.txt") == after.pop(".notes.tmp") == b"mine"
    assert after.keys() == before.keys()
    assert BEGUN not in after
    for path in (filled / name / "notes.txt", filled / name / ".notes.tmp"):
        path.unlink()


def test_parts_of_a_folder_belong_to_what_is_around_them(
    filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner, inside in (("fit", "samples"), ("fit", "model/new"), ("export", "triton"), ("sample", "preview")):
        output = filled / owner / inside
        message = error_of(command("decode", output, tmp_path / "nothing", tmp_path), capsys)
        assert f"{output} is part of {filled / owner}, of `mnif {owner}`" in message
    for name in ("pictures", "bundle", "eval", "comparison"):
        for each in COMMANDS:
            assert not check_output_folder(filled / "fit" / name, each)
    message = error_of(command("sample", filled / "fit/model", tmp_path / "nothing", tmp_path), capsys)
    assert "is of `mnif fit`, decoder/config.json tells" in message


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fit", "metrics.json"),
        ("fit", "model"),
        ("compare-fit", "curves.png"),
        ("pilot", "pilot.html"),
        ("encode", "latents.safetensors"),
        ("decode", "metrics.json"),
        ("sample", "metrics.json"),
        ("eval", "metrics.md"),
        ("export", "manifest.json"),
    ],
)
def test_files_of_nobody_known_are_not_written_over(
    name: str, file: str, tmp_path: Path, unreadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / file).write_text('{"name": "a web page"}')
    message = error_of(command(name, tmp_path / "out", tmp_path / "nothing", unreadable), capsys)
    assert "choose another --output_dir" in message
    assert contents(tmp_path / "out") == {file: b'{"name": "a web page"}'}
    message = error_of(command(name, tmp_path / "out" / file, tmp_path / "nothing", unreadable), capsys)
    assert "not a folder; choose another --output_dir" in message


def test_the_run_that_a_comparison_would_train_into_is_looked_at_too(
    filled: Path, tmp_path: Path, unreadable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/auto-decoding").symlink_to(filled / "decode")
    message = error_of(command("compare-fit", tmp_path / "out", filled / "fit", unreadable), capsys)
    assert "out/auto-decoding is of `mnif decode`" in message


def test_every_evaluation_of_a_comparison_is_looked_at(
    filled: Path, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = ["eval", str(filled / "eval"), str(filled / "sample"), "--output_dir"]
    assert "is of `mnif fit`, run.json tells" in error_of([*compared, str(filled / "fit")], capsys)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/sample").symlink_to(filled / "decode")
    flags = [str(tmp_path / "out"), "--reference", str(picture_folder)]
    assert "out/sample is of `mnif decode`" in error_of([*compared, *flags], capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["sample"]


@pytest.mark.parametrize(
    ("name", "place"), [("encode", "mnif.latents.inference.evaluate_latents"), ("eval", "evals.images.set_metrics")]
)
def test_a_killed_command_has_left_whose_the_folder_is(
    filled: Path, name: str, place: str, picture_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own files come last; what a file was about to be goes with the next command."""
    module, _, function = place.rpartition(".")
    program = (
        f"import os, signal, sys, {module}; from mnif.cli import main\n"
        f"{module}.{function} = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)\n"
        "main(sys.argv[1:])"
    )
    words = command(name, tmp_path / "out", filled / "fit", picture_folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MNIF_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    (tmp_path / "out/.metrics.json.1.tmp").write_text("half")
    message = error_of(command("decode", tmp_path / "out", tmp_path / "nothing", tmp_path), capsys)
    assert f"{tmp_path / 'out'} is of `mnif {name}`, {BEGUN} tells" in message
    subprocess.run([sys.executable, "-m", "mnif", *words], env=environment, capture_output=True, check=True)
    assert not list((tmp_path / "out").glob(".*"))
    assert (tmp_path / "out/metrics.json").is_file()


def test_an_evaluation_killed_at_its_end_leaves_nothing_to_the_next(
    filled: Path, picture_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MNIF_CACHE", str(filled / "cache"))
    before = contents(filled / "eval")
    (filled / "eval/.parts").mkdir()
    (filled / "eval/.parts/000000000.npy").write_bytes(b"")
    (filled / "eval" / BEGUN).write_text('{"command": "eval"}')
    assert main(command("eval", filled / "eval", filled / "fit", picture_folder)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(filled / "eval") == before


def test_a_command_that_fails_at_once_leaves_no_folder(
    filled: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mnif.commands.encode.Chunks", stopped)
    words = command("encode", tmp_path / "out", filled / "fit", picture_folder)
    assert main(words) == 130
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    assert main(words) == 130
    assert list((tmp_path / "out").iterdir()) == []


def test_a_device_leaves_the_folders_of_commands_alone(
    filled: Path, exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for owner in COMMANDS:
        before = contents(filled / owner)
        flags = ["--bundle", str(exported), "--num", "1", "--output_dir", str(filled / owner)]
        assert device_sample.main(flags) == 2
        assert "is of another command" in capsys.readouterr().err
        assert contents(filled / owner) == before
    marks = {file for _, file, _ in output_folders._MARKS if "/" not in file}
    marks.add("scores.json")  # that of device/encode.py, which is no command here
    assert marks == {f"{name}.json" for name in device_cli._OF_OTHER_COMMANDS}


def test_a_run_that_others_wrote_into_before_stays_the_runs(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"fit": {}}))
    (tmp_path / "samples.json").write_text(json.dumps({"model_sha256": []}))
    (tmp_path / "metrics.json").write_text(json.dumps({"inputs": {}}))
    assert check_output_folder(tmp_path, "fit")
    for name in ("sample", "eval"):
        with pytest.raises(output_folders.UserError, match=r"run\.json tells"):
            check_output_folder(tmp_path, name)


def test_sample_removes_its_own_temporaries_alone(pipeline: MNIFPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    others = [".mine.tmp", "deep/er/.mine.tmp", "deep/.000003.png.12.tmp", "parts/notes.txt", "preview/.draft.tmp"]
    own = [".000001.png.12.tmp", "preview/.grid.png.7.tmp", "parts/.00000.npy.7.tmp", "000007/.000.png.3.tmp"]
    own.append(".samples-00000.tar.ab_d3f9h.tmp/000001.png")
    for format, file in (("folder", "000001.png"), ("tar", "samples-00000.tar"), ("npz", "samples.npz")):
        output = tmp_path / format
        words = ["sample", "--model", f"{tmp_path}/model", "--num_samples", "2", "--output_dir", str(output)]
        assert main([*words, "--format", format]) == 0
        before = contents(output)
        (output / file).unlink()
        for name in (*others, *own):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text("content")
        assert main([*words, "--format", format]) == 0
        after = contents(output)
        assert after.keys() == {*before, *others}
        assert after[file] == before[file]
        assert {after[name] for name in others} == {b"content"}


HOLDER = """
import os, sys, time
from pathlib import Path
from mnif.utils.output_folders import held_folder
with held_folder(Path(sys.argv[2])):
    child = os.fork()  # such as one that loads data: it lives on when its parent is killed
    if child:
        print(child, flush=True)
    time.sleep(120)
"""

COUNTER = """
import sys
from pathlib import Path
from mnif.utils.errors import UserError
from mnif.utils.output_folders import held_folder
folder, done = Path(sys.argv[1]), 0
while done < 60:
    try:
        with held_folder(folder):
            counter = folder.parent / "counter"
            counter.write_text(str(int(counter.read_text()) + 1))
            done += 1
    except UserError as error:
        assert "in use" in str(error), error
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen]:
    words = [sys.executable, "-c", HOLDER, "fit", str(folder)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            yield process
        finally:
            process.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("name", [*COMMANDS, "prior", "distill"])
def test_two_commands_at_once_in_one_folder(
    filled: Path, name: str, picture_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is told who is there since when, changes nothing, and may go on once the first was killed."""
    monkeypatch.setenv("MNIF_CACHE", str(filled / "cache"))
    folder = filled / ("fit" if name in ("prior", "distill") else name)
    words = (
        command(name, folder, filled / "fit", picture_folder) if folder.name == name else [name, "--run", str(folder)]
    )
    if name == "encode":
        words += ["--batch_size", "7"]
    before = contents(folder)
    with held_by_another(folder) as holder:
        message = error_of(words if name != "eval" else [*words, "--seed", "1"], capsys)
        assert f"{folder} is in use since 20" in message
        assert f"by process {holder.pid} on {os.uname().nodename} (mnif fit {folder})" in message
        assert {**contents(folder), LOCK: b""} == {**before, LOCK: b""}
        table = filled / "fit/latents.safetensors"
        if name == "fit":  # whoever reads is not asked
            read = ["decode", "--model", f"{folder}/model", "--latents", str(table), "--num", "2"]
            assert main([*read, "--output_dir", str(filled / "decode")]) == 0
        holder.kill()
        holder.wait()
        assert (folder / LOCK).is_file()
        with held_folder(folder):  # the child of the killed one is still there
            assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert contents(folder) == before


def test_a_lock_is_never_held_twice(tmp_path: Path) -> None:
    """Six processes count up a file 60 times each, in a folder that comes and goes."""
    (tmp_path / "counter").write_text("0")
    words = [sys.executable, "-c", COUNTER, str(tmp_path / "out")]
    processes = [subprocess.Popen(words) for _ in range(6)]
    assert [process.wait(timeout=120) for process in processes] == [0] * 6
    assert (tmp_path / "counter").read_text() == "360"
    assert not list(tmp_path.rglob(LOCK))


def test_the_main_process_of_a_launch_holds_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with held_folder(tmp_path / "out"):
        assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    with held_folder(tmp_path / "out"), held_folder(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).is_file()
    assert not (tmp_path / "out").exists()


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held_folder(tmp_path / "out"):
        assert "its file system knows no locks" in capsys.readouterr().err


def test_what_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file/out", Path("/proc/out"), tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="nothing can be written there"):
            check_output_folder(folder, "sample")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_without_room_for_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("mnif.utils.output_folders._rewrite", fill)
    with (
        pytest.raises(UserError, match=r"out: nothing can be written there \(No space left"),
        held_folder(tmp_path / "out"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), held_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
