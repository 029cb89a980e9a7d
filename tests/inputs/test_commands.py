"""What every command does with outputs that cannot be written, signals, and names from data."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mnif.cli import main
from mnif.utils.errors import UserError, markdown_code, printable
from mnif.utils.output_folders import BEGUN
from mnif.utils.process import escaped_output

NOWHERE = ["--model", "nowhere"]
OUTPUTS = {
    "fit": ["--data", "nowhere", "--signal", "image", "--output_dir"],
    "compare-fit": ["--data", "nowhere", "--signal", "image", "--output_dir"],
    "grow": [*NOWHERE, "--data", "nowhere", "--output_dir"],
    "pilot": ["--data", "nowhere", "--signal", "image", "--output_dir"],
    "encode": [*NOWHERE, "--data", "nowhere", "--output_dir"],
    "decode": [*NOWHERE, "--latents", "nowhere", "--output_dir"],
    "sample": [*NOWHERE, "--output_dir"],
    "export": [*NOWHERE, "--output_dir"],
    "eval": [*NOWHERE, "--reference", "nowhere", "--output_dir"],
    "atlas": [*NOWHERE, "--output_dir"],
    "monitor": [*NOWHERE, "--data", "nowhere", "--output_dir"],
    "verify": ["--bundle", "nowhere", "--output"],
    "bench": ["--bundle", "nowhere", "--output"],
}


def error_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written_is_noticed_before_any_work(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that is read is there: who looked at that first would say so."""
    (tmp_path / "file").write_text("mine")
    for output in (f"{tmp_path}/file/deeper/out", "/proc/out/deeper"):
        message = error_of([command, *OUTPUTS[command], output], capsys)
        named = str(Path(output).parent) if command in ("verify", "bench") else output
        assert message.startswith(f"mnif {command}: {named}: nothing can be written there (")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_further_outputs_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate = ["eval", *NOWHERE, "--reference", "nowhere", "--output_dir", f"{tmp_path}/out"]
    message = error_of([*evaluate, "--save_statistics", "/proc/out/statistics.npz"], capsys)
    assert message.startswith("mnif eval: /proc/out: nothing can be written there (")


def test_a_run_or_page_that_cannot_be_written(
    pipelined: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may do anything is not kept out by permissions, so another file system has to refuse."""

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    refused = "nothing can be written there (Read-only file system)"
    report = ["report", "--run", str(pipelined), "--output", f"{tmp_path}/page.html"]
    assert "is a folder; name a file" in error_of([*report[:-1], str(tmp_path)], capsys)
    monkeypatch.setattr("mnif.utils.files.tempfile.TemporaryFile", refuse)
    for command in (["prior", "--run", str(pipelined)], ["distill", "--run", str(pipelined)]):
        message = error_of(command, capsys)
        assert message.startswith(f"mnif {command[0]}: {pipelined}: {refused}")
    message = error_of(report, capsys)
    assert message.startswith(f"mnif report: {tmp_path}: {refused}")


@pytest.fixture
def pipelined(pipeline: object, tmp_path: Path) -> Path:
    """A run folder as far as commands look before they begin."""
    folder = tmp_path / "run"
    pipeline.save_pretrained(folder / "model")  # type: ignore[attr-defined]
    (folder / "run.json").write_text("{}")
    return folder


def terminated(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("a SIGTERM is noticed at once")


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("sample", "latent_prior.sample_writers.sample_latents"),
        ("sample --format tar", "latent_prior.sample_writers.sample_latents"),
        ("encode --data DATA", "mnif.latents.inference.evaluate_latents"),
        ("export --compile_rtx off", "export.bundle.write_device_files"),
        ("eval --reference DATA --num_samples 48", "evals.images.set_metrics"),
        ("decode --latents LATENTS", "mnif.commands.decode._save_overview"),
    ],
)
def test_a_sigterm_ends_a_command_as_ctrl_c_does(
    pipelined: Path,
    picture_folder: Path,
    tmp_path: Path,
    command: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name, *flags = command.split()
    monkeypatch.setenv("MNIF_CACHE", str(tmp_path / "cache"))
    if name == "decode":
        encode = ["encode", "--model", f"{pipelined}/model", "--data", str(picture_folder)]
        assert main([*encode, "--output_dir", f"{tmp_path}/encoded", "--refinement_steps", "1"]) == 0
    places = {"DATA": str(picture_folder), "LATENTS": f"{tmp_path}/encoded/latents.safetensors"}
    words = [name, "--model", f"{pipelined}/model", *[places.get(flag, flag) for flag in flags]]
    words += ["--output_dir", f"{tmp_path}/out"]
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(place, terminated)
    capsys.readouterr()
    assert main(words) == 143
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mnif {name}: terminated"
    assert signal.getsignal(signal.SIGTERM) is before
    left = [path.name for path in tmp_path.rglob(".*") if path.name not in (".parts", ".seals", BEGUN)]
    assert left == []
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("number", "code", "line"), [(15, 143, "terminated\n"), (2, 130, "mnif sample: stopped\n")])
def test_a_signal_ends_a_command_on_a_board(exported: Path, tmp_path: Path, number: int, code: int, line: str) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from export.device import bundle, sample\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background takes it away
        "def replace(path, target): os.kill(os.getpid(), int(sys.argv.pop()))\n"
        "Path.replace = replace\n"
        "sys.exit(sample.main(sys.argv[1:-1]))"
    )
    flags = ["--bundle", str(exported), "--num", "1", "--output_dir", f"{tmp_path}/out", str(number)]
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True)
    assert (done.returncode, done.stderr.splitlines(keepends=True)[-1]) == (code, line)
    assert list((tmp_path / "out").iterdir()) == []


HOSTILE = "a\x1b[2J\nmnif fit: all is well\r\u202e`b`\udcff.png"


def test_what_is_no_visible_character_is_escaped() -> None:
    shown = r"a\x1b[2J\nmnif fit: all is well\r\u202e`b`\udcff.png"
    assert printable(HOSTILE) == shown
    assert str(UserError(f"{HOSTILE}: damaged")) == f"{shown}: damaged"
    assert printable("Čtyři pícchtury – 四, ½ “x” 🎈") == "Čtyři pícchtury – 四, ½ “x” 🎈"
    assert markdown_code(HOSTILE) == f"`` {shown} ``"
    assert markdown_code("mnif fit") == "`mnif fit`"
    with io.StringIO() as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        with escaped_output():
            print("a table\n\tof ½\x1b]0;title\x07")
        assert stream.getvalue() == "a table\n\tof ½\\x1b]0;title\\x07\n"


def test_names_of_files_do_nothing_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids are names of files; here one of a picture that fits badly, and one that cannot be read."""
    name = HOSTILE.encode(errors="surrogateescape").replace(b"\xff", b"")
    folder = os.fsencode(tmp_path / "pictures")
    os.mkdir(folder)
    with open(os.path.join(folder, name), "wb") as file:
        file.write(b"nothing")
    flags = ["--output_dir", f"{tmp_path}/run", "--max_train_steps", "1"]
    assert main(["fit", "--data", str(tmp_path / "pictures"), "--signal", "image", *flags]) == 2
    output = capsys.readouterr()
    assert len(output.err.splitlines()) == 1
    assert not set("\x1b\r\u202e") & set(output.err + output.out)
    assert r"a\x1b[2J\nmnif fit: all is well" in output.err


@pytest.mark.parametrize("broken", ["onnxruntime", "numpy", "tensorrt"])
def test_a_package_that_fails_at_import_gives_its_reason(exported: Path, tmp_path: Path, broken: str) -> None:
    """As TensorRT does on a NumPy it does not know (AttributeError), or without a library."""
    (tmp_path / f"{broken}.py").write_text("raise AttributeError('module has no attribute bool8')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}

    def run(script: str, *flags: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, str(exported / f"device/{script}.py"), *flags]
        return subprocess.run(words, capture_output=True, text=True, env=environment, cwd=tmp_path)

    reason = f"{broken} cannot be imported: AttributeError: module has no attribute bool8"
    if broken == "numpy":
        done = run("sample")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "sample.py: numpy cannot be imported: module has no attribute bool8; install" in done.stderr
    elif broken == "tensorrt":
        done = run("build", "--builder", "tensorrt")
        assert done.returncode == 2
        assert done.stderr.startswith(f"device/build.py: {reason}; JetPack brings")
    else:
        done = run("verify", "--graphs", "decoder")
        assert f"onnxruntime: left out, {reason}" in done.stdout
        assert "ok   decoder" in done.stdout  # by another one
        done = run("sample", "--num", "1", "--backend", "onnxruntime")
        assert (done.returncode, done.stderr) == (2, f"device/sample.py: {reason}\n")
        done = run("sample", "--num", "1", "--output_dir", "drawn")
        assert done.returncode == 0, done.stderr
        assert f"not onnxruntime: {reason}" in done.stderr


def test_other_errors_at_import_have_their_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from export.device.bundle import BackendMissing, import_backend

    monkeypatch.syspath_prepend(str(tmp_path))
    errors = {
        "one": "raise ImportError('libnvinfer.so.8: cannot open shared object file')",
        "two": "raise OSError('GLIBC_2.32 not found')",
        "three": "import no_such_module_at_all",
    }
    for name, line in errors.items():
        (tmp_path / f"{name}.py").write_text(line)
    expected = {
        "one": "one cannot be imported: ImportError: libnvinfer.so.8: cannot open shared object file",
        "two": "two cannot be imported: OSError: GLIBC_2.32 not found",
        "three": "three cannot be imported: ModuleNotFoundError: No module named 'no_such_module_at_all'",
        "nowhere_at_all": "nowhere_at_all is not installed",
    }
    for name, message in expected.items():
        with pytest.raises(BackendMissing) as raised:
            import_backend(name)
        assert str(raised.value) == message


@pytest.mark.parametrize(
    "flags",
    [
        "build --batch_sizes -1",
        "build --batch_sizes 1 0",
        "build --optimization_level 9",
        "build --optimization_level -1",
        "build --compute_capabilities 86",
        "sample --num 0",
        "sample --seed -1",
        "sample --start -1",
        "sample --batch_size 0",
        "sample --steps 0",
        "sample --threads -1",
        "sample --threads 1000000",
        "sample --num 1.5",
        "bench --batch_sizes 0",
        "bench --rounds 0",
        "bench --threads -2",
    ],
)
def test_flags_of_device_commands_are_checked(
    exported: Path, tmp_path: Path, flags: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.device import bench, build, sample

    mains: dict[str, Callable] = {"build": build.main, "sample": sample.main, "bench": bench.main}
    monkeypatch.chdir(tmp_path)
    name, flag, *values = flags.split()
    assert mains[name](["--bundle", str(exported), flag, *values]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mnif {name}: argument {flag}")
    assert list(tmp_path.iterdir()) == []


def test_manifests_are_shown_without_doing_anything(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.device.bundle import manifest_digest

    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["package"]["name"] = HOSTILE
    manifest["digest"] = manifest_digest(manifest)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert main(["inspect", "--bundle", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert r"made by a\x1b[2J\nmnif fit: all is well\r\u202e" in output
    assert not set("\x1b\r\u202e") & set(output)
