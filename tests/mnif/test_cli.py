import os
import subprocess
import sys

import pytest

from mnif.cli import COMMANDS, main


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; from mnif.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'diffusers', 'numpy', 'tyro'} & set(sys.modules); sys.exit(code or len(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in COMMANDS)


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


def test_a_reader_that_leaves_is_no_mistake() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mnif", "fit", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_unknown_command_and_missing_data_are_one_line_and_exit_2(
    capsys: pytest.CaptureFixture[str], tmp_path: object
) -> None:
    assert main(["train"]) == 2
    assert capsys.readouterr().err.startswith('mnif: no command "train"')
    assert main(["fit", "--data", "nowhere", "--output_dir", f"{tmp_path}/run"]) == 2
    assert capsys.readouterr().err.startswith("mnif fit: --data nowhere: no such folder")
    assert main(["sample", "--model", "nowhere", "--output_dir", f"{tmp_path}/out"]) == 2
    assert capsys.readouterr().err.startswith("mnif sample: nowhere: no such model folder")
