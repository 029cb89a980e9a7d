"""What a terminal and a log file show while something goes on."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios

PROGRAM = """
import time
from mnif.utils.process import escaped_output, progress_bar

with escaped_output():
    with progress_bar(total=14, desc="fit", unit="step") as bar:
        bar.mininterval = 0.1
        for step in range(1, 15):
            time.sleep(0.1)
            bar.update()
            if step % 12 == 0:
                print("step", step, "done")
        print("stopped")
    print("the last", end="")
"""


def on_a_terminal(program: str) -> list[str]:
    """The lines that a terminal of 80 columns shows in the end."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", program], stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = bytearray()
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # that nobody has the other end any more
        pass
    os.close(ours)
    assert process.wait() == 0
    lines = []
    for line in written.decode().split("\n"):
        shown = ""
        for part in line.split("\r"):  # each overwrites what stood there
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_what_is_printed_stands_above_a_progress_bar_and_not_behind_it() -> None:
    first, second, bar, last = on_a_terminal(PROGRAM)
    assert (first, second, last) == ("step 12 done", "stopped", "the last")
    assert bar.startswith("fit: 100%|")
    assert "14/14" in bar


def test_in_a_log_file_every_line_stands_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
    )
    lines = done.stdout.split("\n")
    printed = [line for line in lines if not line.startswith("fit: ")]
    assert printed == ["step 12 done", "stopped", "the last"]
    assert {line.partition("|")[0] for line in lines} >= {"fit: 100%"}
    assert "\r" not in done.stdout


def test_help_has_its_colours_on_a_terminal() -> None:
    """Escapes that came from data would be written out, as \\x1b; these are our own."""
    lines = on_a_terminal("import sys; from mnif.cli import main; sys.exit(main(['report', '--help']))")
    assert lines[0].startswith("\x1b[1musage:")
    assert re.sub(r"\x1b\[[\d;]*m", "", lines[0]) == "usage: mnif report [-h] [OPTIONS]"
    assert not [line for line in lines if r"\x1b" in line]
