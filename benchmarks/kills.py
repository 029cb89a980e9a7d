"""Commands killed at random moments and given again: whether they end where nobody disturbed them.

    python benchmarks/kills.py --output_dir runs/kills --kills 200

Each command runs at miniature size in a process of its own, forked from this one so that no time goes into imports. It
is killed (SIGKILL) at a moment drawn from all the time it takes, given again and perhaps killed again, and run to its
end at last. Then every file must be what it is after a run without a kill: to the byte, or for figures and curves but
for times and commands; and no temporary file may be left. Prints a table and writes OUTPUT_DIR/kills.json.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from golden_outputs import hash_of_file

from mnif import cli

SMALL = "--resolution 16 --cells 2 --num_bases 6 --width 8 --depth 1 --latent_dim 12 --encoder_width 16"
FEW = "--train_batch_size 16 --checkpointing_steps 6 --validation_steps 10 --lr_warmup_steps 5 --compile off"
FIT = f"fit --data DATA --output_dir OUT --stride 2 --refinement_steps 2 --max_train_steps 40 {SMALL} {FEW}"
SAMPLE = "sample --model RUN/model --output_dir OUT --num_samples 300 --shard_size 64 --num_inference_steps 4"

# By name: the command, and the folder it goes on from, which is copied into its place.
COMMANDS = {
    "fit": (f"{FIT} --random_flip", None),
    "auto-decoding": (f"{FIT} --method auto-decoding", None),
    "prior": (f"prior --run OUT --width 32 --depth 2 --max_train_steps 60 {FEW}", "fit"),
    "distill": (
        f"distill --run OUT --width 32 --depth 2 --num_pairs 4096 --max_train_steps 30 --matching_steps 30 {FEW}",
        "prior",
    ),
    "sample": (SAMPLE, None),
    "sample-tar": (f"{SAMPLE} --format tar", None),
    "sample-npz": (f"{SAMPLE} --format npz", None),
    "encode": ("encode --model RUN/model --data DATA --output_dir OUT --batch_size 8 --refinement_steps 8", None),
    "export": ("export --model RUN/model --output_dir OUT --num_baked 1 --compile_rtx off", None),
}
MOST_KILLS = 3  # of one trial


def main(arguments: list[str] | None = None) -> int:
    """Runs the campaign; returns 1 if a trial did not end as it should."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="gets everything; must not exist")
    parser.add_argument("--kills", type=int, default=200, help="kills in all, shared out over the commands (200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS), metavar="NAME")
    flags = parser.parse_args(arguments)
    flags.output_dir.mkdir(parents=True)
    folder = flags.output_dir.resolve()
    os.environ["MNIF_CACHE"] = str(folder / "cache")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "data.npz", images=pixels)
    for module, _ in cli.COMMANDS.values():
        import_module(module.partition(":")[0])
    seconds = {name: _undisturbed(folder, name) for name in COMMANDS}
    random, results = np.random.default_rng(flags.seed), {name: _nothing() for name in flags.commands}
    while sum(result["kills"] for result in results.values()) < flags.kills:
        name = min(results, key=lambda name: results[name]["kills"])
        most = min(int(random.integers(1, MOST_KILLS + 1)), flags.kills - _kills_of(results))
        _trial(folder, name, random.uniform(0, seconds[name], most), results[name])
        _write(flags, folder, seconds, results)
    print(_table(seconds, results))
    return int(any(result["differing"] or result["failed"] for result in results.values()))


def _nothing() -> dict[str, Any]:
    return {"trials": 0, "kills": 0, "came_too_late": 0, "moments": [], "differing": [], "failed": []}


def _kills_of(results: dict[str, dict[str, Any]]) -> int:
    return sum(result["kills"] for result in results.values())


def _words(folder: Path, name: str, output: Path) -> list[str]:
    """The command of that name into ``output``; RUN is the undisturbed run of both stages."""
    places = {"DATA": folder / "data.npz", "OUT": output, "RUN": folder / "undisturbed" / "prior"}
    words = COMMANDS[name][0].split()
    for place, path in places.items():
        words = [word.replace(place, str(path)) for word in words]
    return words


def _prepare(folder: Path, name: str, output: Path) -> None:
    """Copies what the command goes on from into its place."""
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(exist_ok=True)
    if (source := COMMANDS[name][1]) is not None:
        shutil.copytree(folder / "undisturbed" / source, output)


def _undisturbed(folder: Path, name: str) -> float:
    """Runs a command to its end twice, the second time for its seconds: the first fills caches of compiled code."""
    output = folder / "undisturbed" / name
    for _ in range(2):
        _prepare(folder, name, output)
        started = time.perf_counter()
        code = _run(_words(folder, name, output), folder / "log.txt")
        if code:
            raise SystemExit(f"{name} ended with {code}: {(folder / 'log.txt').read_text()[-2000:]}")
    return time.perf_counter() - started


def _trial(folder: Path, name: str, moments: np.ndarray, result: dict[str, Any]) -> None:
    """Kills a command at these moments (seconds), one after another, then lets it end, and compares."""
    output = folder / "killed" / name
    words, log = _words(folder, name, output), folder / "log.txt"
    _prepare(folder, name, output)
    for moment in moments.tolist():
        if _run(words, log, moment) != -signal.SIGKILL:
            result["came_too_late"] += 1
            continue
        result["kills"] += 1
        result["moments"].append(round(moment, 3))
    result["trials"] += 1
    if code := _run(words, log):
        result["failed"].append({"moments": moments.tolist(), "code": code, "log": log.read_text()[-2000:]})
        return
    whole, found = _contents(folder / "undisturbed" / name), _contents(output)
    differing = sorted(path for path in whole.keys() | found.keys() if whole.get(path) != found.get(path))
    if differing:
        result["differing"].append({"moments": moments.tolist(), "files": differing})


def _run(words: list[str], log: Path, seconds: float | None = None) -> int:
    """Runs a command in a process of its own, for so many seconds at most; its exit code, or minus the signal."""
    child = os.fork()
    if not child:
        code = 70
        try:
            with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                code = cli.main(words)
        finally:
            os._exit(code)
    deadline = None if seconds is None else time.perf_counter() + seconds
    while deadline is not None and time.perf_counter() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    if deadline is not None:
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _contents(output: Path) -> dict[str, str]:
    """Hashes all that a command leaves, by path; of JSON without times and commands, of checkpoints nothing."""
    files = (path for path in sorted(output.rglob("*")) if path.is_file() and "checkpoints" not in path.parts)
    hashes = {}
    for path in files:
        name = path.relative_to(output).as_posix()
        if path.name in ("README.md", "report.html", "run.json", "config.yaml", "manifest.json", "compare.json"):
            hashes[name] = "there"  # they repeat commands and times
        elif path.suffix in (".json", ".jsonl") and ".seals" not in path.parts:
            hashes[name] = hash_of_file(path, output)
        else:
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def _write(flags: argparse.Namespace, folder: Path, seconds: dict[str, float], results: dict[str, Any]) -> None:
    content = {"seed": flags.seed, "kills": _kills_of(results), "seconds": seconds, "commands": results}
    (folder / "kills.json").write_text(json.dumps(content, indent=1) + "\n")


def _table(seconds: dict[str, float], results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| command | seconds undisturbed | kills | trials | ended otherwise | failed |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        counts = [result["kills"], result["trials"], len(result["differing"]), len(result["failed"])]
        lines.append(f"| {name} | {seconds[name]:.2f} | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
