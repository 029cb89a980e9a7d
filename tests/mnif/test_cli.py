import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mnif.cli import COMMANDS, main

ROOT = Path(__file__).parents[2]


PYTHON = (sys.executable, "-m", "mnif")


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from mnif.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'diffusers', 'numpy', 'tyro'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_reads_its_flags_alone(command: str) -> None:
    """What takes seconds to import is imported by what works with it."""
    program = (
        "import sys; from mnif.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'diffusers', 'accelerate', 'onnx', 'scipy', 'matplotlib'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", program, command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *shown, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    assert shown[0].startswith(f"usage: mnif {command} ")
    assert any(line.startswith("╭─ options ─") for line in shown)  # one look for all, argparse's too


def test_help_has_its_flags_in_groups() -> None:
    shown = subprocess.run([*PYTHON, "fit", "--help"], capture_output=True, text=True, check=True).stdout
    groups: dict[str, list[str]] = {}
    for line in shown.splitlines():
        if line.startswith("╭─ "):
            groups[line.split()[1]] = []
        elif line.startswith("│ --"):
            groups[list(groups)[-1]].append(line.split()[1].strip(","))
    names = ["options", "data", "model", "mixing", "method", "radiance", "optimizer", "learning", "saving", "machine"]
    assert list(groups) == names
    assert "--output_dir" in groups["options"]
    assert groups["model"][:2] == ["--num_bases", "--width"]
    assert {"--learning_rate", "--max_train_steps", "--num_train_epochs"} <= {*groups["learning"]}
    assert {"--report_to", "--checkpointing_steps"} <= {*groups["saving"]}
    assert max(map(len, groups.values())) <= 12


def completed(script: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    program = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        '$(complete -p mnif | sed "s/.*-F \\([^ ]*\\) .*/\\1/") mnif "${!#}" ""; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", program, "bash", str(script), *words], capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    offered = partial(completed, tmp_path / "completion", "mnif")
    assert sorted(offered("de") + offered("di")) == ["decode", "demo-app", "distill"]
    assert set(COMMANDS) <= {*offered("")}
    assert offered("fit", "--num_b") == ["--num_bases"]
    assert offered("fit", "--method", "") == ["encoder", "auto-decoding", "meta"]
    assert offered("build", "--builder", "tensorrt_") == ["tensorrt_rtx"]


IN_ZSH = """
compdef() { print -r -- "$@" }
source $1
_describe() { print -rl -- $completion_array }
words=(mnif $argv[2,-1]) CURRENT=$#
_tyro_mnif
"""
IN_FISH = "source $argv[1]; complete -C (string join -- ' ' mnif $argv[2..-1])"


@pytest.mark.parametrize(
    ("shell", "program", "mark"), [("zsh", ["-f", "-c", IN_ZSH, "zsh"], ":"), ("fish", ["-N", "-c", IN_FISH], "\t")]
)
def test_zsh_and_fish_complete_too(
    shell: str, program: list[str], mark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--completion", shell]) == 0
    script = capsys.readouterr().out
    for name, (_, _, purpose) in COMMANDS.items():
        assert f"'{name}': {{'description': '{purpose.replace(chr(39), '’')}'" in script
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    (tmp_path / "completion").write_text(script)
    environment = os.environ | {"HOME": str(tmp_path)}

    def offered(*words: str) -> list[str]:
        command = [shell, *program, str(tmp_path / "completion"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.stderr == ""
        return [line for line in done.stdout.splitlines() if line != "_tyro_mnif mnif"]

    assert offered("decod") == [f"decode{mark}{COMMANDS['decode'][2]}"]
    assert [line.split(mark)[0] for line in offered("fit", "--num_b")] == ["--num_bases"]
    assert sorted(line.split(mark)[0] for line in offered("fit", "--method", "")) == [
        "auto-decoding",
        "encoder",
        "meta",
    ]


def test_completion_is_of_the_program_and_of_shells_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "csh"]) == 2
    assert capsys.readouterr().err == "mnif --completion: name a shell, one of bash, zsh, fish\n"
    assert main(["fit", "--tyro-print-completion", "bash"]) == 2
    assert "`mnif --completion bash` prints" in capsys.readouterr().err


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """A folder with files of the user's that have names of ours and of what we need."""
    for name in ("export", "torch", "yaml", "tyro"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('of the user')")
    for name in ("evals", "latent_prior"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('of the user')")
    return tmp_path


PROGRAM = (sys.executable, "-c", "import sys; from mnif.cli import main; sys.exit(main())")  # as the script `mnif`


@pytest.mark.parametrize("command", ["export", "report", "fit"])
def test_files_in_the_working_folder_are_not_taken_for_ours(command: str, crowded: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*PYTHON, command, "--help"], cwd=crowded, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: mnif {command} ")


@pytest.mark.slow
def test_files_in_the_working_folder_under_torchrun(crowded: Path) -> None:
    (crowded / "torch.py").unlink()  # torchrun itself is not ours
    for name in ("yaml.py", "tyro.py"):
        (crowded / name).unlink()
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "-m", "--", "mnif"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*torchrun, "eval", "--help"], cwd=crowded, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: mnif eval ")


@pytest.mark.parametrize(("name", "file"), [("export", "export.py"), ("evals", "evals/__init__.py")])
def test_a_package_of_one_of_our_names_is_named_and_refused(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("raise SystemExit('of the user')")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for program in (PYTHON, PROGRAM):
        done = subprocess.run([*program, "fit", "--help"], cwd="/", env=environment, capture_output=True, text=True)
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"mnif: {tmp_path / file} is found in the place of mnif's own package of that name;")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    assert f"mnif {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_flag_is_one_line_and_exit_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no_such_flag", "1"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith(f"mnif {command}: ")


@pytest.mark.parametrize("words", [("--help",), ("report", "--help"), ("fit", "--help"), ("--completion", "fish")])
def test_a_reader_that_leaves_is_no_mistake(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*PYTHON, *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_unknown_command_and_missing_data_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith('mnif: no command "train"; choose one of fit, ')
    assert main(["smple"]) == 2
    assert capsys.readouterr().err == 'mnif: no command "smple"; did you mean sample?\n'
    assert main(["fit", "--data", "nowhere", "--output_dir", f"{tmp_path}/run"]) == 2
    assert capsys.readouterr().err.startswith("mnif fit: --data nowhere: no such folder")
    assert main(["sample", "--model", "nowhere", "--output_dir", f"{tmp_path}/out"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mnif sample: nowhere: no such model folder")
    assert "avatars comes along" in error
