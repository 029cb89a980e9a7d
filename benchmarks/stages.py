"""Seconds and peak memory of every command of `make demo`, each a process of its own.

    python benchmarks/stages.py RUN=runs/timed

Arguments go to make. The run folder should be new: commands that have finished before are quick.
"""

import os
import shlex
import subprocess
import sys
import time


def main(settings: list[str]) -> None:
    subprocess.run(["make", "install"], check=True)
    recipe = subprocess.run(["make", "-n", "demo", *settings], check=True, capture_output=True, text=True).stdout
    commands = [line for line in recipe.splitlines() if "/mnif " in line]
    rows = []
    for command in commands:
        started = time.perf_counter()
        process = subprocess.Popen(shlex.split(command))
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"failed: {command}")
        rows.append((shlex.split(command)[1], time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6))
    print("| command | seconds | peak memory, MB |\n|---|---|---|")
    for name, seconds, megabytes in rows:
        print(f"| mnif {name} | {seconds:.0f} | {megabytes:.0f} |")
    print(f"| all | {sum(row[1] for row in rows):.0f} | {max(row[2] for row in rows):.0f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
